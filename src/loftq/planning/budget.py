"""Bits, block and rank of every matrix under a limit of bytes: the least error in all. Plain numbers, no weights.

A multiple-choice knapsack: of every matrix one choice, the sum of the bytes at most the limit, the sum of the errors
as small as it gets. The greedy solver starts from the cheapest choices and takes, again and again, the jump with the
most error gone per byte that still fits. So it goes along the lower convex hulls of all matrices and fills what is
left; a larger limit never gives it a larger error. The exact solver is a mixed-integer program (SciPy's HiGHS).
"""

import contextlib
import ctypes
import heapq
import importlib.util
import math
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from loftq.errors import UsageError, option, quoted

UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}
GAP = 1e-6  # relative distance from the optimum at which the exact solver stops


@dataclass(frozen=True)
class Choice:
    """One way to store a matrix: what it takes, adapter included, and what squared, weighted error it leaves."""

    bits: float
    block_size: int
    rank: int
    bytes: int
    error: float


@dataclass(frozen=True)
class Allocation:
    """A choice for every matrix, by name, and the sums of their bytes and errors."""

    chosen: dict[str, Choice]
    bytes: int
    error: float


@dataclass(frozen=True)
class Budget:
    """What may be spent: an average of stored ``bits`` per quantized weight, or ``bytes`` in all; the other is None."""

    bits: float | None = None
    bytes: int | None = None


def parse_budget(text: str) -> Budget:
    """``2.5`` is an average of bits, ``300MB`` a number of bytes. UsageError for anything else."""
    if text[-2:].upper() in UNITS:
        return Budget(bytes=parse_size(option("budget"), text))
    try:
        bits = float(text)
    except ValueError:
        bits = math.nan
    if not 0 < bits <= 16:
        raise UsageError(
            f"{option('budget')}: {quoted(text)} is neither an average of bits per weight, such as 2.5 (above 0, "
            "at most 16), nor a size, such as 300MB"
        )
    return Budget(bits=bits)


def parse_size(what: str, text: str) -> int:
    """Bytes of a size such as ``500MB`` or ``2GB``. UsageError, naming ``what`` it is of, for anything else."""
    number, unit = text[:-2], text[-2:].upper()
    plain = unit in UNITS and number.replace(".", "", 1).isdecimal()
    size = float(number) * UNITS[unit] if plain else 0.0
    if not 1 <= size < math.inf:
        raise UsageError(f"{what}: {quoted(repr(text))} is not a size like 500MB or 2GB")
    return int(size)


def allocate(curves: Mapping[str, Sequence[Choice]], limit: int, method: str = "greedy") -> Allocation:
    """The choices that leave the least error within ``limit`` bytes.

    Args:
        curves: name -> what there is to choose from, in any order.
        method: ``greedy``, or ``milp`` for the optimum (to one part in a million).

    Raises: UsageError if even the cheapest choices take more than the limit, naming what they take.
    """
    check_budget_solver(method)
    useful = _useful_of(curves)
    least = sum(choices[0].bytes for choices in useful.values())
    if least > limit:
        raise UsageError(f"a limit of {limit:,} bytes is too small: the least possible is {least:,} bytes")
    found = {name: choices[0] for name, choices in useful.items()}
    found.update(_jumps(useful, limit - least))
    greedy = _sum(found)
    if method == "greedy":
        return greedy
    return min(greedy, _sum(_exact(useful, limit) or found), key=lambda allocation: allocation.error)


def check_budget_solver(method: str) -> None:
    """UsageError for ``milp`` without SciPy."""
    if method == "milp" and importlib.util.find_spec("scipy") is None:
        raise UsageError(f"{option('budget_solver', 'milp')} needs SciPy: pip install 'loftq[budget]'")


def frontier(curves: Mapping[str, Sequence[Choice]]) -> list[tuple[int, float]]:
    """``(bytes, error)`` after every jump of the greedy solver, from the cheapest choices to the best."""
    useful = _useful_of(curves)
    chosen = {name: choices[0] for name, choices in useful.items()}
    size, error = sum(c.bytes for c in chosen.values()), math.fsum(c.error for c in chosen.values())
    path = [(size, error)]
    for name, choice in _jumps(useful, math.inf):
        size, error = size + choice.bytes - chosen[name].bytes, error + choice.error - chosen[name].error
        chosen[name] = choice
        path.append((size, error))
    return path


