"""What each tensor of a checkpoint is, from the model's own modules built on the meta device."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from loftq.errors import InputError, quoted
from loftq.formats import strict_json
from loftq.nn import bounds
from loftq.plan import Role, Stack

# Keys that steer transformers from inside a config file (CVE-2026-4372), with and without the underscore of their
# private twins; never taken from a checkpoint.
INTERNAL_KEYS = (
    "_attn_implementation",
    "_experts_implementation",
    "attn_implementation",
    "experts_implementation",
    "custom_pipelines",
    "auto_map",
    "trust_remote_code",
)
LARGEST_SIZE = 1 << 31
MOST_LAYERS = 4096
MOST_MODULES = 250_000  # five times as many as a model of 61 layers with 256 experts each has
READ_DIRECTLY = {"rel_embeddings": "its weight is read directly, past any adapter"}  # DeBERTa-v2


def read_config(directory: Path, *, quantized: bool = False) -> dict[str, Any]:
    """``config.json``, strictly parsed, without the keys that would run or select code.

    Args:
        quantized: whether the checkpoint may be quantized already.
    """
    path = directory / "config.json"
    if not path.is_file():
        raise InputError(f"{path}: missing; a Hugging Face model directory holds a config.json beside its weights")
    config = strict_json.load_object(path)
    method = _quantized_with(config)
    if method and not quantized:
        raise InputError(f"{path}: already quantized with {method}; start from the full-precision checkpoint")
    _check_numbers(path, config)
    bounds.check_labels(path, config)
    return without_internal_keys(config)


def without_internal_keys(config: Any) -> Any:
    """``config`` and the configs nested in it, without :data:`INTERNAL_KEYS` and anything that begins like them."""
    if isinstance(config, list):
        return [without_internal_keys(one) for one in config]
    if not isinstance(config, dict):
        return config
    return {key: without_internal_keys(one) for key, one in config.items() if not key.startswith(INTERNAL_KEYS)}


def _quantized_with(config: dict[str, Any]) -> str:
    """Method of a ``quantization_config``, also of a nested config; empty if there is none."""
    for key, value in config.items():
        if key in ("quantization_config", "compression_config") and value is not None:
            return quoted(value.get("quant_method", "an unnamed method") if isinstance(value, dict) else repr(value))
        nested = _quantized_with(value) if isinstance(value, dict) else ""
        if nested:
            return nested
    return ""


def _check_numbers(path: Path, config: dict[str, Any]) -> None:
    """Refuse sizes that no model has, also in nested configs, before a skeleton is built from them."""
    for key, value in config.items():
        if isinstance(value, dict):
            _check_numbers(path, value)
        size = key.endswith(("_size", "_dim"))
        counted = size or key.endswith(("_layers", "_heads")) or key.startswith(("num_", "n_", "d_"))
        if not counted or value is None or isinstance(value, (dict, bool)):
            continue
        largest = MOST_LAYERS if "layer" in key and not size else LARGEST_SIZE
        for number in value if isinstance(value, list) else [value]:
            if not isinstance(number, (int, float)) or not 0 <= number <= largest:
                raise InputError(f"{path}: {quoted(key)} is {quoted(number)}; wanted a number from 0 to {largest}")


def build(directory: Path, tensors: int | None = None) -> nn.Module:
    """The model of ``config.json`` on the meta device: all its modules, none of its weights.

    The class is the one named under ``architectures``, else the base model. Code shipped with the checkpoint is
    never run.

    Args:
        tensors: how many the checkpoint has; a model that they could not fill is refused unbuilt.
    """
    path = directory / "config.json"
    values = read_config(directory)
    if tensors is not None:
        bounds.check_layers(path, values, tensors)
    model_class, config_class = classes(path, values)
    most = MOST_MODULES if tensors is None else min(MOST_MODULES, bounds.most_modules(tensors))
    count = torch.nn.modules.module.register_module_module_registration_hook(_count_modules(most))
    try:
        config = config_class.from_dict(values)
        with torch.device("meta"):
            return getattr(model_class, "from_config", model_class)(config)  # AutoModel's, or the constructor
    except Exception as e:  # whatever transformers raises for a config it cannot take
        raise InputError(f"{path}: transformers cannot build this model: {first_line(e)}") from e
    finally:
        count.remove()


def classes(path: Path, values: dict[str, Any]) -> tuple[Any, Any]:
    """transformers' classes of the model (``AutoModel`` if none is named) and of the configuration in ``path``."""
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    model_type, names = values.get("model_type"), values.get("architectures")
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        raise InputError(
            f"{path}: model_type {quoted(model_type)} is not one of transformers' own; "
            "loftq does not run code that comes with a checkpoint"
        )
    named = isinstance(names, list) and names and isinstance(names[0], str)
    found = getattr(transformers, names[0], None) if named else None  # type: ignore[index]
    known = isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)
    return found if known else transformers.AutoModel, CONFIG_MAPPING[model_type]


