"""The options of a plan and of the solver, checked when they are made."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from loftq import codes
from loftq.errors import UsageError, checked_fields, option, quoted
from loftq.options import TABLE, check_fields, default, fields_of, is_text
from loftq.planning.budget import parse_budget
from loftq.planning.patterns import whole
from loftq.spec import QuantSpec, SolveSpec, solve_spec
from loftq.values import plain_inside

DENSE = 16  # as a number of bits: leave the matrix as it is


@checked_fields
@dataclass(frozen=True, kw_only=True)
class Policy:
    """Options of a plan; ``docs/usage.md`` documents every field under the option of its name.

    ``bits``, ``rank`` and ``budget`` may be given as numbers, ``budget_ranks`` as a list; they are kept as text.
    """

    bits: str = default("bits")
    code: str = default("code")
    block_size: int = default("block_size")
    scale_dtype: str = default("scale_dtype")
    double_quant: bool = default("double_quant")
    window: int = default("window")
    serve: str | None = default("serve")
    rank: str = default("rank")
    rank_policy: str = default("rank_policy")
    alpha: float | None = default("alpha")
    rslora: bool = default("rslora")
    embeddings: bool = default("embeddings")
    dtype: str = default("dtype")
    adapter_dtype: str = default("adapter_dtype")
    min_coverage: float = default("min_coverage")
    solve: SolveSpec = field(default_factory=SolveSpec)
    budget: str = default("budget")
    budget_ranks: str = default("budget_ranks")
    budget_solver: str = default("budget_solver")

    def __post_init__(self) -> None:
        for name in (f.name for f in fields(self) if f.name in TABLE and is_text(TABLE[f.name][0])):
            object.__setattr__(self, name, _text(name, getattr(self, name)))
        code = QuantSpec.code if self.code == "auto" else self.code
        QuantSpec(**{**fields_of(QuantSpec, vars(self)), "code": code, "bits": codes.get(code).widths[0]})
        check_fields(self, option)
        if not isinstance(self.solve, SolveSpec):
            raise UsageError(f"solve must be a SolveSpec, got {type(self.solve).__name__}")
        if self.serve and (self.double_quant or self.embeddings):
            raise UsageError(
                f"{option('serve', self.serve)} goes neither with {option('double_quant')} nor with "
                f"{option('embeddings')}: what they store has no form there; leave them out"
            )
        _check_budget(self)

    def to_dict(self) -> dict[str, Any]:
        """Plain values; without a budget none of its fields, so that earlier outputs are still known.

        So it is with the window, which only a trellis has, and with ``serve``.
        """
        values = asdict(self)
        for name in ("window", "serve"):
            if values[name] == default(name):
                del values[name]
        return values if self.budget else {k: v for k, v in values.items() if not k.startswith("budget")}


def _text(name: str, value: object) -> str:
    """An option that may be patterns or lists, as the command line has it."""
    value = plain_inside(value)
    if isinstance(value, list) and name == "budget_ranks":
        return ",".join(map(str, value))
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise UsageError(f"{option(name)}: wanted a number or text, got {quoted(repr(value))}")
    return str(value)


def _check_budget(policy: Policy) -> None:
    for rank in policy.budget_ranks.split(",") if policy.budget_ranks else ():
        if whole(rank) < 1:
            raise UsageError(
                f"{option('budget_ranks')}: {quoted(policy.budget_ranks)} is not a list of whole numbers of at least "
                "1, such as 8,16,32"
            )
    if not policy.budget:
        if policy.budget_ranks or policy.budget_solver != default("budget_solver"):
            raise UsageError(
                f"{option('budget_ranks')} and {option('budget_solver')} need a budget; give one: "
                f"{option('budget', 2.5)}"
            )
        return
    parse_budget(policy.budget)
    if "=" not in policy.bits and policy.bits not in (Policy.bits, str(DENSE)):
        raise UsageError(
            f"{option('bits', quoted(policy.bits))} and {option('budget', quoted(policy.budget))} both say how wide "
            "all matrices are; leave one out, or give patterns for those that the budget is not to choose: "
            f"{option('bits', 'down_proj=4,4')}"
        )


def make_policy(given: Mapping[str, Any], *, calibrated: bool = False) -> Policy:
    """The policy among ``given`` options, the solver's fields beside the others; None is as good as left out."""
    own, solver = fields_of(Policy, given), fields_of(SolveSpec, given)
    code = own.get("code", default("code"))
    return Policy(**{**own, "solve": solve_spec(given.get("preset"), calibrated=calibrated, code=code, **solver)})
