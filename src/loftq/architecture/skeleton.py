"""What each tensor of a checkpoint is, from the model's own modules built on the meta device."""

import copy
import functools
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from loftq.architecture.adapter import refusal
from loftq.architecture.configuration import (
    check_layers,
    classes,
    most_modules,
    odd_size,
    read_config,
    without_quantization,
)
from loftq.architecture.experts import STACKS, stack_kind
from loftq.architecture.kinds import kind_of
from loftq.architecture.reads import holders, readers
from loftq.errors import InputError, one_line, quoted
from loftq.planning import Matrix, Role, Stack
from loftq.spec import SUFFIXES

PACKABLE = ("linear", "conv1d", "embedding", *STACKS)
RENAMED = "transformers would not find its packed tensors: it renames what it loads"
Rename = Callable[[str], tuple[str, str | None]]


def build(directory: Path, tensors: int | None = None, *, quantized: bool = False) -> nn.Module:
    """The model of ``config.json`` on the meta device: all its modules, none of its weights.

    The class is the one named under ``architectures``, else the base model. Code shipped with the checkpoint is
    never run.

    Args:
        tensors: how many the checkpoint has; a model that they could not fill is refused unbuilt.
        quantized: whether the checkpoint may be quantized; the model is the dense one that it stands for.
    """
    path = directory / "config.json"
    values = without_quantization(read_config(directory, quantized=quantized))
    if tensors is not None:
        check_layers(path, values, tensors)
    model_class, config_class = classes(path, values)
    limit = _count_modules(most_modules(tensors))
    count = torch.nn.modules.module.register_module_module_registration_hook(limit)
    try:
        config = config_class.from_dict(values)
        with torch.device("meta"):
            return getattr(model_class, "from_config", model_class)(config)  # AutoModel's, or the constructor
    except Exception as e:  # whatever transformers raises for a config it cannot take
        odd = odd_size(values)
        reason = f"{odd}; " if odd else ""
        raise InputError(f"{path}: {reason}transformers cannot build this model: {one_line(e)}") from e
    finally:
        count.remove()


def spellings(name: str, prefix: str) -> tuple[str, str, str]:
    """A module's name as another head over the same base model may have it: as it is, with the prefix, without."""
    return name, f"{prefix}.{name}", name.removeprefix(f"{prefix}.")


def _count_modules(most: int) -> Callable[[nn.Module, str, nn.Module | None], None]:
    """A hook that stops a skeleton without end: experts and layers are multiplied in more keys than can be listed."""
    registered = 0

    def count(module: nn.Module, name: str, submodule: nn.Module | None) -> None:
        nonlocal registered
        registered += 1
        if registered > most:
            raise InputError(f"more than {most} modules")

    return count


def roles(model: nn.Module, tensor_names: Iterable[str]) -> dict[str, Role]:
    """The role of every checkpoint tensor, by the names under which transformers would load it."""
    rename, modules = renamer(model), _Modules(model)
    result = {}
    for tensor in tensor_names:
        runtime, pattern = rename(tensor)
        role = modules.converted(tensor, runtime) if pattern else modules.role(runtime)
        if role.kind in PACKABLE and not role.keep and not finds_packed(rename, tensor, role):
            role = replace(role, keep=RENAMED)
        result[tensor] = role
    return result


def finds_packed(rename: Rename, tensor: str, role: Role) -> bool:
    """Whether all that a packed matrix is written as, in the place of ``tensor``, becomes the layer's on loading."""
    parts = (suffix.removeprefix("weight") for suffix in SUFFIXES)
    return all(rename(tensor + part) == (parameter_of(role) + part, None) for part in parts)


def parameter_of(role: Role | Matrix) -> str:
    """The Parameter that a matrix or a stack is."""
    return role.module if role.kind in STACKS else f"{role.module}.weight"


def parameter_roles(model: nn.Module) -> dict[str, Role]:
    """The role of every parameter of a model that is in memory; one that has several names counts once, as in files."""
    modules = _Modules(model)
    return {name: modules.role(name) for name, _ in model.named_parameters()}