def _useful_of(curves: Mapping[str, Sequence[Choice]]) -> dict[str, list[Choice]]:
    """By name, in the order of the names: where two jumps are alike, it decides."""
    return {name: _useful(curves[name]) for name in sorted(curves)}


def _useful(choices: Sequence[Choice]) -> list[Choice]:
    """Choices by rising bytes, each with less error than all that take no more."""
    kept: list[Choice] = []
    for choice in sorted(choices, key=lambda c: (c.bytes, c.error)):
        if not kept or choice.error < kept[-1].error:
            kept.append(choice)
    return kept


def _jumps(useful: Mapping[str, list[Choice]], left: float) -> Iterator[tuple[str, Choice]]:
    """The greedy solver's jumps, ``(name, choice)``, while ``left`` bytes last."""
    names = list(useful)
    waiting: list[tuple[float, int, int, int]] = []  # minus the gain per byte, matrix, choice jumped from and to

    def push(matrix: int, at: int) -> None:
        choices = useful[names[matrix]]
        here = choices[at]
        fitting = (to for to in range(at + 1, len(choices)) if choices[to].bytes - here.bytes <= left)
        slopes = [((choices[to].error - here.error) / (choices[to].bytes - here.bytes), to) for to in fitting]
        if slopes:
            slope, to = min(slopes)
            heapq.heappush(waiting, (slope, matrix, at, to))

    for matrix in range(len(names)):
        push(matrix, 0)
    while waiting:  # a jump that waits may not fit any more, but none of its matrix that fits has more gain
        _, matrix, at, to = heapq.heappop(waiting)
        choices = useful[names[matrix]]
        size = choices[to].bytes - choices[at].bytes
        if size > left:
            push(matrix, at)
            continue
        left -= size
        yield names[matrix], choices[to]
        push(matrix, to)


def _exact(useful: Mapping[str, list[Choice]], limit: int) -> dict[str, Choice] | None:
    """The mixed-integer program: a binary for every choice, one of each matrix is 1, the bytes fit. None: no luck."""
    import numpy as np
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array

    flat = [(name, choice) for name, choices in useful.items() for choice in choices]
    matrix = {name: i for i, name in enumerate(useful)}
    entries = (np.ones(len(flat)), ([matrix[name] for name, _ in flat], range(len(flat))))
    errors = np.array([choice.error for _, choice in flat])
    sizes = np.array([choice.bytes for _, choice in flat], dtype=float)
    one_each = LinearConstraint(csr_array(entries, shape=(len(matrix), len(flat))), 1, 1)
    allowed = limit
    while True:  # the program keeps to its limit up to rounding, and bytes are whole
        with _silent():
            found = milp(
                errors / (errors.max() or 1.0),
                constraints=[one_each, LinearConstraint(sizes[None], ub=allowed)],
                integrality=np.ones(len(flat)),
                bounds=Bounds(0, 1),
                options={"mip_rel_gap": GAP},
            )
        if found.x is None:
            return None
        chosen = {flat[i][0]: flat[i][1] for i in np.flatnonzero(found.x > 0.5)}
        over = sum(choice.bytes for choice in chosen.values()) - limit
        if over <= 0:
            return chosen
        allowed -= over


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Around HiGHS, which now and then prints a line for its developers, past Python, among what we print."""
    flush = ctypes.CDLL(None).fflush
    flush(None)
    stdout = os.dup(1)
    with tempfile.TemporaryFile() as nowhere:
        os.dup2(nowhere.fileno(), 1)
        try:
            yield
        finally:
            flush(None)
            os.dup2(stdout, 1)
            os.close(stdout)


def _sum(chosen: dict[str, Choice]) -> Allocation:
    return Allocation(chosen, sum(c.bytes for c in chosen.values()), math.fsum(c.error for c in chosen.values()))
