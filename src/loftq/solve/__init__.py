"""One matrix in, one solution out. No files, no models, no printing."""

from loftq.solve.frozen import FrozenStart, fit_adapter
from loftq.solve.loftq import Solution, check_finite, solve
from loftq.solve.pool import ordered_map

__all__ = ["FrozenStart", "Solution", "check_finite", "fit_adapter", "ordered_map", "solve"]
