"""The Hugging Face quantizer: ``from_pretrained`` on a LoftQ checkpoint gives packed layers, never a dense copy.

``config.json`` lists every packed module under ``quantization_config.groups``, by the name it has in the model it was
quantized from. A model with another head finds the same modules with or without the base model's prefix.
"""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from loftq.errors import InputError, UsageError, listed, quoted
from loftq.formats.config import FORMAT_VERSION, Group, read_groups
from loftq.formats.tensorfile import read_header
from loftq.nn.layers import LoftQEmbedding, LoftQLinear, PackedWeight, pack_like, replace_module
from loftq.nn.skeleton import runtime_name
from loftq.spec import QuantSpec


@register_quantization_config("loftq")
class LoftQQuantizationConfig(QuantizationConfigMixin):
    """``quantization_config`` of a LoftQ checkpoint; written by ``loftq quantize``, see ``docs/format.md``.

    Attributes:
        bits: the width that was asked for, as a number, for tools that print it.
        groups: modules that share a spec.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]] | None = None,
        bits: float | None = None,
        format_version: int = FORMAT_VERSION,
        **unknown: Any,
    ) -> None:
        unknown.pop("quant_method", None)
        self.quant_method = "loftq"
        self.format_version = format_version
        self.bits = bits
        self.groups = groups or []
        read_groups({"format_version": format_version, "groups": self.groups, **unknown})

    @property
    def specs(self) -> dict[str, QuantSpec]:
        groups: list[Group] = read_groups({"format_version": self.format_version, "groups": self.groups})
        return {module: group.quant for group in groups for module in group.modules}


@register_quantizer("loftq")
class LoftQHfQuantizer(HfQuantizer):
    """Puts packed layers into the skeleton before loading; the tensors then load like any others."""

    quantization_config: LoftQQuantizationConfig  # type: ignore[assignment]
    is_trainable = True  # type: ignore[assignment]
    is_compileable = True  # type: ignore[assignment]

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        if not self.pre_quantized:
            raise UsageError(
                "a dense checkpoint is not quantized while it loads: run `loftq quantize MODEL --output DIR` and load "
                "DIR, or load the model and call loftq.get_peft_model(model, bits=..., rank=...)"
            )

    def is_serializable(self) -> bool:
        return True

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> torch.dtype | None:
        """Scales keep the dtype of the file, whatever dtype the model is loaded in."""
        name = getattr(converter, "source_patterns", [""])[0]
        return None if ".weight_" in name else super().get_new_dtype(converter, param, dtype)

    def _process_model_before_weight_loading(
        self, model: nn.Module, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        found = resolve(model, self.quantization_config.specs)
        if not found:
            raise InputError(
                f"none of the packed modules ({listed(self.quantization_config.specs, 3)}) is in {type(model).__name__}; "
                "load the checkpoint with the model class that it was made from"
            )
        for name, (_, spec) in found.items():
            packed = pack_like(model.get_submodule(name), spec, device="meta")
            packed._is_hf_initialized = True  # type: ignore[assignment]  # keeps _init_weights off the codes
            replace_module(model, name, packed)
        if checkpoint_files:
            _check_files([Path(f) for f in checkpoint_files], model, found)
        model._checkpoint_conversion_mapping = _prefix_mapping(found)  # type: ignore[assignment]

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        for module in model.modules():
            if isinstance(module, PackedWeight):
                for parameter in module.stored:
                    parameter.requires_grad_(False)
        return model

    def _dequantize(self, model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
        return unpack_model(model, dtype or torch.float32)


def unpack_model(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Replace every packed layer by a dense one."""
    for name, module in list(model.named_modules()):
        if isinstance(module, (LoftQLinear, LoftQEmbedding)):
            replace_module(model, name, module.to_dense(dtype))
    return model


def resolve(model: nn.Module, specs: dict[str, QuantSpec]) -> dict[str, tuple[str, QuantSpec]]:
    """Runtime name -> (name in the config, spec), for the modules that this model class has."""
    prefix = model.base_model_prefix
    modules = dict(model.named_modules())
    found = {}
    for name, spec in specs.items():
        for candidate in (name, f"{prefix}.{name}", name.removeprefix(f"{prefix}.")):
            if candidate in modules and hasattr(modules[candidate], "weight"):
                found[candidate] = (name, spec)
                break
    return found


def _prefix_mapping(found: dict[str, tuple[str, QuantSpec]]) -> dict[str, str]:
    """Adapter keys -> keys of this model class, as PEFT applies it: adds or drops the base model's prefix."""
    runtime, (name, _) = next(iter(found.items()))
    if runtime == name:
        return {}
    if runtime.endswith(name):
        first = sorted({n.split(".")[0] for n, _ in found.values()})
        return {rf"^(?=(?:{'|'.join(first)})\.)": runtime.removesuffix(name)}
    dropped = name.removesuffix(runtime)
    return {rf"^{dropped}": ""}


def _check_files(files: list[Path], model: nn.Module, found: dict[str, tuple[str, QuantSpec]]) -> None:
    """Refuse files that lack a packed tensor or hold it in another shape; transformers would only warn."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    present = {}
    for file in files:
        if file.suffix == ".safetensors":
            for tensor in read_header(file).tensors.values():
                present[runtime_name(model, tensor.name, parameters)[0]] = (tensor.dtype, tensor.shape)
    wrong = []
    for runtime in found:
        for suffix, wanted in model.get_submodule(runtime).layout().items():  # type: ignore[operator]
            got = present.get(f"{runtime}.{suffix}")
            if got != wanted:
                wrong.append(f"{runtime}.{suffix}: wanted {wanted}, found {quoted(got or 'nothing')}")
    if wrong:
        raise InputError(
            f"{files[0].parent}: the packed weights do not fit config.json: {listed(wrong)}; "
            "run `loftq verify` on the directory, or download it again"
        )
