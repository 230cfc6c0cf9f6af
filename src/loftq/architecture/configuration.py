"""``config.json``: read without what would run code, and held against limits before a model is built from it.

A model on the meta device has no weights, but its modules, and the lists that transformers makes of some numbers, take
time and memory: a file of a hundred bytes could ask for days of it.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from loftq.errors import InputError, quoted
from loftq.formats import strict_json
from loftq.spec import STORED

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
QUANTIZATION = ("quantization_config", "compression_config")
LARGEST_SIZE = 1 << 31
MOST_LAYERS = 4096
MOST_LABELS = 1 << 18  # transformers names each: LABEL_0, LABEL_1, …
FEW_LAYERS = 64  # which any checkpoint may have, that of a model whose layers share their weights too
FEW_MODULES, MODULES_PER_TENSOR = 2_000, 50  # a layer has some five modules for each of its tensors
MOST_MODULES = 250_000  # five times as many as a model of 61 layers with 256 experts each has


def read_config(directory: Path, *, quantized: bool = False) -> dict[str, Any]:
    """``config.json``, without the keys that would run or select code; special floats as transformers reads them.

    Args:
        quantized: whether the checkpoint may be quantized already.
    """
    path = directory / "config.json"
    if not path.is_file():
        raise InputError(f"{path}: missing; a Hugging Face model directory holds a config.json beside its weights")
    config = strict_json.load_object(path, special=True)
    found = quantization_of(config)
    if found is not None and not quantized:
        method = quoted(found.get("quant_method", "an unnamed method") if isinstance(found, dict) else repr(found))
        raise InputError(f"{path}: already quantized with {method}; start from the full-precision checkpoint")
    _check_sizes(path, config)
    names = config.get("architectures")
    if not (isinstance(names, list) and names and all(isinstance(name, str) for name in names)):
        config.pop("architectures", None)  # as transformers of late; some releases refuse them
    return without_internal_keys(config)


def without_internal_keys(config: Any) -> Any:
    """``config`` and the configs nested in it, without :data:`INTERNAL_KEYS` and anything that begins like them."""
    if isinstance(config, list):
        return [without_internal_keys(one) for one in config]
    if not isinstance(config, dict):
        return config
    return {key: without_internal_keys(one) for key, one in config.items() if not key.startswith(INTERNAL_KEYS)}


def quantization_of(config: dict[str, Any]) -> Any:
    """The ``quantization_config`` of a configuration, also of a nested one; None if there is none."""
    for key, value in config.items():
        if key in QUANTIZATION and value is not None:
            return value
        nested = quantization_of(value) if isinstance(value, dict) else None
        if nested is not None:
            return nested
    return None


def without_quantization(config: dict[str, Any]) -> dict[str, Any]:
    """``config`` and the configs nested in it, without what :func:`quantization_of` finds."""
    kept = {key: value for key, value in config.items() if key not in QUANTIZATION}
    return {key: without_quantization(value) if isinstance(value, dict) else value for key, value in kept.items()}


def dtype_of(config: dict[str, Any]) -> str:
    """safetensors' name of the dtype that a model is used in by its configuration, or by that of its language model."""
    nested = config.get("text_config")
    configs = [config, nested if isinstance(nested, dict) else {}]
    names = [c.get(key) for c in configs for key in ("dtype", "torch_dtype")]
    return next((STORED[name] for name in names if isinstance(name, str) and name in STORED), STORED["bfloat16"])


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
    found = getattr(transformers, names[0], None) if names else None
    known = isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)
    return found if known else transformers.AutoModel, CONFIG_MAPPING[model_type]


def check_layers(path: Path, config: dict[str, Any], tensors: int) -> None:
    """InputError for more layers than the ``tensors`` of the checkpoint could be of."""
    most = max(FEW_LAYERS, tensors)
    for key, value in _values(config):
        counts = key.endswith(("_layers", "_layer")) and not key.startswith("max_")  # max_window_layers makes none
        if counts and _is_number(value) and value > most:
            raise InputError(
                f"{path}: {quoted(key)} is {quoted(value, 40)}, but the checkpoint has {tensors} tensors; "
                "one of the two was changed, or fetched in part"
            )


def most_modules(tensors: int | None) -> int:
    """How many modules a model may have whose checkpoint has so many tensors; None if that is not known."""
    return MOST_MODULES if tensors is None else min(MOST_MODULES, FEW_MODULES + MODULES_PER_TENSOR * tensors)


def odd_size(config: dict[str, Any]) -> str | None:
    """What is said of the first size that is negative or no number at all; None if all are sizes."""
    odd = (size for size in _sizes(config) if not isinstance(size[1], (int, float)) or size[1] < 0)
    return next((_not_a_size(*size) for size in odd), None)


def _check_sizes(path: Path, config: dict[str, Any]) -> None:
    """InputError for sizes that no model has, or more labels than any classifier; also in nested configurations."""
    for key, value, largest in _sizes(config):
        if isinstance(value, (int, float)) and not value <= largest:  # NaN is no size either
            raise InputError(f"{path}: {_not_a_size(key, value, largest)}")
    for key, value in _values(config):
        if key == "num_labels" and _is_number(value) and value > MOST_LABELS:
            raise InputError(f"{path}: num_labels is {quoted(value, 40)}; wanted a number up to {MOST_LABELS}")


def _not_a_size(key: str, value: Any, largest: int) -> str:
    shown = repr(value) if isinstance(value, str) else value
    return f"{quoted(key)} is {quoted(shown)}; wanted a number from 0 to {largest}"


def _sizes(config: dict[str, Any]) -> Iterator[tuple[str, Any, int]]:
    """Everything under a key that counts: key, value, largest number that is taken.

    Not all of it is a size: there are lists of the layers' kinds, and -1 for no limit.
    """
    for key, value in _values(config):
        size = key.endswith(("_size", "_dim"))
        counted = size or key.endswith(("_layers", "_heads")) or key.startswith(("num_", "n_", "d_"))
        if counted and value is not None and not isinstance(value, bool):
            yield key, value, MOST_LAYERS if "layer" in key and not size else LARGEST_SIZE


def _values(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Every value of a configuration, of those nested in it, and of lists, with the key that it stands under."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _values(inner, name)
    elif isinstance(value, list):
        for inner in value:
            yield from _values(inner, key)
    else:
        yield key, value


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
