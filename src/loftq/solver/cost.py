"""What one matrix costs, by laws that were measured: docs/methods.md, "What they cost"."""

from collections.abc import Iterable

from loftq.numerics.machine import default_workers
from loftq.spec import SolveSpec

BASE = 13  # bytes of a worker per weight
SQUARE = {"weights": 24, "calibrated": 40}  # bytes per in_features²: three, or five, float64 matrices

PER_WEIGHT = 5e-8  # seconds of one CPU, per weight and step
PER_SQUARE = 1.1e-10  # and per out_features * in_features², where error feedback goes over the codes


def squares(spec: SolveSpec) -> bool:
    """Whether a matrix ``(out, in)`` is worked on with matrices ``(in, in)``, and its time grows as ``out · in²``."""
    return spec.rounding != "nearest"


def memory(rows: int, columns: int, spec: SolveSpec, calibrated: bool) -> int:
    """Bytes that a worker needs for a matrix ``(rows, columns)``."""
    whole = calibrated and spec.metric == "full"
    square = SQUARE["calibrated"] if whole else SQUARE["weights"] if squares(spec) else 0
    return BASE * rows * columns + square * columns**2


def seconds(rows: int, columns: int, spec: SolveSpec) -> float:
    """CPU seconds for a matrix ``(rows, columns)``, about: measured on one CPU, within a factor of two on others."""
    steps = max(spec.steps, 1)
    return steps * rows * columns * (PER_WEIGHT + (PER_SQUARE * columns if squares(spec) else 0))


def workers_for(shapes: Iterable[tuple[int, int]], spec: SolveSpec, device: str, calibrated: bool) -> int:
    """How many matrices of these shapes to work on at a time, if nobody says."""
    return default_workers(device, max((memory(*shape, spec, calibrated) for shape in shapes), default=0))
