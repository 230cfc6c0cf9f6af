"""What a budget chooses from, matrix by matrix, and how many bytes it may spend. Knows shapes, reads no weights."""

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from loftq import codes
from loftq.codes import RATE_UNIT
from loftq.errors import UsageError, option, quoted
from loftq.planning.budget import Choice, parse_budget
from loftq.planning.containers import choices
from loftq.planning.patterns import matches
from loftq.planning.plan import Matrix, Plan, Policy, Role, make
from loftq.spec import BITS, ITEM_BYTES, QuantSpec, code_for, stored_bytes, why_not


@dataclass(frozen=True)
class Candidate:
    """One way to quantize a matrix, with the ranks that its adapter may have, ascending."""

    quant: QuantSpec
    ranks: tuple[int, ...]


TRELLIS_WIDTHS = (1, 2, 3, 4)  # bits at which a trellis is measured; between them follow its errors


def candidates(plan: Plan, policy: Policy) -> dict[str, list[Candidate]]:
    """Module -> widths, with half, once and twice the block, and with the ranks of ``--budget-ranks``.

    These are measured. A trellis has no blocks, and every sixteenth of a bit between its widths to choose from:
    :func:`curve`.

    8 bits are among the widths if the budget is more than all matrices take at the width below: with less they cannot
    pay, and fitting their scales takes the longest by far.

    A module that a pattern of ``--bits`` names keeps its width and block; one that a pattern of ``--rank`` names, its
    rank. The rank of the plan is always among the ranks.

    Args:
        plan: of the policy, without the budget.
    """
    widths = [bits for bits in _widths(policy) if bits < 8]
    if 8 in _widths(policy):
        widest = [replace(m.quant, bits=max(widths)) for m in plan.matrices] if widths else []
        below = sum(bytes_of(m, quant, m.rank) for m, quant in zip(plan.matrices, widest, strict=False))
        widths += [8] if _allowed(plan, policy) > below else []
    return {
        m.module: [Candidate(quant, _ranks(m, policy)) for quant in _quants(m, policy, widths)] for m in plan.matrices
    }


def limit(plan: Plan, policy: Policy) -> int:
    """Bytes of all choices together: what a number of bytes leaves beside the tensors that are kept; or what an
    average of bits makes of the quantized weights, and beside it adapters of the plan's ranks.

    Raises: UsageError for less than the cheapest choices take.
    """
    allowed = _allowed(plan, policy)
    by_module = {m.module: m for m in plan.matrices}
    least = sum(
        min(bytes_of(by_module[module], c.quant, c.ranks[0]) for c in found)
        for module, found in candidates(plan, policy).items()
    )
    if allowed < least:
        bits = (least - _adapters(plan)) * 8 / sum(m.numel for m in plan.matrices)
        size = (least + sum(k.bytes for k in plan.kept)) / 1e6
        in_bits = parse_budget(policy.budget).bytes is None
        needed = f"{math.ceil(1000 * bits) / 1000:.3f} bits" if in_bits else f"{math.ceil(100 * size) / 100:.2f}MB"
        raise UsageError(
            f"{option('budget')} {quoted(policy.budget)} is too small: the narrowest codes, largest blocks and lowest "
            f"ranks take {needed}; give at least that, or a larger {option('block_size')}"
        )
    return allowed


def _allowed(plan: Plan, policy: Policy) -> int:
    budget = parse_budget(policy.budget)
    if budget.bytes is not None:
        return budget.bytes - sum(k.bytes for k in plan.kept)
    return int((budget.bits or 0) * sum(m.numel for m in plan.matrices) / 8) + _adapters(plan)


def _adapters(plan: Plan) -> int:
    return sum(factor_bytes(m, m.rank) for m in plan.matrices)


def bytes_of(matrix: Matrix, quant: QuantSpec, rank: int) -> int:
    """What a matrix takes on disk, with its adapter."""
    return matrix.count * stored_bytes(quant, *matrix.shape) + factor_bytes(matrix, rank)


def factor_bytes(matrix: Matrix, rank: int) -> int:
    return ITEM_BYTES[matrix.factors] * matrix.count * rank * sum(matrix.shape)


