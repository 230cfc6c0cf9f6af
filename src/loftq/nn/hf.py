"""The Hugging Face quantizer: ``from_pretrained`` on a LoftQ checkpoint gives packed layers, never a dense copy.

``config.json`` lists every packed module under ``quantization_config.groups``, by the name it has in the model it was
quantized from. A model with another head finds the same modules with or without the base model's prefix.
"""

import functools
import re
from collections.abc import Callable, Collection, Iterable, Iterator
from contextvars import ContextVar
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from loftq.architecture.conversion import split_parameters
from loftq.architecture.experts import packable_stacks
from loftq.architecture.kinds import kind_of
from loftq.architecture.skeleton import Rename, renamer, spellings
from loftq.errors import InputError, UsageError, command, listed, quoted
from loftq.formats.config import quantization_config, read_groups
from loftq.formats.tensorfile import read_header
from loftq.kernels import backend
from loftq.nn.experts import PackedExperts, pack_experts, unpack_experts
from loftq.nn.layers import (
    LoftQEmbedding,
    LoftQLinear,
    Packed,
    PackedWeight,
    can_pack,
    has_packed,
    pack_like,
    replace_module,
)
from loftq.numerics import encode, oriented
from loftq.numerics.trellis import check_rates
from loftq.patching import inside, patches
from loftq.planning import natural
from loftq.spec import SUFFIXES, QuantSpec


@register_quantization_config("loftq")
class LoftQQuantizationConfig(QuantizationConfigMixin):
    """``quantization_config`` of a LoftQ checkpoint; written by ``loftq quantize``, see ``docs/format.md``.

    Attributes:
        bits: the width that was asked for, as a number, for tools that print it.
        groups: modules, and stacks of experts, that share a spec.
        levels: tables of levels, where there is a trellis.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]] | None = None,
        bits: float | None = None,
        format_version: int | None = None,
        levels: dict[str, str] | None = None,
        **unknown: Any,
    ) -> None:
        unknown.pop("quant_method", None)
        self.quant_method = "loftq"  # type: ignore[assignment]  # a plain string serves as well as the enum
        self.format_version = format_version
        self.bits = bits
        self.groups = groups
        if levels is not None:
            self.levels = levels
        if unknown or groups is not None:
            read_groups({**vars(self), **unknown})

    @property
    def specs(self) -> dict[str, QuantSpec]:
        groups = read_groups(vars(self))
        return {name: group.quant for group in groups for name in group.names}


@register_quantizer("loftq")
class LoftQHfQuantizer(HfQuantizer):
    """Puts packed layers into the skeleton before loading; the tensors then load like any others.

    Attributes:
        new_modules: those that the checkpoint has no weights for, such as the head of another class.
        directory: of the weights that were loaded; None for a model that was packed in memory.
    """

    new_modules: tuple[str, ...] = ()
    directory: Path | None = None
    _scales: frozenset[str] = frozenset(SUFFIXES[1:])  # how scales are called in their modules; stacks have more
    is_trainable = True  # type: ignore[assignment]
    is_compileable = True  # type: ignore[assignment]

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """InputError for a config that says nothing about its modules; UsageError for a dense checkpoint."""
        if self.pre_quantized:
            read_groups(self.quantization_config.to_dict())
        else:
            raise UsageError(
                f"a dense checkpoint is not quantized while it loads: {command('quantize', 'MODEL', output='DIR')} and "
                "load DIR, or load the model and call loftq.get_peft_model(model, bits=..., rank=...)"
            )

    def is_serializable(self) -> bool:
        return True

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> torch.dtype | None:
        """Scales keep the dtype of the file, whatever dtype the model is loaded in."""
        leaf = converter.source_patterns[0].rpartition(".")[2]
        return None if leaf in self._scales else super().get_new_dtype(converter, param, dtype)

    def _process_model_before_weight_loading(
        self, model: nn.Module, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        report_model_dtype()
        _refuse_tensor_parallel(model)
        config: Any = self.quantization_config
        found = resolve(model, config.specs)
        for name, (_, spec) in found.items():
            packed = _pack_empty(model, name, spec, torch.device("meta"))
            packed._is_hf_initialized = True  # type: ignore[assignment]  # keeps _init_weights off the codes
        holders = [module for module in model.modules() if isinstance(module, Packed)]
        dtypes = (pair for module in holders for pair in module._stored_dtypes.items())
        self._scales |= {name for name, dtype in dtypes if dtype.is_floating_point}
        if checkpoint_files:
            self.directory = Path(checkpoint_files[0]).parent.absolute()
            present = _present([Path(f) for f in checkpoint_files], model)
            _check_packed(present, model, found, self.directory)
            self.new_modules = _new_modules(present, model)
        model._checkpoint_conversion_mapping = _prefix_mapping(found)  # type: ignore[assignment]
        self._dtypes = {} if hasattr(HfQuantizer, "get_new_dtype") else _dtypes_to_load(model, self._scales)

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        _refuse_tensor_parallel(model)
        for name, tensor in _tensors(model):
            tensor.data = tensor.data.to(self._dtypes.get(name, tensor.dtype))
        for name, module in model.named_modules():
            if isinstance(module, Packed):
                for parameter in module.stored:
                    parameter.requires_grad_(False)
                if not module.stored[0].is_meta:
                    _check_rates(name, module)
        _unpack_shared_tables(model)
        return model

    def _dequantize(self, model: nn.Module, dtype: torch.dtype | str | None = None) -> nn.Module:
        return unpack_model(model, getattr(torch, dtype) if isinstance(dtype, str) else dtype)


def _unpack_shared_tables(model: Any) -> None:
    """A packed table becomes dense if the class ties its head to it, whose product cannot be by packed codes.

    It was packed because the class that was quantized has no such head.
    """
    found = ((name, m) for name, m in model.named_modules() if isinstance(m, LoftQEmbedding))
    tables = {id(m.stored[0]): name for name, m in found if not m.stored[0].is_meta}
    others = (m for m in model.modules() if not isinstance(m, Packed))
    shared = [(m, key, tables[id(p)]) for m in others for key, p in m._parameters.items() if id(p) in tables]
    for name in {name for *_, name in shared}:
        table: Any = model.get_submodule(name)
        replace_module(model, name, table.to_dense(table.compute_dtype))
    for module, key, name in shared:
        setattr(module, key, model.get_submodule(name).weight)
    if shared:
        forget_unpacked(model)


def _check_rates(name: str, module: Packed) -> None:
    """InputError for a packed layer, or an expert, whose columns' rates cannot be."""
    try:
        for stored, spec in module.matrices():
            check_rates(stored, spec)
    except InputError as e:
        raise InputError(f"{quoted(name)}: {e}") from e


