"""Error curves: what every matrix of a checkpoint would leave of itself, for every choice that a budget has.

Measured matrix by matrix, in parallel, from the files, as the quantizer would see them; and kept in a file, with all
that they depend on, so that no command has to measure what another one has.
"""

import functools
import hashlib
import json
import logging
from collections.abc import Callable
from dataclasses import asdict, astuple
from pathlib import Path
from typing import Any

import torch

from loftq import planning
from loftq.calibration.streamed import Streamed, waves
from loftq.errors import ConflictError, LoftqError, StorageError, listed, naming, option, quoted
from loftq.formats import fsio, hashed_json, strict_json
from loftq.formats.hashed_json import differences
from loftq.formats.regular import local_path, open_regular, shown
from loftq.formats.statistics import Statistics
from loftq.numerics import Metric, oriented
from loftq.numerics.machine import code_path
from loftq.planning import Candidate, Choice, Matrix, Policy
from loftq.solver import errors_by_rank, ordered_map, workers_for
from loftq.sources.checkpoint import Source
from loftq.sources.identity import stamp
from loftq.version import __version__

logger = logging.getLogger("loftq")

KIND = "error curves of loftq"
Curves = dict[str, list[Choice]]  # by module
Advance = Callable[[dict[str, Any]], None]
Together = Callable[[Curves, Callable[[Matrix], list[Choice]], Advance], Curves]


def measured(
    source: Source,
    policy: Policy,
    keep: Path | None,
    statistics: Statistics | Streamed | None = None,
    *,
    workers: int = 0,
    device: str = "cpu",
    begin: Callable[[int, int], Advance] | None = None,
    together: Together | None = None,
    place: Path = Path("calibration"),
) -> Curves:
    """The choices of every matrix, with their bytes and errors: out of ``keep``, or measured, and one by one put there.

    An error is ``numel · min ‖W - Q - BA‖² / ‖W‖²``, in the norm of the module's moments where there are some: the
    matrices count by their size, whatever the scale of their weights.

    Args:
        source: with the plan of the policy without its budget.
        keep: a file of JSON lines, whose directory exists; None keeps nothing.
        statistics: what a calibration found out. Curves of another are not used.
        workers: matrices at a time; 0 for as many as CPUs, memory and device allow.
        begin: called if anything is measured, with the number of matrices and 0; returns what is called after each.
        together: measures all beside other processes, given what ``keep`` has, how one is measured, and what is called
            after each; nothing is put into ``keep`` then.
        place: a directory for statistics that are collected as they are used.

    Raises: ConflictError for a ``keep`` that holds something else, or a part of the curves from another machine;
        NumericalError for weights that are not finite.
    """
    found = planning.candidates(source.plan, policy)
    identity, machine = _identity(source, found, device, statistics), code_path(device)
    curves = {} if keep is None else _kept(keep, identity, machine, len(found))
    missing = [matrix for matrix in source.plan.matrices if matrix.module not in curves]
    if not missing:
        return curves
    total = len(source.plan.matrices)
    advance = begin(total, total - len(missing)) if begin else lambda report: None

    def work_on(found_out: Statistics | None, matrix: Matrix) -> list[Choice]:
        with naming(matrix.name, matrix.shape, option("workers")):
            return _curve(matrix, found[matrix.module], source, device, found_out)

    if together is not None and not isinstance(statistics, Streamed):
        return together(curves, functools.partial(work_on, statistics), advance)
    if keep is not None:
        head = {"kind": KIND, "identity": identity, "machine": machine}
        fsio.write_atomic(keep, [hashed_json.line(head), *(_line(module, curves[module]) for module in curves)])
    sizes = [(matrix.shape, matrix.quant) for matrix in missing]
    workers = workers or workers_for(sizes, source.plan.solve, device, statistics is not None)
    for some, found_out in waves(statistics, place, missing):
        results = ordered_map(functools.partial(work_on, found_out), some, workers)
        for matrix, curve in zip(some, results, strict=True):
            curves[matrix.module] = curve
            if keep is not None:
                fsio.append(keep, _line(matrix.module, curve))
            advance({"measured": matrix.name})
    return curves