def first_line(error: Exception) -> str:
    """What another library says, fit for a message."""
    lines = str(error).strip().splitlines()
    return quoted(lines[0] if lines else type(error).__name__, 400)


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
        runtime, converted = rename(tensor)
        if converted:
            kind = "experts" if "expert" in tensor else "other"
            keep = f"converted by transformers on loading into {quoted(runtime)}"
            result[tensor] = Role(quoted(runtime), kind, backbone=True, keep=keep)
        else:
            result[tensor] = modules.role(runtime)
    return result


def parameter_roles(model: nn.Module) -> dict[str, Role]:
    """The role of every parameter of a model that is in memory."""
    modules = _Modules(model)
    return {name: modules.role(name) for name in modules.parameters}


def adaptable(model: nn.Module) -> list[str]:
    """Names of all modules that a LoRA adapter can wrap."""
    return [name for name, module in model.named_modules() if _kind(module, "weight", None, name)[0] != "other"]


def renamer(model: nn.Module) -> Callable[[str], tuple[str, bool]]:
    """Checkpoint tensor -> the parameter it becomes, and whether transformers converts it (fuses, splits) first."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    mapping = get_model_conversion_mapping(model)  # type: ignore[arg-type]
    renamings = [m for m in mapping if isinstance(m, WeightRenaming)]
    converters = [m for m in mapping if isinstance(m, WeightConverter)]
    parameters: dict[str, Any] = dict(model.named_parameters(remove_duplicate=False))
    prefix: str = model.base_model_prefix  # type: ignore[assignment]

    def rename(tensor: str) -> tuple[str, bool]:
        name, source = rename_source_key(tensor, renamings, converters, prefix, parameters)
        if name not in parameters and tensor in parameters:
            return tensor, False
        return name, source is not None

    return rename


class _Modules:
    """What there is to know of a model's modules and parameters, looked up once."""

    def __init__(self, model: nn.Module) -> None:
        self.parameters = dict(model.named_parameters(remove_duplicate=False))
        self._modules = dict(model.named_modules())
        self._twins: dict[int, list[str]] = {}
        for name, parameter in self.parameters.items():
            self._twins.setdefault(id(parameter), []).append(name)
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
        kind, keep = _kind(module, leaf, parameter, module_name)
        backbone = module_name.startswith(self._backbone) and module is not self._head
        return Role(module_name, kind, backbone, self._stack(module_name), tied, keep)

    def _stack(self, name: str) -> Stack | None:
        """The outermost ModuleList that holds the module."""
        return stack(self._modules, name)


def stack(modules: dict[str, nn.Module], name: str) -> Stack | None:
    """The outermost ModuleList that holds the module ``name``, and which of its items does."""
    parts = name.split(".")
    for i in range(1, len(parts)):
        parent = modules[".".join(parts[:i])]
        if isinstance(parent, nn.ModuleList) and parts[i].isdecimal():
            return Stack(".".join(parts[:i]), int(parts[i]), len(parent))
    return None


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


def output_head(model: nn.Module) -> nn.Module | None:
    """The layer that gives a language model's logits, if there is one."""
    try:
        return model.get_output_embeddings()  # type: ignore[operator]
    except (NotImplementedError, AttributeError):
        return None
