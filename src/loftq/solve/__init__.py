"""One matrix in, one solution out. No files, no models, no printing."""

from loftq.solve.curve import errors_by_rank
from loftq.solve.loftq import Solution, check_finite, solve
from loftq.solve.pool import ordered_map

__all__ = ["Solution", "check_finite", "errors_by_rank", "ordered_map", "solve"]