def check_place(keep: Path) -> None:
    """Refuse a place where curves could not be kept, before anything is measured."""
    local_path(option("curves"), keep)
    if not keep.parent.is_dir():
        raise StorageError(f"{option('curves')} {shown(keep)}: its directory does not exist; create it and run again")
    if keep.exists():
        _ours(keep)


def _curve(
    matrix: Matrix, found: list[Candidate], source: Source, device: str, statistics: Statistics | None
) -> list[Choice]:
    """The choices of a matrix; of a stack of experts with the errors of all together, each relative to all.

    With statistics an expert counts as often as tokens are routed to it.
    """
    quants, ranks = [candidate.quant for candidate in found], found[0].ranks
    together = {quant: [0.0] * len(ranks) for quant in quants}
    whole = 0.0
    for member in matrix.members:
        weight = oriented(member.kind, source.checkpoint.read(member.name, member.made)).contiguous().to(device)
        moments = statistics and statistics.moments(member.module)
        metric, tokens = (moments.fit, moments.tokens) if moments else (Metric(), 1)
        share = tokens * metric.norm(weight) ** 2 if matrix.experts else 1.0
        whole += share
        for quant, errors in errors_by_rank(weight, quants, ranks, source.plan.solve, member.name, metric).items():
            together[quant] = [sum_ + share * e for sum_, e in zip(together[quant], errors, strict=True)]
    errors = {quant: [e / (whole or 1.0) for e in sums] for quant, sums in together.items()}
    return planning.curve(matrix, found, errors)


def _identity(
    source: Source, found: dict[str, list[Candidate]], device: str, statistics: Statistics | Streamed | None
) -> dict[str, Any]:
    """Everything that errors and bytes depend on. One step is measured, so it matters only whether any is made."""
    solve = {**asdict(source.plan.solve), "steps": min(source.plan.solve.steps, 1)}
    listed_ = {
        m.module: [m.factors, *({**asdict(c), "quant": c.quant.to_dict()} for c in found[m.module])]
        for m in source.plan.matrices
    }
    text = json.dumps(listed_, sort_keys=True)
    return {
        "source": stamp(source),
        "candidates": hashlib.sha256(text.encode()).hexdigest(),
        "solve": solve,
        "device": device.partition(":")[0],
        "statistics": None if statistics is None else statistics.identity,
        "loftq": __version__,
        "torch": torch.__version__,
    }


def _line(module: str, curve: list[Choice]) -> bytes:
    return hashed_json.line({"module": module, "choices": [astuple(choice) for choice in curve]})


def _kept(keep: Path, identity: dict[str, Any], machine: dict[str, str], total: int) -> Curves:
    """The curves in ``keep`` that are of this identity, up to the first line that is damaged.

    Raises: ConflictError for a part of the ``total`` that was measured on another machine.
    """
    if not keep.exists():
        return {}
    _ours(keep)
    curves: Curves = {}
    begun: dict[str, Any] = {}
    try:
        lines = hashed_json.load_lines(keep)
        begun = next(lines, {})
        if begun.get("identity") != identity:
            return {}
        for row in lines:
            curves[row["module"]] = [Choice(*choice) for choice in row["choices"]]
    except LoftqError as e:
        logger.warning("%s; what it does not tell is measured again", e)
    changed = listed(differences(begun.get("machine"), machine))
    if curves and len(curves) < total and changed:
        raise ConflictError(
            f"{quoted(keep)}: begun on another machine ({changed}), whose errors differ in their bits; finish it "
            f"there, or choose another {option('curves')}"
        )
    return curves


def _ours(keep: Path) -> None:
    """ConflictError for a file that is not of curves: it would be overwritten."""
    mark = json.dumps({"kind": KIND})[:-1].encode()
    try:
        with open_regular(keep) as file:
            ours = file.read_at(0, min(file.stamp.size, len(mark))) == mark
        ours = ours or strict_json.load_object(keep).get("kind") == KIND  # as it was before it had lines
    except LoftqError:
        ours = False
    if not ours:
        raise ConflictError(f"{quoted(keep)}: exists and holds no {KIND}; choose another {option('curves')}")
