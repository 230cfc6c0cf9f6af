"""Statistics of a stack of experts: each expert gets its own tokens, and some get very few.

Of every expert there are its own second moments, whole or their diagonal, and of all together their mean. What the
solver gets of an expert that t tokens were routed to, of n input features, is

    H <- (1 - a) H + a M,    a = n / (n + t)

as if n tokens of the mean M had come too: an expert without a token has M alone. The features of the hidden states are
the same for all experts, so M is their mean. Those inside an expert are its own, and only their size can be compared:
there M is a multiple of the identity. Where whole moments of every expert would be too many numbers, their diagonals
are kept, and H has the correlations of M: ``D M D``, D diagonal.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from loftq.errors import NumericalError, quoted
from loftq.numerics import Metric, Moments, towards_diagonal

MOST = 1 << 27  # numbers of whole moments of a stack: some more are those of the widest matrix of a 7B Llama
PARTS = ("fit", "held")
Read = Callable[[str, int | None], Tensor]  # a tensor by its name, or a slice of its first axis


@dataclass(frozen=True)
class StackGroup:
    """The statistics of a stack as they were measured.

    Attributes:
        stack: name of its Parameter.
        parts: tensors by name, ``PART.columns``, ``PART.mean`` and, of kind ``fisher``, ``PART.rows``.
        tokens: of every expert, for each part.
    """

    stack: str
    parts: dict[str, Tensor]
    tokens: dict[str, list[int]]

    @property
    def modules(self) -> tuple[str, ...]:
        return members_of(self.stack, len(self.tokens["fit"]))

    def checked(self, problem: str) -> "StackGroup":
        """The group itself. NumericalError, with the problem, for moments that are not finite."""
        if not all(tensor.isfinite().all() for tensor in self.parts.values()):
            raise NumericalError(f"{quoted(self.stack)}: {problem}")
        return self

    def tensors(self) -> dict[str, Tensor]:
        """What is stored, by name."""
        return {f"{self.stack}.{name}": tensor for name, tensor in self.parts.items()}

    def row(self, file: str) -> dict[str, Any]:
        """What ``statistics.json`` says of the group."""
        fit, held = (self.tokens[part] for part in PARTS)
        sizes = {"width": self.parts["fit.columns"].shape[1], "tokens": sum(fit), "held_tokens": sum(held)}
        return {"file": file, "modules": [self.stack], **sizes, "experts": {"tokens": fit, "held_tokens": held}}

    def read(self, name: str, index: int | None) -> Tensor:
        tensor = self.tensors()[name]
        return tensor if index is None else tensor[index]


def members_of(stack: str, count: int) -> tuple[str, ...]:
    """How the experts of a stack are called."""
    return tuple(f"{stack}.{e}" for e in range(count))


def names(row: Mapping[str, Any]) -> list[str]:
    """The modules that a row of ``statistics.json`` tells of."""
    if "experts" not in row:
        return list(row["modules"])
    return list(members_of(row["modules"][0], len(row["experts"]["tokens"])))


def tensors_wanted(row: Mapping[str, Any], kind: str, found: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """The tensors of a stack, and the shapes that they may have."""
    count, n, stack = len(row["experts"]["tokens"]), row["width"], row["modules"][0]
    wanted: dict[str, Any] = {}
    for part in PARTS if row["held_tokens"] else PARTS[:1]:
        whole = [(count, n, n)] if kind == "full" else []
        wanted[f"{stack}.{part}.columns"] = [(count, n), *whole]
        wanted[f"{stack}.{part}.mean"] = [(1,), (n, n) if kind == "full" else (n,)]
        if kind == "fisher":
            rows = found.get(f"{stack}.{part}.rows", ())
            wanted[f"{stack}.{part}.rows"] = [(count, *rows[1:2])]
    return wanted


def moments(row: Mapping[str, Any], kind: str, read: Read, expert: int) -> Moments:
    """The moments of one expert, blended with the layer's mean, for the solver."""
    tokens = row["experts"]["tokens"]
    fit = _metric(row, kind, read, "fit", expert)
    held = _metric(row, kind, read, "held", expert) if row["held_tokens"] else fit
    return Moments(fit, held, tokens[expert])


def _metric(row: Mapping[str, Any], kind: str, read: Read, part: str, expert: int) -> Metric:
    stem, tokens = f"{row['modules'][0]}.{part}", row["experts"]["tokens" if part == "fit" else "held_tokens"]
    own, mean = read(f"{stem}.columns", expert), read(f"{stem}.mean", None)
    inside = mean.numel() == 1
    if part == "fit" and mean.ndim == 2:
        mean = towards_diagonal(mean, sum(tokens))
    share = len(own) / (len(own) + tokens[expert])
    columns = _blended(own, mean, share)
    if kind != "fisher":
        return Metric(columns)
    rows, counts = read(f"{stem}.rows", None), torch.tensor(tokens)[:, None]
    common = (rows * counts).sum(0) / counts.sum()
    return Metric(columns, _blended(rows[expert], common if inside else common.mean(), share))


def _blended(own: Tensor, mean: Tensor, share: float) -> Tensor:
    """``(1 - share) own + share mean``; a single number is that of a diagonal."""
    if mean.numel() == 1:
        mixed = (1 - share) * own
        (mixed.diagonal() if mixed.ndim == 2 else mixed).add_(share * mean.reshape(()))
        return mixed
    if own.ndim == mean.ndim:
        return torch.lerp(own, mean, share)
    squares = mean.diagonal()
    size = (torch.lerp(own, squares, share) / squares.clamp(min=torch.finfo(mean.dtype).tiny)).sqrt()
    return size[:, None] * mean * size
