"""Norms against float64, at every size that a checkpoint may hold."""

import itertools

import pytest
import torch

from loftq.numerics import frobenius, product_square

WIDE = [torch.float32, torch.bfloat16, torch.float64]


@pytest.mark.parametrize(
    ("dtype", "size"), [*itertools.product(WIDE, [1e-42, 1e-30, 1e-5, 1.0, 1e4, 1e30]), (torch.float16, 1e-5)]
)
def test_frobenius(dtype: torch.dtype, size: float) -> None:
    matrix = (torch.randn(40, 300, dtype=torch.float64) * size).to(dtype)
    wide = torch.linalg.norm(matrix.double()).item()
    assert frobenius(matrix) == pytest.approx(wide, rel=1e-6)  # 300 squares added in float32: 2e-7 seen


def test_frobenius_shows_what_is_not_finite() -> None:
    for bad in (float("inf"), float("nan")):
        matrix = torch.randn(4, 5)
        matrix[2, 3] = bad
        assert not torch.tensor(frobenius(matrix)).isfinite()
    assert frobenius(torch.zeros(3, 4)) == 0


def test_product_square() -> None:
    b, a = torch.randn(30, 7), torch.randn(7, 50)
    assert product_square(b, a) == pytest.approx((b.double() @ a.double()).square().sum().item(), rel=1e-12)
