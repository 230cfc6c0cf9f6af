"""``loftq export --to lora-for-original``: what training added to the initialization, as an adapter of the original.

An adapter ``B'A'`` of a quantized base makes up for the base's error, and adds it to the original. Training began at
the initialization ``B₀A₀``, for which ``Q + s·B₀A₀ ≈ W``. So ``W + s·(B'A' - B₀A₀)`` is nearly the model that was
trained, and the difference a LoRA adapter of twice the rank: ``A = [A'; A₀]``, ``B = s · [B', -B₀]``, with scaling 1.
"""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from loftq.adapters.bases import WEIGHTS
from loftq.checkpoint.assemble import ADAPTER
from loftq.checkpoint.produce import Files
from loftq.errors import UsageError, option
from loftq.formats import fsio
from loftq.formats.config import FOR_ORIGINAL
from loftq.formats.tensorfile import Entry, encode_header, tensor_bytes
from loftq.serving.adapter import CONFIG, Adapter, open_adapter, own_files
from loftq.serving.base import Base
from loftq.serving.merge import Begin
from loftq.serving.output import copy


def check(base: Base, adapter: Adapter | None) -> tuple[Adapter, Adapter]:
    """The adapter that was trained, and the one that it began as. UsageError or InputError if this is not possible."""
    if adapter is None or adapter.directory.resolve() == (base.directory / ADAPTER).resolve():
        raise UsageError(f"{option('to', FOR_ORIGINAL)} writes what training added; give {option('adapter', 'RUN')}")
    adapter.refuse_more_than_linear("the difference of two adapters")
    return adapter, open_adapter(base.directory / ADAPTER, base)


def write(place: Path, base: Base, pair: tuple[Adapter, Adapter], begin: Begin) -> Files:
    """A PEFT adapter."""
    tuned, start = pair
    advance = begin(len(tuned.factors))
    ranks = {name: factors.rank + _rank(start, name) for name, factors in tuned.factors.items()}
    modules = {name: base.tensors[name].runtime.removesuffix(".weight") for name in ranks}
    entries = []
    for name, module in modules.items():
        rows, columns = base.tensors[name].shape
        if base.tensors[name].kind == "conv1d":
            rows, columns = columns, rows
        for part, shape in (("A", (ranks[name], columns)), ("B", (rows, ranks[name]))):
            entries.append(Entry(f"base_model.model.{module}.lora_{part}.weight", "F32", shape))

    def contents() -> Iterator[bytes | memoryview]:
        yield encode_header(entries, {"format": "pt"})
        for name in modules:
            a, b = difference(tuned, start, name)
            yield tensor_bytes(a)
            yield tensor_bytes(b)
            advance()

    most = max(ranks.values())
    patterns = {modules[name]: rank for name, rank in ranks.items() if rank != most}
    config = {
        **tuned.config,
        "r": most,
        "lora_alpha": most,
        "rank_pattern": patterns,
        "alpha_pattern": patterns,
        "use_rslora": False,
        "init_lora_weights": True,
        "fan_in_fan_out": any(base.tensors[name].kind == "conv1d" for name in modules),
        "base_model_name_or_path": None,
    }
    return copy(own_files(tuned), tuned.directory, place) | {
        CONFIG: fsio.write_json(place / CONFIG, config),
        WEIGHTS[0]: fsio.write_atomic(place / WEIGHTS[0], contents()),
    }


def commands() -> list[str]:
    """How PEFT is told to load it, from inside the directory."""
    return ["python -c \"from peft import PeftModel; PeftModel.from_pretrained(ORIGINAL, '.')\""]


def _rank(start: Adapter, name: str) -> int:
    return start.factors[name].rank if name in start.factors else 0


def difference(tuned: Adapter, start: Adapter, name: str) -> tuple[Tensor, Tensor]:
    """``A (2r, in)`` and ``B (out, 2r)`` of one weight: their product is ``s·B'A' - s·B₀A₀``."""
    b, a, s = tuned.product(name)
    if name not in start.factors:
        return a, s * b
    old_b, old_a, old = start.product(name)
    return torch.cat([a, old_a]), torch.cat([s * b, -old * old_b], 1)
