"""A budget, spent: the plan that it chooses, and what else could be had for the bytes."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, replace
from pathlib import Path
from typing import Any

from loftq import planning
from loftq.calibration.streamed import Streamed
from loftq.checkpoint.curves import Curves, check_place, measured
from loftq.errors import UsageError, option
from loftq.formats import layouts
from loftq.formats.statistics import Statistics
from loftq.planning import Choice, Plan, Policy
from loftq.sources.checkpoint import Source

BETWEEN = 64  # amounts, evenly spaced, that the frontier shows beside the path


def check_budget(source: Source, policy: Policy, keep: Path | None, format: str = layouts.PackedLayout.name) -> None:
    """Refuse, before anything is measured or written, what a budget cannot be spent on."""
    if not layouts.get(format).budgeted:
        counted = " or ".join(name for name in layouts.names() if layouts.get(name).budgeted)
        raise UsageError(
            f"{option('budget')} counts bytes of {option('format', counted)}, and {option('format', format)} takes "
            "others; leave one of them out"
        )
    planning.limit(source.plan, policy)
    planning.check_budget_solver(policy.budget_solver)
    if keep is not None:
        check_place(keep)


def within_budget(
    source: Source, policy: Policy, keep: Path | None, statistics: Statistics | Streamed | None = None, **measuring: Any
) -> Source:
    """The source with the plan that the policy's budget chooses, which says as its ``budget`` how that compares.

    Args:
        source: with the plan of the policy without its budget.
        keep, statistics, measuring: as :func:`loftq.checkpoint.curves.measured` takes them.

    Returns: the source; its ``plan.budget`` has plain values: ``budget``; ``chosen``, a point; ``uniform`` and
        ``first_layers``, points with ``bits``, and with the ``layers`` that the paper's rule gives 4 bits, at the
        policy's block and rank; ``frontier``, the greedy solver's points from the fewest bytes to the least error. A
        point has ``bytes`` (all tensors, the adapter and what is kept among them), ``bits_per_weight``, and ``error``
        (expected: root of the mean over all weights of the squared error relative to their matrix).
    """
    return with_choice(source, policy, choose(source, policy, measured(source, policy, keep, statistics, **measuring)))


def with_choice(source: Source, policy: Policy, choice: Mapping[str, Any]) -> Source:
    """The source with the plan of what :func:`choose` found."""
    chosen = {module: Choice(*one) for module, one in choice["chosen"].items()}
    plan = planning.make(source.tensors, source.roles, policy, chosen)
    return replace(source, plan=replace(plan, budget=choice["report"]))


def choose(source: Source, policy: Policy, curves: Curves) -> dict[str, Any]:
    """The choice of every matrix, by module, and the report on them, as :func:`within_budget` has it; plain values."""
    groups = planning.fused(source.plan.matrices, policy.serve)
    layers = planning.together(curves, groups)
    best = planning.allocate(layers, planning.limit(source.plan, policy), policy.budget_solver)
    chosen = planning.apart(best.chosen, curves, groups)
    roles, tensors = source.roles, source.tensors
    plan = planning.make(tensors, roles, policy, chosen)
    kept = sum(k.bytes for k in plan.kept)
    weights = sum(m.numel for m in plan.matrices)

    def point(chosen: Mapping[str, Choice], **what: float) -> dict[str, Any]:
        size, adapter = sum(c.bytes for c in chosen.values()), _adapter_bytes(plan, chosen)
        error = math.sqrt(math.fsum(c.error for c in chosen.values()) / weights)
        return {**what, "bytes": kept + size, "bits_per_weight": 8 * (size - adapter) / weights, "error": error}

    widths = [widths for choices in curves.values() if len(widths := {c.bits for c in choices}) > 1]
    rules = planning.first_layers(source.plan, tensors, roles, policy)
    report = {
        "budget": policy.budget,
        "chosen": point(chosen),
        "uniform": [
            point(_picked(curves, source.plan, lambda _, b=b: b), bits=b)
            for b in sorted(set().union(*widths))
            if b == int(b)
        ],
        "first_layers": [
            point(_picked(curves, source.plan, _widths(rule).get), layers=k) for k, rule in enumerate(rules)
        ],
        "frontier": [[kept + size, math.sqrt(error / weights)] for size, error in _frontier(layers)],
    }
    return {"chosen": {module: astuple(choice) for module, choice in chosen.items()}, "report": report}


def _frontier(curves: Mapping[str, Sequence[Choice]]) -> list[tuple[int, float]]:
    """Where the greedy solver gets with any amount: its own path, and between, where a jump is long, what fits."""
    path = planning.frontier(curves)
    low, high = path[0][0], path[-1][0]
    between = [planning.allocate(curves, low + (high - low) * i // BETWEEN) for i in range(BETWEEN)]
    found: list[tuple[int, float]] = []
    for size, error in sorted([*path, *((a.bytes, a.error) for a in between)]):
        if not found or error < found[-1][1]:
            found.append((size, error))
    return found


def _adapter_bytes(plan: Plan, chosen: Mapping[str, Choice]) -> int:
    return sum(planning.factor_bytes(m, chosen[m.module].rank) for m in plan.matrices)


def _widths(plan: Plan) -> dict[str, float]:
    return {m.module: m.quant.bits for m in plan.matrices}


def _picked(curves: Curves, plan: Plan, bits: Callable[[str], float | None]) -> dict[str, Choice]:
    """Of every matrix the choice with this width, the plan's block, if it has one, and rank; if pinned, its own."""
    found = {}
    for matrix in plan.matrices:
        choices = [c for c in curves[matrix.module] if c.rank == matrix.rank]
        wanted, block = bits(matrix.module), matrix.quant.block_size
        found[matrix.module] = min(choices, key=lambda c: (c.bits != wanted, c.block_size != block))
    return found
