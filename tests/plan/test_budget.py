"""Budgets: within the limit, near the optimum, never worse for more; and what they choose from."""

import itertools
import random
import sys

import pytest
from test_plan import PROJECTIONS, model

from harness import Child
from loftq.errors import UsageError
from loftq.planning import (
    Choice,
    Policy,
    allocate,
    candidates,
    curve,
    first_layers,
    frontier,
    limit,
    make,
    mean_bits,
    parse_size,
)
from loftq.planning.candidates import bytes_of
from loftq.spec import QuantSpec, stored_bytes


def curves(matrices, seed=0, widths=(2, 3, 4, 8)):
    """Matrices of several sizes and sensitivities, four widths and three blocks each, some of them bad bargains."""
    rng, found = random.Random(seed), {}
    for i in range(matrices):
        size, weight = rng.choice([1 << 17, 1 << 18, 77_000]), rng.lognormvariate(0, 1)
        found[f"m{i}"] = [
            Choice(
                bits, block, 16, size * bits // 8 + 2 * size // block, size * weight * 4.0**-bits * rng.uniform(1, 1.3)
            )
            for bits in widths
            for block in (32, 64, 128)
        ]
    return found


def limits(found, shares=(0.0, 0.1, 0.35, 0.8, 1.0)):
    path = frontier(found)
    return [int(path[0][0] + share * (path[-1][0] - path[0][0])) for share in shares]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("method", ["greedy", "milp"])
def test_sums_are_right_and_within_the_limit(method, seed):
    found = curves(40, seed)
    for allowed in limits(found):
        best = allocate(found, allowed, method)
        assert best.bytes == sum(c.bytes for c in best.chosen.values()) <= allowed
        assert best.error == pytest.approx(sum(c.error for c in best.chosen.values()), rel=1e-12)
        assert best.chosen.keys() == found.keys()
        assert all(c in found[name] for name, c in best.chosen.items())


@pytest.mark.sampled(3)
@pytest.mark.parametrize("seed", range(4))
def test_greedy_is_near_the_optimum(seed):
    """Up to 4 bits. From there to 8 the error falls to a 256th, so that a single matrix may decide."""
    found = curves(60, seed, (2, 3, 4))
    for allowed in limits(found, (0.1, 0.35, 0.6, 0.85)):
        greedy, exact = allocate(found, allowed), allocate(found, allowed, "milp")
        assert exact.error <= greedy.error <= 1.01 * exact.error


