"""The plan: for every tensor of a checkpoint, how it is quantized or why it is kept."""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from loftq.errors import InputError, UsageError, listed, option, quoted
from loftq.numerics import oriented_shape
from loftq.options import fields_of
from loftq.planning.bits import bits_rules
from loftq.planning.budget import Choice
from loftq.planning.containers import served, why_not_served
from loftq.planning.names import natural, routers_among
from loftq.planning.patterns import Rules, parse_rules, whole
from loftq.planning.pieces import Made, Piece, of_stack, restored, sources
from loftq.planning.policy import DENSE, Policy
from loftq.spec import (
    BITS,
    STORED,
    QuantSpec,
    SolveSpec,
    check_solver,
    quant_spec,
    scaling,
    stored_bytes,
    why_not,
)

WIDE = ("F64", "F32")
FLOATS = ("F64", "F32", "F16", "BF16")
HEADS = {"lm_head", "embed_out", "classifier", "score", "qa_outputs", "pooler", "cls", "classification_head"}
NO_PARAMETER = "not a parameter of the model"  # the reason to keep a buffer, or a tensor that the class has not
FIRST = ("steps", "order", "svd", "seed")  # of a solver in every digest; what came later is, where it is no default


@dataclass(frozen=True)
class Stack:
    """Place of a module in a repeated stack of layers: ``encoder.layer`` 3 of 12."""

    name: str
    index: int
    length: int


@dataclass(frozen=True)
class Role:
    """What a checkpoint tensor is in the model, read off a skeleton without weights.

    Attributes:
        module: name of the module that owns it at run time; empty if the model has no such parameter.
        kind: ``linear``, ``conv1d``, ``embedding``, one that begins with ``experts`` (a stack, whose ``module`` is the
            name of the Parameter), ``parameter`` (a matrix of the layers that belongs to none of these modules), or
            ``other``.
        backbone: inside the base model, not in a task head.
        tied: names of other parameters that are the same tensor.
        keep: a reason known to the model's side why it must stay dense.
        order: of a stack of experts, its place among the Parameters of its module, in which PEFT nests its layers.
        made: what transformers makes it of, if the checkpoint does not hold it as it is.
        converter: which of transformers' converters does; its tensors are all written as the model has them, or none.
    """

    module: str = ""
    kind: str = "other"
    backbone: bool = False
    stack: Stack | None = None
    tied: tuple[str, ...] = ()
    keep: str = ""
    order: int = 0
    made: Made = ()
    converter: str = ""


@dataclass(frozen=True)
class Matrix:
    """A matrix to quantize, or a stack of ``experts`` of one shape. ``shape`` is ``(out, in)`` as solved, of each; a
    Conv1D's tensor is stored transposed.

    ``dtype`` is what it has where it is written dense, ``source`` what it has in the source (empty: the same),
    ``factors`` that of the adapter's tensors. ``made``: what it is put together of, if the source does not hold it.
    ``instead``: why it has another code than was asked for (empty: it has that).
    """

    name: str
    module: str
    kind: str
    shape: tuple[int, int]
    dtype: str
    quant: QuantSpec
    rank: int
    factors: str = "F32"
    source: str = ""
    made: Made = ()
    instead: str = ""
    experts: int = 0
    nested: int = 0  # layers of PEFT around its module's stacks that lie outside its own

    @property
    def count(self) -> int:
        """Number of matrices: the experts of a stack, else 1."""
        return max(1, self.experts)

    @property
    def numel(self) -> int:
        return self.count * self.shape[0] * self.shape[1]

    @property
    def bytes(self) -> int:
        return self.count * stored_bytes(self.quant, *self.shape)

    @property
    def adapter_numel(self) -> int:
        """Parameters of its LoRA factors, ``(rank, in)`` and ``(out, rank)`` for each expert."""
        return self.count * self.rank * sum(self.shape)

    @property
    def pieces(self) -> Made:
        """What each expert, or the matrix, is put together of; of a stack that the source holds, its slices."""
        if self.experts and not self.made:
            return of_stack(self.name, (self.experts, *oriented_shape(self.kind, self.shape)))
        return self.made

    @property
    def sources(self) -> dict[str, tuple[int, ...]]:
        """The source's tensors that it, each expert for itself, is all of; none if that is not so."""
        return sources(self.made) if all(restored({"": (pieces,)}) for pieces in self.made) else {}

    @property
    def members(self) -> "list[Matrix]":
        """The matrices that are solved: each expert of a stack, called by its number, else the matrix itself."""
        one = replace(self, experts=0, nested=0)
        if not self.experts:
            return [one]
        return [_member(one, e, pieces) for e, pieces in enumerate(self.pieces)]


