"""What each tensor of a checkpoint is, from the model's own modules built on the meta device."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from loftq.errors import InputError, listed, quoted
from loftq.formats import strict_json
from loftq.plan import Role, Stack

# Keys that steer transformers from inside a config file (CVE-2026-4372); never taken from a checkpoint.
INTERNAL_KEYS = (
    "_attn_implementation",
    "_experts_implementation",
    "custom_pipelines",
    "auto_map",
    "trust_remote_code",
)
LARGEST_SIZE = 1 << 31
MOST_LAYERS = 4096
READ_DIRECTLY = {"rel_embeddings": "its weight is read directly, past any adapter"}  # DeBERTa-v2


def read_config(directory: Path) -> dict[str, Any]:
    """``config.json``, strictly parsed, without the keys that would run or select code."""
    path = directory / "config.json"
    if not path.is_file():
        raise InputError(f"{path}: missing; a Hugging Face model directory holds a config.json beside its weights")
    config = strict_json.load_object(path)
    if "quantization_config" in config:
        method = quoted(config["quantization_config"].get("quant_method", "an unnamed method"))
        raise InputError(f"{path}: already quantized with {method}; start from the full-precision checkpoint")
    for key, value in config.items():
        _check_number(path, key, value)
    return {k: v for k, v in config.items() if not k.startswith(INTERNAL_KEYS)}


def _check_number(path: Path, key: str, value: object) -> None:
    """Refuse sizes that no model has, before a skeleton is built from them."""
    counted = key.endswith(("_size", "_layers", "_heads", "_dim")) or key.startswith(("num_", "n_", "d_"))
    if not counted or value is None or isinstance(value, (list, dict, bool)):
        return
    largest = MOST_LAYERS if "layers" in key else LARGEST_SIZE
    if isinstance(value, str) or not 0 <= value <= largest:
        raise InputError(f"{path}: {quoted(key)} is {quoted(value)!s}; wanted a number between 0 and {largest}")


def build(directory: Path) -> nn.Module:
    """The model of ``config.json`` on the meta device: all its modules, none of its weights.

    The class is the one named under ``architectures``, else the base model. Code shipped with the checkpoint is
    never run.
    """
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    values = read_config(directory)
    model_type = values.get("model_type")
    if model_type not in CONFIG_MAPPING:
        raise InputError(
            f"{directory / 'config.json'}: model_type {quoted(model_type)} is not one of transformers' own; "
            "loftq does not run code that comes with a checkpoint"
        )
    names = values.get("architectures") or []
    model_class = getattr(transformers, str(names[0]), None) if names else None
    try:
        config = CONFIG_MAPPING[model_type].from_dict(values)
        with torch.device("meta"):
            if isinstance(model_class, type) and issubclass(model_class, transformers.PreTrainedModel):
                return model_class(config)
            return transformers.AutoModel.from_config(config)
    except Exception as e:  # whatever transformers raises for a config it cannot take
        line = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
        raise InputError(f"{directory / 'config.json'}: transformers cannot build this model: {line}") from e


def roles(model: nn.Module, tensor_names: Iterable[str]) -> dict[str, Role]:
    """The role of every checkpoint tensor, by the names under which transformers would load it."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    by_identity: dict[int, list[str]] = {}
    for name, parameter in parameters.items():
        by_identity.setdefault(id(parameter), []).append(name)
    modules = dict(model.named_modules())
    result = {}
    for tensor in tensor_names:
        runtime, converted = runtime_name(model, tensor, parameters)
        if converted:
            kind = "experts" if "expert" in tensor else "other"
            keep = f"converted by transformers on loading into {quoted(runtime)}"
            result[tensor] = Role(quoted(runtime), kind, backbone=True, keep=keep)
            continue
        if runtime not in parameters:
            result[tensor] = Role()
            continue
        module_name, _, leaf = runtime.rpartition(".")
        tied = tuple(n for n in by_identity[id(parameters[runtime])] if n != runtime)
        kind, keep = _kind(modules[module_name], leaf, parameters[runtime], module_name)
        backbone = _in_backbone(model, module_name) and modules[module_name] is not _output_head(model)
        result[tensor] = Role(module_name, kind, backbone, _stack(modules, module_name), tied, keep)
    return result