@pytest.mark.parametrize("method", ["greedy", "milp"])
def test_more_bytes_never_leave_more_error(method):
    found = curves(7, 3)  # few matrices: much is left over, and filled
    low, high = limits(found, (0.0, 1.0))
    steps = 400 if method == "greedy" else 12
    errors = [allocate(found, low + (high - low) * i // steps, method).error for i in range(steps + 1)]
    assert all(later <= earlier for earlier, later in itertools.pairwise(errors))


def test_more_choices_are_never_worse_for_the_optimum():
    found, rng = curves(30, 5), random.Random(0)
    fewer = {name: rng.sample(choices, 6) for name, choices in found.items()}
    allowed = max(frontier(fewer)[0][0], limits(found, (0.4,))[0])
    assert allocate(found, allowed, "milp").error <= allocate(fewer, allowed, "milp").error * (1 + 2e-6)


def test_the_order_of_matrices_and_choices_does_not_matter():
    """Not even among matrices that are alike."""
    found = curves(20, 1)
    found |= {f"again {name}": choices for name, choices in found.items()}
    turned = {name: found[name][::-1] for name in reversed(found)}
    for allowed in limits(found):
        assert allocate(found, allowed).chosen == allocate(turned, allowed).chosen


@pytest.mark.parametrize("method", ["greedy", "milp"])
def test_a_limit_too_small_names_the_least(method):
    found = curves(5)
    least = sum(min(c.bytes for c in choices) for choices in found.values())
    assert allocate(found, least, method).bytes == least
    with pytest.raises(UsageError, match=f"the least possible is {least:,} bytes"):
        allocate(found, least - 1, method)


@pytest.mark.parametrize("method", ["greedy", "milp"])
def test_a_limit_above_everything_gives_the_best_of_all(method):
    found = curves(9, 2)
    best = allocate(found, 10**12, method)
    assert best.chosen == {name: min(choices, key=lambda c: (c.error, c.bytes)) for name, choices in found.items()}


def test_the_frontier_goes_from_the_cheapest_to_the_best_and_is_met_by_budgets():
    found = curves(12, 4)
    path = frontier(found)
    assert path[0][0] == sum(min(c.bytes for c in choices) for choices in found.values())
    assert path[-1][1] == pytest.approx(allocate(found, 10**12).error)
    assert all(b[0] > a[0] and b[1] < a[1] for a, b in itertools.pairwise(path))
    for size, error in path[:: len(path) // 5]:
        assert allocate(found, size).error == pytest.approx(error)


def test_a_matrix_that_is_not_changed_by_anything_gets_the_cheapest():
    """Such as one of zeros, of which every choice leaves nothing."""
    found = {**curves(3), "zeros": [Choice(b, 64, 4, 100 * b, 0.0) for b in (4, 2, 3)]}
    for method in ("greedy", "milp"):
        assert allocate(found, 10**9, method).chosen["zeros"].bits == 2


def test_the_optimum_needs_scipy_and_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy", None)
    with pytest.raises(UsageError, match=r"milp' needs SciPy: pip install 'loftq\[budget\]'"):
        allocate(curves(2), 10**9, "milp")


@pytest.mark.slow
def test_the_optimum_prints_nothing():
    """HiGHS does, for its developers, on this instance."""

    def solved():
        found = curves(40, 0)
        for most in limits(found, (0.2, 0.5)):
            allocate(found, most, "milp")

    ended = Child(solved).ended()
    assert (ended.code, ended.out) == (0, "")


# What a policy lets it choose from


def policy(**options):
    return Policy(**{"budget": "2.5", "rank": "4", "adapter_dtype": "float32", **options})


def chosen_from(**options):
    asked = policy(**options)
    plan = make(*model(), asked)
    return plan, candidates(plan, asked)


def test_all_widths_and_three_blocks():
    plan, found = chosen_from(block_size=32)
    assert found.keys() == {m.module for m in plan.matrices}
    for module in found:
        assert {(c.quant.bits, c.quant.block_size) for c in found[module]} == {
            (bits, block) for bits in (2, 3, 4) for block in (16, 32, 64)
        }
        assert {c.ranks for c in found[module]} == {(4,)}


@pytest.mark.parametrize(("budget", "code", "widest"), [("4.25", "nf", 4), ("4.3", "nf", 8), ("4.3", "lloyd", 4)])
def test_8_bits_are_for_more_than_4_everywhere(budget, code, widest):
    _, found = chosen_from(budget=budget, code=code, bits="q_proj=2,4")
    assert max(c.quant.bits for c in found["model.layers.0.mlp.up_proj"]) == widest


def test_a_code_without_blocks_has_no_blocks_to_choose_from():
    _, found = chosen_from(code="uniform-tensor")
    assert {c.quant.block_size for choices in found.values() for c in choices} == {64}


def test_a_trellis_is_measured_at_whole_widths_and_has_all_rates_between():
    plan, found = chosen_from(code="trellis", budget_ranks="2", budget="1.5")
    matrix = next(m for m in plan.matrices if m.module.endswith("up_proj"))
    mine = found[matrix.module]
    assert [c.quant for c in mine] == [QuantSpec(bits=bits, code="trellis") for bits in (1, 2, 3, 4)]
    errors = {c.quant: [4.0**-c.quant.bits, 2 * 4.0**-c.quant.bits] for c in mine}
    choices = curve(matrix, mine, errors)
    assert sorted({c.bits for c in choices}) == [rate / 16 for rate in range(16, 65)]
    for choice in choices:
        assert choice.error == pytest.approx(matrix.numel * 4.0**-choice.bits * (1 if choice.rank == 2 else 2))
        assert choice.bytes == bytes_of(matrix, QuantSpec(bits=choice.bits, code="trellis"), choice.rank)
    scalar = found["model.layers.0.self_attn.k_proj"]  # 16 rows hold no trellis
    assert {c.quant.code for c in scalar} == {"nf"}
    assert len(scalar) == 9


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"code": "trellis", "embeddings": True},
        {"bits": "q_proj=4,2.5"},
        {"bits": "q_proj=1.5,4", "embeddings": True},
        {"code": "fp4", "block_size": 32},
    ],
    ids=str,
)
def test_what_is_measured_is_what_a_choice_makes(options):
    """8 bits among the widths, and a last value of ``bits`` that does not count."""
    asked = policy(budget="9", **options)
    plan, found = chosen_from(budget="9", **options)
    for place in range(max(map(len, found.values()))):
        taken = {module: mine[place % len(mine)] for module, mine in found.items()}
        chosen = {module: Choice(c.quant.bits, c.quant.block_size, 4, 0, 0.0) for module, c in taken.items()}
        matrices = make(*model(), asked, chosen).matrices
        assert {m.module: m.quant for m in matrices} == {module: c.quant for module, c in taken.items()}
    assert plan.coverage == 1.0


def test_patterns_pin():
    _, found = chosen_from(bits="layers.1=16,up_proj=8,4", rank="down_proj=6,4", budget_ranks="2,8")
    assert [c.quant for c in found["model.layers.0.mlp.up_proj"]] == [QuantSpec(bits=8)]
    assert {c.ranks for c in found["model.layers.0.mlp.up_proj"]} == {(2, 4, 8)}
    assert {c.ranks for c in found["model.layers.0.mlp.down_proj"]} == {(6,)}
    assert len(found["model.layers.0.mlp.down_proj"]) == 9
    assert len(found) == len(PROJECTIONS)