def _member(stack: Matrix, number: int, pieces: tuple[Piece, ...]) -> Matrix:
    return replace(stack, name=f"{stack.name}.{number}", module=f"{stack.module}.{number}", made=(pieces,))


@dataclass(frozen=True)
class Kept:
    """A tensor that is copied, in ``dtype``. ``missed``: a matrix of a layer, which lowers the coverage."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    bytes: int
    reason: str
    missed: bool = False
    made: Made = ()

    @property
    def sources(self) -> dict[str, tuple[int, ...]]:
        """The source's tensors that it is all of; none if that is not so."""
        return sources(self.made) if restored({"": self.made}) else {}


@dataclass(frozen=True, repr=False)
class Plan:
    """What is done with every tensor of a checkpoint, in the order of the model's layers.

    Attributes:
        matrices: the tensors that are quantized, each with ``name``, ``shape``, ``quant``, ``rank`` and ``bytes``.
        kept: all other tensors, each with the ``reason``.
        rank: the adapter's default rank; matrices with another rank are in its ``rank_pattern``.
        coverage: share of the weights in the layers' matrices that is quantized.
        budget: with a budget: the choice and what it is compared with, of
            :func:`loftq.checkpoint.budget.within_budget`; else None.
        estimate: forecast of time and memory, :func:`loftq.checkpoint.estimate.estimate`; None if not asked for.
    """

    matrices: tuple[Matrix, ...]
    kept: tuple[Kept, ...]
    lora_alpha: float
    use_rslora: bool
    rank: int
    solve: SolveSpec
    budget: dict[str, Any] | None = field(default=None, compare=False)
    estimate: dict[str, Any] | None = field(default=None, compare=False)

    def __repr__(self) -> str:
        bits = 8 * sum(m.bytes for m in self.matrices) / max(1, sum(m.numel for m in self.matrices))
        what = f"{len(self.matrices)} matrices at {bits:.2f} bits, rank {self.rank}, coverage {self.coverage:.0%}"
        return f"Plan({what}; {len(self.kept)} tensors kept)"

    def scaling(self, matrix: Matrix) -> float:
        return scaling(self.lora_alpha, matrix.rank, self.use_rslora)

    @property
    def coverage(self) -> float:
        """Share of the layers' matrices, in weights, that is quantized."""
        done = sum(m.numel for m in self.matrices)
        missed = sum(math.prod(k.shape) for k in self.kept if k.missed)
        return done / (done + missed) if done + missed else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Plain values: every decision, without what led to it."""
        plan = asdict(replace(self, budget=None, estimate=None))
        del plan["budget"], plan["estimate"]
        for matrix, written in zip(self.matrices, plan["matrices"], strict=True):
            written["quant"] = matrix.quant.to_dict()
            if not matrix.instead:
                del written["instead"]
        for tensor in (*plan["matrices"], *plan["kept"]):
            for name in ("made", "experts", "nested"):
                if not tensor.get(name, True):
                    del tensor[name]
        return plan

    def digest(self) -> str:
        """SHA-256 of the plan; equal plans give equal files."""
        plan = self.to_dict()
        for name, value in asdict(SolveSpec()).items():
            if name not in FIRST and plan["solve"][name] == value:
                del plan["solve"][name]
        for matrix in plan["matrices"]:
            if matrix["factors"] == "F32":
                del matrix["factors"]
            if not matrix["source"]:
                del matrix["source"]
        text = json.dumps(plan, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()


def make(
    tensors: Mapping[str, tuple[str, tuple[int, ...]]],
    roles: Mapping[str, Role],
    policy: Policy,
    chosen: Mapping[str, Choice] | None = None,
) -> Plan:
    """Decide what is done with every tensor.

    Args:
        tensors: name -> (safetensors dtype, shape), from the file headers alone.
        roles: name -> role, from the model's skeleton.
        chosen: module -> bits, block and rank that a budget chose; they come before the policy's.

    Raises: UsageError for options that fit no module or a rank that does not fit a matrix; InputError when
        nothing, or less than ``policy.min_coverage`` of the layers' weights, would be quantized.
    """
    ranks = parse_rules(option("rank"), policy.rank, _rank_value)
    routers = routers_among(role.module for role in roles.values())
    wanted = {n: _reason_to_keep(n, *tensors[n], roles[n], policy.embeddings, ranks, routers) for n in tensors}
    smallest = _smallest_matrix([_one(roles[n], tensors[n][1]) for n, reason in wanted.items() if not reason])
    modules = [roles[n].module for n, reason in wanted.items() if not reason]
    placed = (roles[n].stack for n, reason in wanted.items() if not reason)
    bits = bits_rules(policy.bits, policy.code, {stack.name: stack.length for stack in placed if stack})
    bits.refuse_unmatched(option("bits"), modules)
    ranks.refuse_unmatched(option("rank"), modules)
    matrices, kept, refused = [], [], []
    narrow = _narrow(tensors, roles, policy)

    def keep(name: str, dtype: str, reason: str) -> None:
        role, shape = roles[name], tensors[name][1]
        missed = role.module not in routers and _is_missed(role, shape, smallest)
        kept.append(Kept(name, dtype, shape, math.prod(shape) * _itemsize(dtype), reason, missed, role.made))

    for name in sorted(tensors, key=natural):
        dtype, shape = narrow.get(name, tensors[name][0]), tensors[name][1]
        role, reason = roles[name], wanted[name]
        width = DENSE if reason else bits(role.module)
        if width == DENSE:
            keep(name, dtype, reason or "left dense by --bits")
            continue
        budgeted = chosen.get(role.module) if chosen else None
        rows, columns = oriented_shape(role.kind, _one(role, shape))
        quant, instead = _quant(policy, width, budgeted, role.kind, rows)
        if policy.serve and (reason := why_not_served(policy, quant, columns, role.kind)):
            keep(name, dtype, reason)
            continue
        experts = shape[0] if _is_stack(role) else 0
        rank = budgeted.rank if budgeted else ranks(role.module)
        if rank >= min(rows, columns) and policy.rank_policy == "refuse":
            refused.append(f"{name} {rows}x{columns} with rank {rank}")
        check_solver(quant, policy.solve)
        rank, factors = min(rank, min(rows, columns) - 1), STORED[policy.adapter_dtype]
        source = tensors[name][0] if tensors[name][0] != dtype else ""
        place = (name, role.module, role.kind, (rows, columns), dtype)
        matrices.append(Matrix(*place, quant, rank, factors, source, role.made, instead, experts))
    if refused:
        raise UsageError(
            f"the rank must be below the shorter side of every matrix, and is not for {listed(refused)}; "
            f"give a smaller {option('rank')}, or {option('rank_policy', 'clamp')}"
        )
    alpha = float(ranks.default if policy.alpha is None else policy.alpha)
    scaling(alpha, ranks.default, policy.rslora)
    kept = _as_in_source(kept, roles, {roles[m.name].converter for m in matrices})
    matrices = _nested(matrices, roles)
    plan = Plan(tuple(matrices), tuple(kept), alpha, policy.rslora, ranks.default, policy.solve)
    _check_coverage(plan, policy)
    return plan


def _is_stack(role: Role) -> bool:
    return role.kind.startswith("experts")


def _one(role: Role, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of one expert, where the role is of a stack of them."""
    return shape[1:] if _is_stack(role) else shape


