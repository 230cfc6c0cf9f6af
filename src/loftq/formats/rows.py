"""Put source tensors together from rows of converted ones: the reverse of ``Checkpoint.read``."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor

if TYPE_CHECKING:
    from loftq.planning import Piece

Rows: TypeAlias = "tuple[Piece, Tensor]"  # a piece and the rows that it is


def scattered(parts: Iterable[Rows]) -> Tensor:
    """A tensor that the pieces are all rows of, of the rows' dtype."""
    parts = list(parts)
    piece, first = parts[0]
    shape = (*piece.shape[:-2], *piece.shape[:-3:-1]) if piece.transposed else piece.shape
    tensor = torch.empty(shape, dtype=first.dtype)
    rows = as_rows(tensor)
    for piece, values in parts:
        rows[piece.start : piece.stop : piece.step] = values
    return tensor.transpose(-1, -2).contiguous() if parts[0][0].transposed else tensor


def gathered(pieces: "Iterable[Piece]", tensors: dict[str, Tensor]) -> Tensor:
    """The rows of all pieces, one after the other, of tensors in memory."""
    found = []
    for piece in pieces:
        tensor = tensors[piece.tensor]
        rows = as_rows(tensor.transpose(-1, -2) if piece.transposed else tensor)
        found.append(rows[piece.start : piece.stop : piece.step])
    return torch.cat(found)


def slices(pieces: "Sequence[Piece]") -> "Iterator[list[tuple[int, Piece]]]":
    """The pieces of a tensor by slices of its first axis, where it has more than two and each lies in one of them.

    Each comes with its place among the pieces, and as a piece of the slice; slices follow each other as in the file.
    """
    shape = pieces[0].shape
    height = shape[-1] if pieces[0].transposed else shape[-2] if len(shape) > 1 else 1
    if len(shape) != 3 or any(p.start // height != (p.stop - 1) // height for p in pieces):
        yield list(enumerate(pieces))
        return
    found: list[list[tuple[int, Piece]]] = [[] for _ in range(shape[0])]
    for place, piece in enumerate(pieces):
        index = piece.start // height
        begin = index * height
        one = replace(piece, shape=shape[1:], start=piece.start - begin, stop=piece.stop - begin)
        found[index].append((place, one))
    yield from found


def as_rows(tensor: Tensor) -> Tensor:
    """Seen as a matrix of its last axis; a vector's rows are its values."""
    return tensor.reshape(-1, *tensor.shape[1:][-1:])