def test_a_rank_that_does_not_fit_a_matrix_is_not_among_its_ranks():
    _, found = chosen_from(budget_ranks="8,16,32")
    assert {module.split(".")[-1]: choices[0].ranks for module, choices in found.items()} == {
        "q_proj": (4, 8, 16, 32), "k_proj": (4, 8), "up_proj": (4, 8, 16, 32), "down_proj": (4, 8, 16, 32)
    }  # fmt: skip


def test_what_may_be_spent():
    plan, _ = chosen_from()
    weights, kept = sum(m.numel for m in plan.matrices), sum(k.bytes for k in plan.kept)
    adapter = sum(4 * m.rank * sum(m.shape) for m in plan.matrices)
    assert limit(plan, policy(budget="2.5")) == int(2.5 * weights / 8) + adapter
    assert limit(plan, policy(budget="1MB")) == 10**6 - kept
    uniform = sum(stored_bytes(QuantSpec(bits=2), *m.shape) for m in plan.matrices)
    assert limit(plan, policy(budget=f"{8 * uniform / weights}")) == uniform + adapter


@pytest.mark.parametrize("budget", ["2.0", "25KB"])
def test_the_least_that_is_named_is_enough(budget):
    plan, _ = chosen_from()
    with pytest.raises(UsageError, match=f"budget {budget} is too small") as caught:
        limit(plan, policy(budget=budget))
    least = str(caught.value).partition(" take ")[2].partition(";")[0].removesuffix(" bits")
    assert limit(plan, policy(budget=least)) > 0


def test_a_choice_comes_before_the_policy():
    chosen = {f"model.layers.{i}.{p}": Choice(3, 32, 2 + i, 1, 0.0) for i in range(2) for p in PROJECTIONS}
    plan = make(*model(), policy(), chosen)
    assert {m.quant for m in plan.matrices} == {QuantSpec(bits=3, block_size=32)}
    assert [m.rank for m in plan.matrices] == [2] * 4 + [3] * 4
    assert plan.rank == 4
    assert plan.digest() != make(*model(), policy()).digest()
    assert mean_bits(plan) == 3


def test_a_mean_of_widths():
    plan = make(*model(), Policy(bits="layers.0=4,2", rank="4"))
    assert mean_bits(plan) == 3


def test_the_papers_rule_for_every_number_of_layers():
    tensors, roles = model(layers=6)
    asked = policy(bits="down_proj=8,4")
    plans = first_layers(make(tensors, roles, asked), tensors, roles, asked)
    assert [{int(m.module.split(".")[2]) for m in plan.matrices if m.quant.bits == 4} for plan in plans] == [
        set(range(k)) for k in range(7)
    ]


def test_no_layers_no_rule():
    tensors, roles = model(layers=2)
    flat = {name: type(role)(role.module, role.kind, role.backbone) for name, role in roles.items()}
    assert first_layers(make(tensors, flat, policy()), tensors, flat, policy()) == []


def test_without_a_budget_nothing_is_new():
    assert not any(key.startswith("budget") for key in Policy().to_dict())
    assert policy().to_dict()["budget"] == "2.5"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": "0"}, "budget: 0 is neither an average of bits per weight"),
        ({"budget": "17"}, "nor a size, such as 300MB"),
        ({"budget": "nan"}, "budget: nan is neither"),
        ({"budget": "much"}, "budget: much is neither"),
        ({"budget": "-3MB"}, "budget: '-3MB' is not a size"),
        ({"budget": f"{'9' * 400}MB"}, "budget: '9+… is not a size"),
        ({"budget": "0.0001KB"}, r"budget: '0\.0001KB' is not a size"),
        ({"bits": "2"}, "bits='2' and budget='2.5' both say how wide all matrices are"),
        ({"bits": "2.5"}, "bits='2.5' and budget='2.5' both say"),
        ({"budget_ranks": "8,,16"}, "budget_ranks: 8,,16 is not a list"),
        ({"budget_ranks": "0"}, "budget_ranks: 0 is not a list"),
        ({"budget_ranks": "9" * 6000}, "budget_ranks: 9+… is not a list"),
        ({"budget_solver": "gurobi"}, "budget_solver must be one of greedy, milp"),
        ({"budget": "", "budget_ranks": "8"}, "need a budget"),
        ({"budget": "", "budget_solver": "milp"}, "need a budget"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(UsageError, match=message):
        policy(**options)


def test_sizes_are_parsed():
    assert [parse_size("--budget", text) for text in ("1KB", "2.5mb", "3GB")] == [1000, 2_500_000, 3 * 10**9]