def _nested(matrices: list[Matrix], roles: Mapping[str, Role]) -> list[Matrix]:
    """With the layers of PEFT that lie outside of each stack's: a module is wrapped for its first stack first."""
    orders: dict[str, list[int]] = {}
    for m in matrices:
        orders.setdefault(m.module.rpartition(".")[0], []).extend([roles[m.name].order] if m.experts else [])

    def outside(m: Matrix) -> int:
        return sum(order > roles[m.name].order for order in orders[m.module.rpartition(".")[0]])

    return [replace(m, nested=outside(m)) if m.experts else m for m in matrices]


def _as_in_source(kept: list[Kept], roles: Mapping[str, Role], converters: set[str]) -> list[Kept]:
    """What is kept, by the names of the source; but as the model has it where the same converter makes a matrix."""
    result: dict[str, Kept] = {}
    for k in kept:
        if not k.made or roles[k.name].converter in converters:
            result[k.name] = k
            continue
        for tensor, shape in sources(k.made).items():
            size = math.prod(shape) * _itemsize(k.dtype)
            result[tensor] = Kept(tensor, k.dtype, shape, size, k.reason, k.missed)
    return list(result.values())


def _quant(policy: Policy, width: float, chosen: Choice | None, kind: str, rows: int) -> tuple[QuantSpec, str]:
    """How a matrix is stored, and why not as a trellis, where that was asked for and cannot hold it.

    The scalar code in its place is the one of the nearest width, of two the narrower.
    """
    stored = {**fields_of(QuantSpec, vars(policy)), **({"block_size": chosen.block_size} if chosen else {})}
    bits = chosen.bits if chosen else width
    if policy.serve:
        return served(policy, bits, stored["block_size"]), ""
    quant = quant_spec(policy.solve, **{**stored, "bits": bits, "code": policy.code})
    why = why_not(quant, kind, rows)
    if not why:
        return quant, ""
    bits = min(BITS, key=lambda width: (abs(width - bits), width))
    scalar = quant_spec(policy.solve, **{**stored, "bits": bits, "code": "auto"})
    return scalar, f"no trellis of {quant.bits} bits: {why}"


