"""The low-rank term for a given base: closest in its metric, taken only where it helps."""

import pytest
import torch

from loftq.errors import NumericalError, UsageError
from loftq.numerics import Metric, Moments, product_square
from loftq.solver import fit_adapter, solve
from loftq.spec import QuantSpec, SolveSpec

SHAPE, RANK = (24, 40), 4


@pytest.fixture
def pair():
    """A weight, and a base that is a rounding of it."""
    weight = torch.randn(SHAPE)
    return weight, (weight * 2).round() / 2


def moments(tokens=200, seed=3, held=None):
    """Of inputs some of which are a hundred times as large as others."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, SHAPE[1], generator=generator) * torch.logspace(-1, 1, SHAPE[1])
    fit = Metric(columns=x.T @ x / tokens)
    return Moments(fit, fit if held is None else held, tokens)


def test_the_error_left_is_that_of_the_discarded_singular_values(pair):
    weight, base = pair
    start = fit_adapter(weight, base, RANK)
    tail = torch.linalg.svdvals((weight - base).double())[RANK:].norm() / weight.double().norm()
    assert start.errors[1] == pytest.approx(tail.item(), rel=1e-5)
    assert start.errors[0] == pytest.approx(((weight - base).norm() / weight.norm()).item(), rel=1e-6)
    assert start.output_errors == start.errors
    assert not start.reason


@pytest.mark.parametrize("svd", ["auto", "exact", "randomized"])
def test_it_is_the_svd_step_of_the_solver(svd):
    """Over the base that QLoRA's solution has, the start is LoftQ's of one step."""
    from loftq.numerics import dequantize

    weight, quant = torch.randn(64, 96), QuantSpec(bits=2)
    solution = solve(weight, quant, 8, SolveSpec(steps=1, svd=svd), "w")
    start = fit_adapter(weight, dequantize(solution.quantized, quant), 8, svd=svd, name="w")
    assert start.errors == pytest.approx(solution.errors, rel=1e-4)
    torch.testing.assert_close(start.b @ start.a, solution.b @ solution.a, rtol=0, atol=1e-3)


def test_more_rank_leaves_less(pair):
    errors = [fit_adapter(*pair, rank).errors[1] for rank in (1, 2, 8, 24)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-6


def test_a_metric_is_minimised_instead_of_the_weights_norm(pair):
    weight, base = pair
    known = moments()
    plain, start = fit_adapter(weight, base, RANK), fit_adapter(weight, base, RANK, moments=known)
    left = known.held.norm(weight - base - plain.b @ plain.a) / known.held.norm(weight)
    assert start.output_errors[1] < 0.9 * left
    assert start.errors[1] > plain.errors[1]
    assert product_square(start.b, start.a) <= (weight - base).norm() ** 2


def test_a_term_that_does_not_help_on_held_out_tokens_is_dropped(pair):
    """Fitted to the first input and the first output alone, it does harm to the second of both."""
    weight, base = pair[0], pair[0].clone()
    base[:2, 0] -= torch.tensor([1.0, 10.0])
    base[0, 1] -= 1.0
    first, second = torch.zeros(SHAPE[1]), torch.zeros(SHAPE[1])
    first[0] = second[1] = 1.0
    rows = torch.full(SHAPE[:1], 1e-3)
    rows[0] = 1.0
    fit, held = Metric(first, rows), Metric(second)
    start = fit_adapter(weight, base, 1, moments=Moments(fit, held, 1))
    assert "held out" in start.reason
    assert not start.b.any()
    assert start.output_errors[1] == start.output_errors[0] > 0
    assert not fit_adapter(weight, base, 1, moments=Moments(fit, fit, 1)).reason, "the held-out tokens decided"


def test_the_base_is_the_original(pair):
    weight, _ = pair
    start = fit_adapter(weight, weight.clone(), RANK, name="w")
    assert start.reason
    assert not start.b.any()
    assert start.a.any(), "both factors zero would never learn"
    assert start.errors == (0.0, 0.0)
    assert torch.equal(start.factors(4.0)[1], start.a)
    assert torch.equal(start.a, fit_adapter(weight, weight, RANK, name="w").a)


@pytest.mark.parametrize("s", [0.25, 1.0, 16.0])
def test_the_scaling_is_divided_out_evenly(pair, s):
    start = fit_adapter(*pair, RANK)
    b, a = start.factors(s)
    torch.testing.assert_close(s * b @ a, start.b @ start.a)
    assert b.norm() / a.norm() == pytest.approx((start.b.norm() / start.a.norm()).item(), rel=1e-5)


def test_refusals(pair):
    weight, base = pair
    with pytest.raises(UsageError, match="rank 25 does not fit"):
        fit_adapter(weight, base, 25)
    with pytest.raises(NumericalError, match="base's values"):
        fit_adapter(weight, base.index_fill(0, torch.tensor(3), float("nan")), RANK)
    with pytest.raises(NumericalError, match="NaN or infinite"):
        fit_adapter(weight.index_fill(0, torch.tensor(3), float("inf")), base, RANK)