def adaptable(model: nn.Module) -> list[str]:
    """Names of all modules that a LoRA adapter can wrap."""
    return [name for name, module in model.named_modules() if _kind(module, "weight", None, name)[0] != "other"]


def runtime_name(model: nn.Module, tensor: str, parameters: dict[str, Any]) -> tuple[str, bool]:
    """The parameter a checkpoint tensor becomes, and whether transformers converts it (fuses, splits) on the way."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    if "_loftq_conversions" not in model.__dict__:
        model.__dict__["_loftq_conversions"] = get_model_conversion_mapping(model)
    mapping = model.__dict__["_loftq_conversions"]
    prefix: str = model.base_model_prefix  # type: ignore[assignment]
    renamings = [m for m in mapping if isinstance(m, WeightRenaming)]
    converters = [m for m in mapping if isinstance(m, WeightConverter)]
    name, source = rename_source_key(tensor, renamings, converters, prefix, parameters)
    if name not in parameters and tensor in parameters:
        name, source = tensor, None
    return name, source is not None


def _kind(module: nn.Module, leaf: str, parameter: Any, name: str) -> tuple[str, str]:
    """Kind of a module's parameter, and a reason to keep it if the module has one."""
    from transformers.pytorch_utils import Conv1D

    if leaf != "weight":
        three_dimensional = parameter is not None and parameter.ndim == 3
        return ("experts" if three_dimensional and "expert" in name else "other"), ""
    if isinstance(module, nn.Embedding):
        last = name.rpartition(".")[2]
        own_forward = "" if type(module) is nn.Embedding else f"{type(module).__name__} computes more than a lookup"
        return "embedding", READ_DIRECTLY.get(last, own_forward)
    if isinstance(module, Conv1D):
        return "conv1d", ""
    if isinstance(module, nn.Linear):
        plain = type(module).forward is nn.Linear.forward and not _inside_attention_of_torch(module)
        return "linear", "" if plain else f"{type(module).__name__} computes more than a product"
    return "other", ""


def _inside_attention_of_torch(module: nn.Module) -> bool:
    return type(module).__name__ == "NonDynamicallyQuantizableLinear"  # read directly by nn.MultiheadAttention


def _output_head(model: nn.Module) -> nn.Module | None:
    try:
        return model.get_output_embeddings()  # type: ignore[operator]
    except (NotImplementedError, AttributeError):
        return None


def _in_backbone(model: nn.Module, module_name: str) -> bool:
    prefix = model.base_model_prefix
    wrapped = prefix in dict(model.named_children())
    return not wrapped or module_name.startswith(f"{prefix}.")


def _stack(modules: dict[str, nn.Module], name: str) -> Stack | None:
    """The outermost ModuleList that holds the module."""
    parts = name.split(".")
    for i in range(1, len(parts)):
        parent = modules[".".join(parts[:i])]
        if isinstance(parent, nn.ModuleList) and parts[i].isdecimal():
            return Stack(".".join(parts[:i]), int(parts[i]), len(parent))
    return None


def check_shapes(model: nn.Module, shapes: dict[str, tuple[int, ...]], roles_: dict[str, Role]) -> None:
    """InputError if a matrix of the checkpoint has another shape than the model of ``config.json`` has."""
    wrong = []
    for tensor, role in roles_.items():
        if role.kind in ("linear", "conv1d", "embedding") and not role.keep:
            wanted = tuple(model.get_parameter(f"{role.module}.weight").shape)
            if wanted != shapes[tensor]:
                wrong.append(f"{tensor} is {shapes[tensor]}, config.json asks for {wanted}")
    if wrong:
        raise InputError(f"the weights do not fit config.json: {listed(wrong)}; one of the two was changed")