def _narrow(
    tensors: Mapping[str, tuple[str, tuple[int, ...]]], roles: Mapping[str, Role], policy: Policy
) -> dict[str, str]:
    """The dtype of every matrix whose weights are wider in the source: ``policy.dtype``.

    Unless that says which, a source is narrowed only if most of it is wide: in others, what is wide is so on purpose.
    Vectors take no room, and what is no parameter of the model may be anything.
    """
    if policy.dtype == "source":
        return {}
    wide = {name for name, (dtype, _) in tensors.items() if dtype in WIDE}
    if policy.dtype == "auto" and main_dtype(tensors) not in WIDE:
        return {}
    asked = STORED["bfloat16" if policy.dtype == "auto" else policy.dtype]
    return {name: asked for name in wide if len(tensors[name][1]) > 1 and roles[name].module}


def main_dtype(tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> str:
    """The dtype of most weights of a checkpoint, by safetensors' name."""
    counts = dict.fromkeys(FLOATS, 0)
    for dtype, shape in tensors.values():
        if dtype in counts:
            counts[dtype] += math.prod(shape)
    return max(counts, key=counts.__getitem__)


def nominal_bits(bits: str, plan: Plan) -> float:
    """The one number that stands for ``--bits`` in ``config.json``: as asked, or with patterns the last matrix's."""
    try:
        asked = float(bits)
    except ValueError:
        return plan.matrices[-1].quant.bits
    return int(asked) if asked == int(asked) else asked


def mean_bits(plan: Plan) -> float:
    """The one number that stands for a budget in ``config.json``: bits of a code, averaged over the weights."""
    return round(sum(m.quant.bits * m.numel for m in plan.matrices) / sum(m.numel for m in plan.matrices), 2)


def _check_coverage(plan: Plan, policy: Policy) -> None:
    if not plan.matrices:
        reasons = sorted({k.reason for k in plan.kept if len(k.shape) > 1})
        raise InputError(f"nothing to quantize: every matrix is kept ({listed(reasons)})")
    if plan.coverage < policy.min_coverage:
        missed = [f"{k.name} ({k.reason})" for k in plan.kept if k.missed]
        raise InputError(
            f"only {plan.coverage:.0%} of the layers' weights would be quantized, less than "
            f"{option('min_coverage')} {policy.min_coverage:.0%}; kept: {listed(missed, 3)}; lower "
            f"{option('min_coverage')} to accept that"
        )


def _smallest_matrix(shapes: list[tuple[int, ...]]) -> int:
    """Weights from which on a Parameter is taken for a matrix of the layers rather than a bias or a table.

    As many as the smallest quantized matrix has, or a square one of their typical width, if that is smaller.
    """
    widths = sorted(min(shape) for shape in shapes)
    return min(*(math.prod(shape) for shape in shapes), widths[len(widths) // 2] ** 2) if shapes else 0


def _is_missed(role: Role, shape: tuple[int, ...], smallest: int) -> bool:
    """Whether a kept tensor is a matrix of the layers that one would want quantized."""
    large = role.kind == "parameter" and math.prod(shape) >= smallest
    matrix = role.kind in ("linear", "conv1d") or _is_stack(role) or large
    return role.backbone and matrix and len(shape) > 1 and min(shape) > 1 and not set(role.module.split(".")) & HEADS


def _reason_to_keep(
    name: str,
    dtype: str,
    shape: tuple[int, ...],
    role: Role,
    embeddings: bool,
    ranks: Rules[int],
    routers: set[str],
) -> str:
    """Why a tensor stays as it is; empty if it is to be quantized."""
    parts = set(role.module.split("."))
    if role.keep:
        return role.keep
    if not role.module:
        return NO_PARAMETER
    if len(shape) < 2 or 0 in shape:
        return "empty" if 0 in shape else "a vector (norm or bias)"
    if role.module in routers:
        return "a router of experts"
    if role.kind == "parameter":
        return "a Parameter of its own, not the weight of a Linear, Conv1D or Embedding"
    shape = _one(role, shape)
    if role.kind == "other" or len(shape) > 2:
        return "not a Linear, Conv1D or Embedding weight"
    if role.kind == "embedding" and not embeddings:
        return "an embedding (--embeddings quantizes it)"
    if role.kind == "embedding" and min(shape) <= ranks(role.module):
        return "an embedding smaller than the rank"
    if role.tied:
        return f"tied to {listed(role.tied, 3)}"
    if parts & HEADS:
        return "a head or pooler"
    if not role.backbone:
        return "outside the backbone"
    if min(shape) < 2:
        return "one row or column: nothing to factorize"
    if dtype not in FLOATS:
        raise InputError(
            f"{quoted(name)}: dtype {dtype} cannot be quantized (a scale may be missing); wanted one of "
            f"{', '.join(FLOATS)}; start from the full-precision checkpoint"
        )
    return ""


def _rank_value(text: str) -> int:
    if whole(text) < 1:
        raise UsageError(f"{option('rank')}: {quoted(text)} is not a whole number of at least 1, or too large")
    return whole(text)


def _itemsize(dtype: str) -> int:
    return 1 if dtype == "BOOL" or dtype.startswith("F8") else int("".join(filter(str.isdigit, dtype))) // 8
