"""The original's tensors, from those of a base: fused tensors are taken apart again."""

from collections.abc import Callable, Iterator

from torch import Tensor

from loftq.formats.rows import as_rows, scattered, slices
from loftq.planning import PlacedPiece, natural, restored
from loftq.serving.base import Base, Dense

Headers = dict[str, tuple[str, tuple[int, ...]]]  # tensor -> dtype, shape
Value = Callable[[Dense, int | None], Tensor]


def as_original(base: Base, value: Value) -> tuple[Headers, Callable[[str], Iterator[Tensor]]]:
    """The original's tensors in their order, and what reads one of them, or its slices one after the other.

    Args:
        value: gives a tensor of the base, or an expert of a stack, as the model has it.
    """
    parts = restored({t.name: t.made for t in base.tensors.values() if t.made})
    done = {part.name for found in parts.values() for part in found}
    headers = {name: (base.tensors[found[0].name].dtype, found[0].piece.shape) for name, found in parts.items()}
    headers |= {t.name: (t.dtype, t.shape) for t in base.tensors.values() if t.name not in done}
    last: dict[tuple[str, int | None], Tensor] = {}  # gate and up of an expert are rows of one matrix

    def kept(name: str, expert: int | None) -> Tensor:
        if (name, expert) not in last:
            last.clear()
            last[name, expert] = value(base.tensors[name], expert)
        return last[name, expert]

    def rows(part: PlacedPiece) -> Tensor:
        expert = part.index if base.tensors[part.name].experts else None
        return as_rows(kept(part.name, expert))[part.first : part.first + part.piece.count]

    def read(name: str) -> Iterator[Tensor]:
        if name in parts:
            for found in slices([part.piece for part in parts[name]]):
                yield scattered((piece, rows(parts[name][at])) for at, piece in found)
        else:
            yield from (kept(name, expert) for expert in range(base.tensors[name].experts) or (None,))

    return {name: headers[name] for name in sorted(headers, key=natural)}, read