def _refuse_tensor_parallel(model: Any) -> None:
    """UsageError if transformers was asked to split layers between processes: packed codes cannot be cut by its plan.

    transformers 5.17 and later say so in the configuration, before the weights are loaded; earlier ones in the model.
    """
    asked: Any = getattr(model.config, "distributed_config", None)
    wanted = asked if isinstance(asked, dict) else vars(asked) if asked else {}
    sizes = [wanted.get("tp_size"), wanted.get("ep_size"), getattr(model, "_tp_size", None)]
    if wanted.get("tp_plan") or any(size and size > 1 for size in sizes):
        raise UsageError(
            "tensor and expert parallel loading (tp_plan, tp_size, ep_size) do not work on packed layers; load without "
            "them: each process holds the packed model, device_map or FSDP spread it"
        )


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    return chain(model.named_parameters(), model.named_buffers())


def _dtypes_to_load(model: Any, scales: Collection[str]) -> dict[str, torch.dtype]:
    """What every tensor is cast to when it is loaded, by transformers from 5.21 on.

    Those before leave the dtype of the file where a tensor has another name there, as under another head, and make
    scales float32 whose layer is kept in it.
    """
    wanted = {}
    for name, tensor in _tensors(model):
        plan = {} if name.rpartition(".")[2] in scales else model._get_dtype_plan(tensor.dtype)
        kept = (dtype for pattern, dtype in plan.items() if re.search(pattern.replace("*", ".*"), name))
        wanted[name] = next(kept, tensor.dtype)
    return wanted


@functools.cache
def report_model_dtype() -> None:
    """Let ``model.dtype`` be that of the dense parameters.

    transformers takes the first float parameter's; with packed embeddings that is a scale. ``save_pretrained`` writes
    the answer into ``config.json``, so that a float32 model would come back in the dtype of its scales.
    """
    from transformers.modeling_utils import PreTrainedModel

    first_float: Any = PreTrainedModel.dtype

    def dtype(self: PreTrainedModel) -> torch.dtype:
        packed = next((m for m in self.modules() if isinstance(m, Packed)), None)
        return first_float.fget(self) if packed is None else packed.compute_dtype

    PreTrainedModel.dtype = property(dtype, doc=first_float.__doc__)  # type: ignore[assignment]


