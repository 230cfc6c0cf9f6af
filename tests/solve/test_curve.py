"""Error curves: of every rank the error that the solver would leave after one step, in any metric."""

import pytest
import torch

from loftq.errors import NumericalError, UsageError
from loftq.numerics import Metric, best_factors, dequantize
from loftq.solver import errors_by_rank, solve
from loftq.spec import QuantSpec, SolveSpec

QUANTS = [QuantSpec(bits=2), QuantSpec(bits=3, block_size=32), QuantSpec(bits=4, code="affine", double_quant=True)]
RANKS = (1, 4, 9)


def matrix(rows=40, columns=70):
    return torch.randn(rows, columns) * torch.rand(columns)


def metrics(rows=40, columns=70):
    x = torch.randn(200, columns) * (1 + 3 * torch.rand(columns))
    whole = x.T @ x / len(x)
    return {
        "weights": None,
        "diagonal": Metric(whole.diagonal()),
        "full": Metric(whole),
        "fisher": Metric(whole, 0.1 + torch.rand(rows)),
    }


@pytest.mark.parametrize("scales", ["formula", "fitted"])
def test_it_is_the_error_of_one_step(scales):
    weight, spec = matrix(), SolveSpec(steps=1, scales=scales)
    found = errors_by_rank(weight, QUANTS, RANKS, spec)
    for quant in QUANTS:
        solved = [solve(weight, quant, rank, spec).errors[1] ** 2 for rank in RANKS]
        assert found[quant] == pytest.approx(solved, rel=1e-4)


@pytest.mark.parametrize("kind", metrics())
def test_in_every_metric_it_is_what_the_best_factors_leave(kind):
    weight, metric = matrix(), metrics()[kind]
    found = errors_by_rank(weight, QUANTS, RANKS, SolveSpec(steps=1), metric=metric)
    measure = metric or Metric()
    for quant in QUANTS:
        error = weight - dequantize(solve(weight, quant, 1, SolveSpec(steps=0)).quantized, quant)
        for rank, square in zip(RANKS, found[quant], strict=True):
            b, a = best_factors(error, rank, measure)
            assert square == pytest.approx((measure.norm(error - b @ a) / measure.norm(weight)) ** 2, rel=1e-3)


def test_more_bits_and_more_rank_leave_less():
    found = errors_by_rank(matrix(), [QuantSpec(bits=b) for b in (2, 3, 4, 8)], (1, 2, 8, 40), SolveSpec())
    errors = torch.tensor(list(found.values()), dtype=torch.float64)
    assert (errors.diff(dim=1) < 0).all()
    assert (errors[:, :-1].diff(dim=0) < 0).all()
    assert (errors[:, -1] < 1e-6).all(), "of full rank"


def test_a_zero_adapter_has_no_rank():
    found = errors_by_rank(matrix(), QUANTS, RANKS, SolveSpec(steps=0))
    assert all(len(set(row)) == 1 for row in found.values())


@pytest.mark.parametrize("factor", [2.0**-40, 1.0, 2.0**40])
def test_the_scale_of_a_matrix_does_not_matter(factor):
    weight = matrix()
    once = errors_by_rank(weight, QUANTS[:1], RANKS, SolveSpec(), metric=Metric(torch.ones(70)))
    scaled = errors_by_rank(weight * factor, QUANTS[:1], RANKS, SolveSpec())
    assert scaled[QUANTS[0]] == pytest.approx(once[QUANTS[0]], rel=1e-3)


def test_a_large_matrix_by_the_randomized_svd_is_repeatable():
    weight, spec = matrix(90, 200), SolveSpec(svd="randomized")
    first, again = (errors_by_rank(weight, QUANTS[:1], (2, 5), spec, "name") for _ in range(2))
    exact = errors_by_rank(weight, QUANTS[:1], (2, 5), SolveSpec(svd="exact"))
    assert first == again
    assert first[QUANTS[0]] == pytest.approx(exact[QUANTS[0]], rel=1e-2)


def test_zeros_have_no_error():
    assert errors_by_rank(torch.zeros(20, 64), QUANTS, (1,), SolveSpec()) == {quant: [0.0] for quant in QUANTS}


def test_refusals():
    with pytest.raises(UsageError, match="rank 41 does not fit"):
        errors_by_rank(matrix(), QUANTS, (4, 41), SolveSpec())
    with pytest.raises(UsageError, match="scales are fitted to blocks"):
        errors_by_rank(matrix(), [QuantSpec(bits=2, code="uniform-tensor")], (4,), SolveSpec(scales="fitted"))
    weight = matrix()
    weight[3, 4] = torch.nan
    with pytest.raises(NumericalError, match=r"1 of 2800 values are NaN or infinite"):
        errors_by_rank(weight, QUANTS, (4,), SolveSpec())