def adaptable(model: nn.Module) -> list[str]:
    """Names of all modules that a LoRA adapter can wrap."""
    return [name for name, module in model.named_modules() if _layer(module)[0]]


def converters(model: nn.Module) -> tuple[list[Any], list[Any]]:
    """transformers' renamings and converters (which fuse, split, …) of the tensors that a model is loaded from."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming

    mapping = get_model_conversion_mapping(model)  # type: ignore[arg-type]
    renamings = [m for m in mapping if isinstance(m, WeightRenaming)]
    return renamings, [m for m in mapping if isinstance(m, WeightConverter)]


def renamer(model: nn.Module, mapping: tuple[list[Any], list[Any]] | None = None, *, as_model: bool = True) -> Rename:
    """Checkpoint tensor -> the parameter it becomes, and the pattern of the converter that it goes through first.

    Args:
        mapping: of :func:`converters`, if these are at hand.
        as_model: whether tensors have the shapes of the model's. Some converters leave such as they are, and none is
            named then.
    """
    from transformers.core_model_loading import rename_source_key

    renamings, converting = mapping or converters(model)
    layers = [f"{n}.weight" for n, module in model.named_modules(remove_duplicate=False) if _layer(module)[0]]
    stacks = [n for n, p in model.named_parameters(remove_duplicate=False) if p.ndim == 3]
    packed = (name + suffix.removeprefix("weight") for name in (*layers, *stacks) for suffix in SUFFIXES)
    parameters: dict[str, Any] = dict.fromkeys(packed, True) | dict(model.named_parameters(remove_duplicate=False))
    prefix: str = model.base_model_prefix  # type: ignore[assignment]
    by_pattern = {pattern: converter for converter in converting for pattern in converter.source_patterns}

    def rename(tensor: str) -> tuple[str, str | None]:
        name, pattern = rename_source_key(tensor, renamings, converting, prefix, parameters)
        if name not in parameters and tensor in parameters:
            return tensor, None
        if as_model and pattern and name == tensor and _is_left(model, by_pattern[pattern], name, pattern):
            return name, None
        return name, pattern

    return rename


def _is_left(model: Any, converter: Any, name: str, pattern: str) -> bool:
    """Whether a converter, which is run, leaves a tensor of the model's own shape as it is."""
    trial = copy.deepcopy(converter)
    try:
        tensor = model.get_parameter(name).data
        trial.add_tensor(name, name, pattern, tensor)
        return trial.convert(name, model=model, config=model.config).get(name) is tensor
    except Exception:  # whatever an operation raises for one tensor of several, or for no parameter
        return False


class _Modules:
    """What there is to know of a model's modules and parameters, looked up once."""

    def __init__(self, model: nn.Module) -> None:
        self.parameters = dict(model.named_parameters(remove_duplicate=False))
        self._modules = dict(model.named_modules(remove_duplicate=False))
        self._twins: dict[int, list[str]] = {}
        for name, parameter in self.parameters.items():
            self._twins.setdefault(id(parameter), []).append(name)
        self._read, self._held = readers(model), holders(model)
        self._refusal = functools.cache(functools.partial(refusal, model))
        self._head = output_head(model)
        prefix: str = model.base_model_prefix  # type: ignore[assignment]
        self._backbone = f"{prefix}." if prefix in dict(model.named_children()) else ""

    def role(self, name: str) -> Role:
        """The role of a parameter; an empty one if the model has none of this name."""
        if name not in self.parameters:
            return Role()
        module_name, _, leaf = name.rpartition(".")
        module, parameter = self._modules[module_name], self.parameters[name]
        tied = tuple(n for n in self._twins[id(parameter)] if n != name)
        place = stack(self._modules, module_name)
        kind, keep = _layer(module) if leaf == "weight" else ("", "")
        if not kind:
            kind, keep = stack_kind(module, name, parameter)
        if kind and not keep:
            keep = self._reason(module_name)
        backbone = module_name.startswith(self._backbone) and module is not self._head
        owner = self._modules[module_name.partition(".parametrizations.")[0]]
        if kind in STACKS:
            return Role(name, kind, backbone, place, tied, keep, order=list(module._parameters).index(leaf))
        return Role(module_name, kind or _bare(owner, leaf, parameter, place), backbone, place, tied, keep)

    def converted(self, tensor: str, runtime: str) -> Role:
        """The role of a tensor that transformers fuses with others, or splits, into ``runtime``."""
        role = self.role(runtime)
        if role.kind == "other":
            place = stack(self._modules, runtime)
            role = Role(quoted(runtime), "parameter" if place else "other", backbone=True, stack=place)
        kind = "experts" if "expert" in tensor else role.kind
        return replace(role, kind=kind, keep=f"converted by transformers on loading into {quoted(runtime)}")

    def _reason(self, name: str) -> str:
        """Why a layer that could be packed has to stay dense."""
        if name in self._read:
            return f"{self._read[name]} reads its weight directly, past any packed layer or adapter"
        if name in self._held:
            return f"{self._held[name]} holds it in a list of its own, past any packed layer or adapter"
        return self._refusal(name.rpartition(".")[2])


