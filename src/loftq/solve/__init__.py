"""One matrix in, one solution out. No files, no models, no printing."""

from loftq.solve.loftq import Solution, check_finite, solve
from loftq.solve.pool import ordered_map

__all__ = ["Solution", "check_finite", "ordered_map", "solve"]
