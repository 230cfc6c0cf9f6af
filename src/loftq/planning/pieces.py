"""Convert, then quantize: of which rows of which source tensors a parameter of the model is made.

transformers fuses and splits some tensors as it loads them: one tensor per expert into a stack of all, one of queries,
keys and values into three. What is packed lies in the files as the model has it, so it is put together here first; what
is dense is written as the source had it, so it is taken apart again.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Piece:
    """Rows ``start:stop:step`` of a source tensor, seen as a matrix of its last axis.

    Attributes:
        shape: of the whole tensor in the file.
        transposed: its last two axes are swapped before the rows are counted.
    """

    tensor: str
    shape: tuple[int, ...]
    start: int
    stop: int
    step: int = 1
    transposed: bool = False

    @property
    def count(self) -> int:
        """How many rows it has."""
        return len(range(self.start, self.stop, self.step))


Made = tuple[tuple[Piece, ...], ...]  # for every expert, or once, the pieces that follow each other


@dataclass(frozen=True)
class PlacedPiece:
    """A piece and where it lies: in matrix ``index`` of the parameter ``name``, from row ``first`` on."""

    name: str
    index: int
    first: int
    piece: Piece


def sources(made: Made) -> dict[str, tuple[int, ...]]:
    """The tensors that the pieces are of, in their order, with their shapes."""
    return {piece.tensor: piece.shape for pieces in made for piece in pieces}


def of_stack(name: str, shape: tuple[int, ...]) -> Made:
    """The pieces of a stack ``(experts, rows, columns)`` that the file holds as it is: one for each expert."""
    experts, rows, _ = shape
    return tuple((Piece(name, shape, e * rows, (e + 1) * rows),) for e in range(experts))


def restored(made: Mapping[str, Made]) -> dict[str, tuple[PlacedPiece, ...]]:
    """Source tensor -> where its rows lie now, so that it can be put together again.

    Args:
        made: by the names of parameters. Where some rows of a source tensor lie in none of them, those that hold the
            others stay as they are, and all that share another source tensor with these.
    """
    left = dict(made)
    while True:
        parts: dict[str, list[PlacedPiece]] = {}
        for name, matrices in left.items():
            for index, pieces in enumerate(matrices):
                first = 0
                for piece in pieces:
                    parts.setdefault(piece.tensor, []).append(PlacedPiece(name, index, first, piece))
                    first += piece.count
        broken = {part.name for found in parts.values() if not _is_whole(found) for part in found}
        if not broken:
            return {tensor: tuple(found) for tensor, found in parts.items()}
        left = {name: pieces for name, pieces in left.items() if name not in broken}


def _is_whole(parts: list[PlacedPiece]) -> bool:
    """Whether they are all rows of their tensor, each once."""
    shape = parts[0].piece.shape
    columns = 1 if len(shape) == 1 else shape[-2] if parts[0].piece.transposed else shape[-1]
    seen = bytearray(math.prod(shape) // columns)
    for part in parts:
        seen[part.piece.start : part.piece.stop : part.piece.step] = b"\1" * part.piece.count
    return all(seen) and sum(part.piece.count for part in parts) == len(seen)