def origin(model: Any) -> tuple[str, str]:
    """The directory that a model was loaded from, or its hub repository and the folder there; "" where not known."""
    name = str(getattr(model, "name_or_path", "") or "")
    directory = getattr(getattr(model, "hf_quantizer", None), "directory", None)
    if directory is None:
        return name, ""
    commit = getattr(model.config, "_commit_hash", None)
    if commit in directory.parts:  # the hub's cache
        return name, "/".join(directory.parts[directory.parts.index(commit) + 1 :])
    return str(directory), ""


def mark_quantized(model: Any, bits: float) -> None:
    """Tell transformers what ``model`` holds: what ``save_pretrained`` writes, and Trainer asks for."""
    from transformers import PreTrainedModel

    report_model_dtype()
    packed = {name: m.spec for name, m in model.named_modules() if isinstance(m, PackedWeight)}
    modules = ((name, packed[name]) for name in sorted(packed, key=natural))
    stacks = [
        (f"{name}.{stack}", bank.spec)
        for name, m in sorted(model.named_modules(), key=lambda pair: natural(pair[0]))
        if isinstance(m, PackedExperts)
        for stack, bank in m.banks.items()
    ]
    config = LoftQQuantizationConfig(**quantization_config(modules, bits, stacks))
    model.config.quantization_config = config
    model.hf_quantizer = LoftQHfQuantizer(config)
    model.is_quantized, model.quantization_method = True, "loftq"
    model._weight_conversions = _renamings(model)
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            module.config._is_quantized = True  # asked for by models that would read a weight otherwise