def first_layers(
    plan: Plan, tensors: Mapping[str, tuple[str, tuple[int, ...]]], roles: Mapping[str, Role], policy: Policy
) -> list[Plan]:
    """The plans of the paper's rule, the first layers at 4 bits and the rest at 2, for every number of layers.

    None if the matrices of ``plan``, which is the policy's without the budget, are in no stack of layers, or if the
    code does not have both widths.
    """
    if not (_scalar(policy.code) and {2, 4} <= set(_widths(policy))):
        return []
    stacks = [roles[m.name].stack for m in plan.matrices]
    deepest = max((stack.length for stack in stacks if stack), default=0)
    plain = replace(policy, budget="", budget_ranks="", budget_solver="greedy")
    averages = [2.0, *(2 + 2 * (k + 1e-6) / deepest for k in range(1, deepest)), 4.0] if deepest else []
    return [make(tensors, roles, replace(plain, bits=f"{average:.12f}")) for average in averages]


def curve(matrix: Matrix, found: list[Candidate], errors: Mapping[QuantSpec, list[float]]) -> list[Choice]:
    """All choices of a matrix, which counts by its size.

    Args:
        errors: of every candidate, after each of its ranks: squared, relative to the matrix.
    """
    return [
        Choice(quant.bits, quant.block_size, rank, bytes_of(matrix, quant, rank), matrix.numel * error)
        for quant, ranks, squares in _with_rates_between(found, errors)
        for rank, error in zip(ranks, squares, strict=True)
    ]


def _with_rates_between(
    found: list[Candidate], errors: Mapping[QuantSpec, list[float]]
) -> Iterator[tuple[QuantSpec, tuple[int, ...], list[float]]]:
    """Every candidate with its ranks and errors; of a trellis all rates between two, by a line through the logarithms.

    The least error at a rate falls as ``4^-rate``, and that of a trellis nearly so, in every matrix.
    """
    for candidate in found:
        yield candidate.quant, candidate.ranks, errors[candidate.quant]
    trellis = [c for c in found if c.quant.codebook.form == "trellis"]
    for low, high in itertools.pairwise(trellis):
        for rate in range(low.quant.rate + 1, high.quant.rate):
            part = (rate - low.quant.rate) / (high.quant.rate - low.quant.rate)
            ends = zip(errors[low.quant], errors[high.quant], strict=True)
            quant = replace(low.quant, bits=rate / RATE_UNIT)
            yield quant, low.ranks, [a ** (1 - part) * b**part for a, b in ends]


def _quants(matrix: Matrix, policy: Policy, widths: list[float]) -> list[QuantSpec]:
    if _pinned(policy.bits, matrix.module):
        return [matrix.quant]
    if policy.serve:
        held = [quant for quant in choices(policy) if quant.bits in widths and not matrix.shape[1] % quant.block_size]
        return sorted(held, key=lambda quant: (quant.bits, quant.block_size))
    if not (_scalar(policy.code) or matrix.instead):
        wide = [replace(matrix.quant, bits=bits) for bits in TRELLIS_WIDTHS]
        return [quant for quant in wide if not why_not(quant, matrix.kind, matrix.shape[0])]
    size = policy.block_size
    blocks = [size] if matrix.quant.codebook.per_tensor else sorted({max(size // 2, 1), size, 2 * size})
    scales = policy.solve.scales
    code = "auto" if matrix.instead else policy.code
    return [
        replace(matrix.quant, bits=bits, block_size=block, code=code_for(code, bits, scales))
        for bits in widths
        for block in blocks
    ]


def _widths(policy: Policy) -> tuple[float, ...]:
    """The widths of the policy's code; of all scalar codes that ``auto`` may stand for; of what is served.

    Of a trellis the whole ones: those of the scalar codes in its place.
    """
    if policy.serve:
        return tuple(sorted({quant.bits for quant in choices(policy)}))
    own = BITS if policy.code == "auto" else codes.get(policy.code).widths
    return tuple(bits for bits in BITS if bits in own)


def _scalar(code: str) -> bool:
    return code == "auto" or codes.get(code).form == "blocks"


def _ranks(matrix: Matrix, policy: Policy) -> tuple[int, ...]:
    if _pinned(policy.rank, matrix.module):
        return (matrix.rank,)
    asked = [int(rank) for rank in policy.budget_ranks.split(",") if rank]
    return tuple(sorted({matrix.rank, *(rank for rank in asked if rank < min(matrix.shape))}))


def _pinned(rules: str, module: str) -> bool:
    """Whether a pattern, not the default, decides about a module."""
    patterns = (item.rpartition("=")[0].strip() for item in rules.split(","))
    return any(pattern and matches(pattern, module) for pattern in patterns)
