"""One matrix in, one solution out. No files, no models, no printing."""

from loftq.solver.cost import memory, seconds, squares, workers_for
from loftq.solver.curve import errors_by_rank
from loftq.solver.frozen import FrozenStart, fit_adapter
from loftq.solver.loftq import Solution, check_finite, checked, solve
from loftq.solver.pool import ordered_map, solvers