def _renamings(model: Any) -> list[Any]:
    """What ``save_pretrained`` undoes of a model's loading: the names. Fused or split, packed tensors would be others.

    As transformers does for a model that was never loaded, without prefixes.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import PrefixChange, WeightRenaming

    used = getattr(model, "_weight_conversions", None)
    if used is None:
        found = get_model_conversion_mapping(model, add_legacy=False)
        used = [conversion for conversion in found if not isinstance(conversion, PrefixChange)]
    return [conversion for conversion in used if isinstance(conversion, WeightRenaming)]


def save_by_names_that_are_read(modeling: Any) -> None:
    """``save_pretrained`` gives packed tensors the names of the source where these are read back, else the model's.

    Not every renaming of transformers can be undone: some match the name of a weight, and miss that of its scales.
    UsageError if layers of PEFT are around those of the model.

    Args:
        modeling: the module ``transformers.modeling_utils``.
    """

    @patches(modeling, "revert_weight_conversion")
    def reverted(revert: Any, model: Any, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        holders = ((name, module) for name, module in model.named_modules() if isinstance(module, Packed))
        stored = {f"{name}.{leaf}" for name, module in holders for leaf in module._stored_dtypes}
        packed = [name for name in state_dict if name in stored]
        if not packed:
            return revert(model, state_dict)
        wrapped = next((name for name in state_dict if ".base_layer." in name), None)
        if wrapped:
            raise UsageError(
                f"{quoted(wrapped)}: PEFT's layers are around those of the model, and no load would find its weights; "
                "save what PEFT returned, or what its merge_and_unload() returns"
            )
        result = revert(model, {name: tensor for name, tensor in state_dict.items() if name not in stored})
        used, rename = getattr(model, "_weight_conversions", None), renamer(model)
        model._weight_conversions = _renamings(model)
        try:
            for name in packed:
                (source,) = revert(model, {name: torch.empty(0)})
                result[source if rename(source)[0] == name else name] = state_dict[name]
        finally:
            model._weight_conversions = used
        return dict(sorted(result.items(), key=lambda item: natural(item[0])))


# Whether a model is a part of another that is packed as a whole, or is packed by its quantizer.
_loading: ContextVar[bool] = ContextVar("loading", default=False)


def pack_from_config(modeling: Any) -> None:
    """``from_config`` of a packed configuration gives packed layers: their codes are those of the random weights.

    Args:
        modeling: the module ``transformers.modeling_utils``.
    """
    model_class = modeling.PreTrainedModel

    @patches(model_class, "from_pretrained")
    def from_pretrained(load: Any, cls: Any, *args: Any, **kwargs: Any) -> Any:
        with inside(_loading):
            return load(cls, *args, **kwargs)

    @patches(model_class, "_from_config")
    def from_config(make: Any, cls: Any, config: Any, **kwargs: Any) -> Any:
        is_part = _loading.get()
        with inside(_loading):
            model = make(cls, config, **kwargs)
        given = getattr(config, "quantization_config", None) or {}
        values = given if isinstance(given, dict) else given.to_dict()
        if not is_part and values.get("quant_method") == "loftq":
            _pack_random(model, LoftQQuantizationConfig(**values))
        return model


def unpack_what_is_tied(modeling: Any) -> None:
    """A packed table becomes dense if a user ties the head of a loaded model to it.

    Args:
        modeling: the module ``transformers.modeling_utils``.
    """

    @patches(modeling.PreTrainedModel, "tie_weights")
    def tie_weights(tie: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
        result = tie(self, *args, **kwargs)
        if not _loading.get():
            _unpack_shared_tables(self)
        return result


def _pack_random(model: Any, config: Any) -> None:
    modules = dict(model.named_modules())
    for name, (_, spec) in resolve(model, config.specs).items():
        if name not in modules:
            _pack_random_stack(model, name, spec)
            continue
        dense: Any = modules[name]
        packed = pack_like(dense, spec, device=dense.weight.device)
        if dense.weight.device.type != "meta":
            weight = oriented(kind_of(dense), dense.weight.detach().float())
            quantized, _ = backend(weight.device, spec).quantize_residual(weight, weight, spec)
            packed.load_stored(encode(quantized, spec))
        if getattr(dense, "bias", None) is not None:
            packed.bias = dense.bias
        replace_module(model, name, packed)
    mark_quantized(model, config.bits or 0)


def _pack_random_stack(model: Any, name: str, spec: QuantSpec) -> None:
    owner, _, leaf = name.rpartition(".")
    dense = model.get_parameter(name).detach()
    packed = pack_experts(model.get_submodule(owner), leaf, spec, dense.device)
    for e, weight in enumerate(dense if dense.device.type != "meta" else ()):
        weight = (weight.T if packed.banks[leaf].transposed else weight).float().contiguous()
        quantized, _ = backend(weight.device, spec).quantize_residual(weight, weight, spec)
        packed.load_expert(leaf, e, encode(quantized, spec))


def unpack_model(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """Replace every packed layer by a dense one, in ``dtype`` or that of the model around it."""
    for name, module in list(model.named_modules()):
        if isinstance(module, (LoftQLinear, LoftQEmbedding)):
            replace_module(model, name, module.to_dense(dtype or module.compute_dtype))
        elif isinstance(module, PackedExperts):
            unpack_experts(module, dtype or module.compute_dtype)
    if hasattr(model, "_weight_conversions"):
        model._weight_conversions = None  # type: ignore[assignment]  # it is saved as if it had never been packed
    return model


def forget_unpacked(model: Any) -> None:
    """Update ``model``'s quantization_config to the layers that are still packed; remove it if there are none."""
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is None or quantizer.quantization_config.quant_method != "loftq":
        return
    bits = quantizer.quantization_config.bits
    quantizer.remove_quantization_config(model)
    if has_packed(model):
        mark_quantized(model, bits)
        model.hf_quantizer.new_modules, model.hf_quantizer.directory = quantizer.new_modules, quantizer.directory
    else:
        model._weight_conversions = None


def resolve(model: nn.Module, specs: dict[str, QuantSpec]) -> dict[str, tuple[str, QuantSpec]]:
    """Runtime name -> (name in the config, spec), for the modules and stacks of experts that this model class has.

    Names that begin otherwise in this class are found as transformers finds their weights: those of a part of the
    model that was quantized, such as the vision tower of CLIP.
    """
    prefix = model.base_model_prefix
    stacks, modules = packable_stacks(model), dict(model.named_modules())
    rename = functools.cache(lambda: renamer(model))  # most checkpoints need none
    found = {}
    for name, spec in specs.items():
        candidates = chain(spellings(name, str(prefix)), _renamed(name, rename))
        runtime = next((c for c in candidates if c in modules or c in stacks), None)
        if runtime is not None:
            found[runtime] = (name, spec)
    if not found:
        raise InputError(
            f"none of the packed modules ({listed(specs, 3)}) is in {type(model).__name__}; "
            "load the checkpoint with the model class that it was made from"
        )
    odd = [f"{n} ({type(modules[n]).__name__})" for n in found if n not in stacks and not can_pack(modules[n])]
    if odd:
        raise InputError(f"quantization_config packs what is no Linear, Conv1D or Embedding: {listed(odd)}")
    return found


