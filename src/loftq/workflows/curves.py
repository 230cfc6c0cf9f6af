"""Error curves: what every matrix of a checkpoint would leave of itself, for every choice that a budget has.

Measured matrix by matrix, in parallel, from the files, as the quantizer would see them; and kept in a file, with all
that they depend on, so that no command has to measure what another one has.
"""

import hashlib
import json
import logging
import os
from collections.abc import Callable
from dataclasses import asdict, astuple
from pathlib import Path
from typing import Any

import torch

import loftq
from loftq import plan as planning
from loftq.errors import ConflictError, LoftqError, StorageError, option, quoted
from loftq.formats import strict_json
from loftq.formats.regular import shown
from loftq.formats.statistics import Statistics
from loftq.numerics import Moments
from loftq.plan import Candidate, Choice, Matrix, Policy
from loftq.solver import errors_by_rank, ordered_map
from loftq.workflows import sealed
from loftq.workflows.assemble import source_identity
from loftq.workflows.source import Source
from loftq.workflows.units import naming, oriented

logger = logging.getLogger("loftq")

KIND = "error curves of loftq"
Curves = dict[str, list[Choice]]  # by module


def measured(
    source: Source,
    policy: Policy,
    keep: Path | None,
    statistics: Statistics | None = None,
    *,
    workers: int = 0,
    device: str = "cpu",
    begin: Callable[[int, int], Callable[[dict[str, Any]], None]] | None = None,
) -> Curves:
    """The choices of every matrix, with their bytes and errors: out of ``keep``, or measured, and one by one put there.

    An error is ``numel · min ‖W - Q - BA‖² / ‖W‖²``, in the norm of the module's moments where there are some: the
    matrices count by their size, whatever the scale of their weights.

    Args:
        source: with the plan of the policy without its budget.
        keep: a JSON file, whose directory exists; None keeps nothing.
        statistics: what a calibration found out. Curves of another are not used.
        workers: matrices at a time; 0 for one per core.
        begin: called if anything is measured, with the number of matrices and 0; returns what is called after each.

    Raises: ConflictError for a ``keep`` that holds something else; NumericalError for weights that are not finite.
    """
    found = planning.candidates(source.plan, policy)
    identity = _identity(source, found, device, statistics)
    curves = {} if keep is None else _kept(keep, identity)
    missing = [matrix for matrix in source.plan.matrices if matrix.module not in curves]
    if not missing:
        return curves
    total = len(source.plan.matrices)
    advance = begin(total, total - len(missing)) if begin else lambda report: None

    def work_on(matrix: Matrix) -> list[Choice]:
        with naming(matrix):
            moments = statistics and statistics.moments(matrix.module)
            return _curve(matrix, found[matrix.module], source, device, moments)

    results = ordered_map(work_on, missing, workers or os.cpu_count() or 1)
    for matrix, curve in zip(missing, results, strict=True):
        curves[matrix.module] = curve
        if keep is not None:
            rows = {module: [astuple(choice) for choice in choices] for module, choices in curves.items()}
            sealed.write(keep, {"kind": KIND, "identity": identity, "curves": rows})
        advance({"measured": matrix.name})
    return curves


def check_place(keep: Path) -> None:
    """Refuse a place where curves could not be kept, before anything is measured."""
    if not keep.parent.is_dir():
        raise StorageError(f"{option('curves')} {shown(keep)}: its directory does not exist; create it and run again")
    if keep.exists():
        _ours(keep)


def _curve(
    matrix: Matrix, found: list[Candidate], source: Source, device: str, moments: Moments | None
) -> list[Choice]:
    weight = oriented(matrix, source.checkpoint.read(matrix.name)).to(device)
    quants, ranks = [candidate.quant for candidate in found], found[0].ranks
    metric = None if moments is None else moments.fit
    errors = errors_by_rank(weight, quants, ranks, source.plan.solve, matrix.name, metric)
    return planning.curve(matrix, found, errors)


def _identity(
    source: Source, found: dict[str, list[Candidate]], device: str, statistics: Statistics | None
) -> dict[str, Any]:
    """Everything that the errors depend on. One step is measured, so it matters only whether any is made."""
    solve = {**asdict(source.plan.solve), "steps": min(source.plan.solve.steps, 1)}
    text = json.dumps({module: [asdict(c) for c in choices] for module, choices in found.items()}, sort_keys=True)
    return {
        "source": source_identity(source),
        "candidates": hashlib.sha256(text.encode()).hexdigest(),
        "solve": solve,
        "device": device.partition(":")[0],
        "statistics": None if statistics is None else statistics.identity,
        "loftq": loftq.__version__,
        "torch": torch.__version__,
    }


def _kept(keep: Path, identity: dict[str, Any]) -> Curves:
    """The curves in ``keep`` that are of this identity."""
    if not keep.exists():
        return {}
    _ours(keep)
    try:
        content = sealed.load(keep)
        if content["identity"] != identity:
            return {}
        return {module: [Choice(*row) for row in rows] for module, rows in content["curves"].items()}
    except LoftqError as e:
        logger.warning("%s; the curves are measured again", e)
        return {}


def _ours(keep: Path) -> None:
    """ConflictError for a file that is not of curves: it would be overwritten."""
    try:
        ours = strict_json.load_object(keep).get("kind") == KIND
    except LoftqError:
        ours = False
    if not ours:
        raise ConflictError(f"{quoted(keep, 400)}: exists and holds no {KIND}; choose another {option('curves')}")
