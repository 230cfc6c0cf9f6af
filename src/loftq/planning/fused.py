"""Matrices that other software computes as one layer, and which a budget must therefore give one width and block."""

from collections.abc import Mapping, Sequence
from itertools import product

from loftq.errors import UsageError, listed, option
from loftq.planning.budget import Choice
from loftq.planning.plan import Matrix

PARTS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))  # of vLLM's layers
SOFTWARE = ("compressed-tensors",)  # what is served as such

Curves = Mapping[str, Sequence[Choice]]


def fused(matrices: Sequence[Matrix], serve: str | None) -> list[list[str]]:
    """Modules that ``serve`` puts into one layer, of at least two each."""
    found: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for matrix in matrices if serve in SOFTWARE else ():
        parent, _, name = matrix.module.rpartition(".")
        if matrix.experts:  # transformers has one width for all
            found.setdefault(("", ("experts",)), []).append(matrix.module)
        for parts in PARTS:
            if name in parts:
                found.setdefault((parent, parts), []).append(matrix.module)
    return [modules for modules in found.values() if len(modules) > 1]


def together(curves: Curves, groups: Sequence[Sequence[str]]) -> dict[str, Sequence[Choice]]:
    """Curves in which the first module of a group stands for all: bytes and errors of the choices that all have.

    Raises: UsageError if they have none.
    """
    found = dict(curves)
    for group in groups:
        kinds = [dict.fromkeys((c.bits, c.block_size) for c in curves[module]) for module in group]
        shared = [kind for kind in kinds[0] if all(kind in others for others in kinds)]
        if not shared:
            raise UsageError(
                f"{listed(group)} become one layer of vLLM, which has one width; give them one in {option('bits')}"
            )
        ranks = sorted({c.rank for module in group for c in curves[module]})
        sums = []
        for (bits, size), rank in product(shared, ranks):
            parts = [_nearest(curves[module], bits, size, rank) for module in group]
            sums.append(Choice(bits, size, rank, sum(c.bytes for c in parts), sum(c.error for c in parts)))
        for module in group[1:]:
            del found[module]
        found[group[0]] = sums
    return found


def apart(chosen: Mapping[str, Choice], curves: Curves, groups: Sequence[Sequence[str]]) -> dict[str, Choice]:
    """The choice of every module, from those of :func:`together`, in the order of ``curves``."""
    found = dict(chosen)
    for group in groups:
        one = chosen[group[0]]
        found |= {module: _nearest(curves[module], one.bits, one.block_size, one.rank) for module in group}
    return {module: found[module] for module in curves}


def _nearest(choices: Sequence[Choice], bits: float, size: int, rank: int) -> Choice:
    """With this width and block, and the highest rank up to ``rank``; a narrow matrix has fewer ranks."""
    held = [c for c in choices if (c.bits, c.block_size) == (bits, size)]
    return max(held, key=lambda c: (c.rank <= rank, c.rank if c.rank <= rank else -c.rank))
