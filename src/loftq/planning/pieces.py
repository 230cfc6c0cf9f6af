"""Convert, then quantize: of which rows of which source tensors a parameter of the model is made.

transformers fuses and splits some tensors as it loads them: one tensor per expert into a stack of all, one of queries,
keys and values into three. What is packed lies in the files as the model has it, so it is put together here first.
"""

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


Made = tuple[tuple[Piece, ...], ...]  # for every expert, or once, the pieces that follow each other


def sources(made: Made) -> dict[str, tuple[int, ...]]:
    """The tensors that the pieces are of, in their order, with their shapes."""
    return {piece.tensor: piece.shape for pieces in made for piece in pieces}


def of_stack(name: str, shape: tuple[int, ...]) -> Made:
    """The pieces of a stack ``(experts, rows, columns)`` that the file holds as it is: one for each expert."""
    experts, rows, _ = shape
    return tuple((Piece(name, shape, e * rows, (e + 1) * rows),) for e in range(experts))
