"""One matrix in, one solution out. No files, no models, no printing."""

from loftq.solve.curve import errors_by_rank
from loftq.solve.frozen import FrozenStart, fit_adapter
from loftq.solve.loftq import Solution, check_finite, checked, solve
from loftq.solve.pool import ordered_map

__all__ = [
    "FrozenStart",
    "Solution",
    "check_finite",
    "checked",
    "errors_by_rank",
    "fit_adapter",
    "ordered_map",
    "solve",
]