def _renamed(name: str, rename: Callable[[], Rename]) -> Iterator[str]:
    """What transformers makes of the name of a module's weight, or of a stack, in the files."""
    yield rename()(f"{name}.weight")[0].removesuffix(".weight")
    yield rename()(name)[0]


def _pack_empty(model: nn.Module, name: str, spec: QuantSpec, device: torch.device) -> nn.Module:
    """Empty stored tensors in the place of a weight, or of a stack of experts; the module that has them."""
    owner, _, leaf = name.rpartition(".")
    parent = model.get_submodule(owner)
    if leaf in parent._parameters:
        return pack_experts(parent, leaf, spec, device)
    packed = pack_like(model.get_submodule(name), spec, device)
    replace_module(model, name, packed)
    return packed


def _layout(model: nn.Module, name: str) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Full names of what a packed module or stack stores -> (safetensors dtype, shape)."""
    owner, _, leaf = name.rpartition(".")
    parent = model.get_submodule(owner)
    if isinstance(parent, PackedExperts) and leaf in parent.banks:
        return {f"{owner}.{stored}": kept for stored, kept in parent.banks[leaf].layout(leaf).items()}
    layout: Any = model.get_submodule(name).layout  # type: ignore[operator]
    return {f"{name}.{suffix}": kept for suffix, kept in layout().items()}


def _prefix_mapping(found: dict[str, tuple[str, QuantSpec]]) -> dict[str, str]:
    """Adapter keys -> keys of this model class, as PEFT applies it: what its names begin with is another."""
    runtime, (name, _) = next(iter(found.items()))
    if runtime == name:
        return {}
    ours, theirs = runtime.split("."), name.split(".")
    while ours and theirs and ours[-1] == theirs[-1]:
        del ours[-1], theirs[-1]
    new = "".join(f"{part}." for part in ours)
    if theirs:
        return {f"^{re.escape('.'.join(theirs))}\\.": new}
    first = sorted({re.escape(n.split(".")[0]) for n, _ in found.values()})
    return {rf"^(?=(?:{'|'.join(first)})\.)": new}


def _present(files: list[Path], model: nn.Module) -> dict[str, tuple[str, tuple[int, ...]] | None]:
    """Parameters that the files hold, by the name they will have: safetensors dtype and shape; None for converted."""
    rename = renamer(model)
    headers = [read_header(file) for file in files if file.suffix == ".safetensors"]
    tensors = {t.name: (t.dtype, t.shape) for header in headers for t in header.tensors.values()}
    split: dict[str, Any] = dict.fromkeys(split_parameters(model, tensors))
    renamed = ((*rename(tensor), header) for tensor, header in tensors.items())
    return {**split, **{name: None if converter else header for name, converter, header in renamed}}


def _check_packed(present: dict[str, Any], model: nn.Module, found: Iterable[str], directory: Path) -> None:
    """Refuse files that lack a packed tensor or hold it in another shape; transformers would only warn."""
    wrong = []
    for runtime in found:
        for name, wanted in _layout(model, runtime).items():
            got = present.get(name)
            if got != wanted:
                wrong.append(f"{name}: wanted {wanted}, found {quoted(got or 'nothing')}")
    if wrong:
        raise InputError(
            f"{directory}: the packed weights do not fit config.json: {listed(wrong)}; "
            "run `loftq verify` on the directory, or download it again"
        )


def _new_modules(present: dict[str, Any], model: Any) -> tuple[str, ...]:
    """Modules whose weights begin at random: the files lack them, or have them in another shape, of other labels."""
    tied = model.all_tied_weights_keys
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters() if name not in tied}
    held = {name: shapes.get(name) if header is None else header[1] for name, header in present.items()}
    missing = (name for name, shape in shapes.items() if held.get(name) != shape)
    return tuple(dict.fromkeys(name.rpartition(".")[0] for name in missing))
