"""Limits for a configuration before a model is built from it: no more than its checkpoint could fill.

A model on the meta device has no weights, but its modules, and the lists that transformers makes of some numbers, take
time and memory: a file of a hundred bytes could ask for days of it.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from loftq.errors import InputError, quoted

MOST_LABELS = 1 << 18  # transformers names each: LABEL_0, LABEL_1, …
FEW_LAYERS = 64  # which any checkpoint may have, that of a model whose layers share their weights too
FEW_MODULES, MODULES_PER_TENSOR = 2_000, 50  # a layer has some five modules for each of its tensors


def check_labels(path: Path, config: dict[str, Any]) -> None:
    """InputError for more labels than any classifier has, also in nested configurations."""
    for key, value in _numbers(config):
        if key == "num_labels" and value > MOST_LABELS:
            raise InputError(f"{path}: num_labels is {quoted(value, 40)}; wanted a number up to {MOST_LABELS}")


def check_layers(path: Path, config: dict[str, Any], tensors: int) -> None:
    """InputError for more layers than the ``tensors`` of the checkpoint could be of."""
    most = max(FEW_LAYERS, tensors)
    for key, value in _numbers(config):
        if key.endswith(("_layers", "_layer")) and value > most:
            raise InputError(
                f"{path}: {quoted(key)} is {quoted(value, 40)}, but the checkpoint has {tensors} tensors; "
                "one of the two was changed, or fetched in part"
            )


def most_modules(tensors: int) -> int:
    """How many modules a model may have whose checkpoint has so many tensors."""
    return FEW_MODULES + MODULES_PER_TENSOR * tensors


def _numbers(value: Any, key: str = "") -> Iterator[tuple[str, int | float]]:
    """Every number of a configuration with its key, in depth."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _numbers(inner, name)
    elif isinstance(value, list):
        for inner in value:
            yield from _numbers(inner, key)
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield key, value