def stack(modules: dict[str, nn.Module], name: str) -> Stack | None:
    """The outermost ModuleList that holds the module ``name``, and which of its items does."""
    parts = name.split(".")
    for i in range(1, len(parts)):
        parent = modules.get(".".join(parts[:i]))
        if isinstance(parent, nn.ModuleList) and parts[i].isdecimal():
            return Stack(".".join(parts[:i]), int(parts[i]), len(parent))
    return None


def _layer(module: nn.Module) -> tuple[str, str]:
    """Kind of a layer that an adapter fits, else empty; and a reason to keep it if the module has one."""
    kind, odd = kind_of(module), ""
    if isinstance(module, nn.Embedding) and not (
        type(module).forward is nn.Embedding.forward and module.max_norm is None
    ):
        odd = f"{type(module).__name__} computes more than a lookup"
    if isinstance(module, nn.Linear) and not is_product(module):
        odd = f"{type(module).__name__} computes more than a product"
    return kind, odd


def _bare(module: nn.Module, leaf: str, parameter: nn.Parameter, place: Stack | None) -> str:
    """Kind of a parameter that no layer is there for: a matrix of the model's layers, or anything else."""
    classes = " ".join(cls.__name__ for cls in type(module).__mro__ if issubclass(cls, nn.Module)).lower()
    aside = leaf.endswith("bias") or any(word in classes for word in ("embedding", "norm", "convnd"))
    in_layers = place is not None or isinstance(module, nn.MultiheadAttention)
    return "parameter" if in_layers and parameter.ndim > 1 and not aside else "other"


def is_product(module: nn.Linear) -> bool:
    """Whether ``module`` computes ``x W^T + b``; a subclass with its own ``forward`` is tried on random numbers."""
    if type(module).forward is nn.Linear.forward:
        return True
    settings = {name for name in vars(module) if not name.startswith("_")}
    return settings <= {"training", "in_features", "out_features"} and _computes_products(type(module))


@functools.cache
def _computes_products(cls: type[nn.Linear]) -> bool:
    draw = torch.Generator().manual_seed(0)
    for shape, bias in (((3, 6), True), ((2, 3, 6), True), ((2, 3, 6), False), ((6,), False)):
        probe = cls.__new__(cls)
        nn.Linear.__init__(probe, 6, 5, bias, device="cpu", dtype=torch.float64)
        x = torch.randn(shape, generator=draw, dtype=torch.float64)
        for parameter in probe.parameters():
            parameter.data = torch.randn(parameter.shape, generator=draw, dtype=torch.float64)
        for mode in (True, False):
            try:
                got = probe.train(mode)(x)
            except Exception:  # whatever a forward that asks for more raises
                return False
            wanted = nn.functional.linear(x, probe.weight, probe.bias)
            if not isinstance(got, torch.Tensor) or got.shape != wanted.shape or not torch.allclose(got, wanted):
                return False
    return True


def output_head(model: nn.Module) -> nn.Module | None:
    """The layer that gives a language model's logits, if there is one."""
    try:
        return model.get_output_embeddings()  # type: ignore[operator]
    except (NotImplementedError, AttributeError):
        return None
