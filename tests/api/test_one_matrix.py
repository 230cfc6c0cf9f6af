"""What a solution tells of itself, and second moments of the caller's own."""

import re

import numpy as np
import pytest
import torch

import loftq
from loftq.errors import UsageError
from loftq.numerics import Metric, decode, encode

GENERATOR = torch.Generator().manual_seed(0)
WEIGHT = torch.randn(24, 40, generator=GENERATOR)
INPUTS = torch.randn(300, 40, generator=GENERATOR) * torch.linspace(0.1, 2, 40)
H = INPUTS.T @ INPUTS / 300


@pytest.fixture(scope="module")
def solution():
    return loftq.quantize_weight(WEIGHT, bits=3, rank=4, block_size=16, double_quant=True)


def test_the_formula_can_be_evaluated(solution):
    left = WEIGHT - solution.reconstruct()
    assert (left.norm() / WEIGHT.norm()).item() == pytest.approx(solution.error, rel=1e-5)
    assert solution.reconstruct().dtype == torch.float32
    torch.testing.assert_close(solution.dequantize() + solution.product(), solution.reconstruct())
    assert torch.equal(solution.product(), solution.b @ solution.a)


def test_it_knows_how_it_is_stored(solution):
    assert solution.quant == loftq.QuantSpec(bits=3, code="nf", block_size=16, double_quant=True)
    stored = encode(solution.quantized, solution.quant)
    assert torch.equal(decode(stored, solution.quant, 40), solution.dequantize())


def test_it_says_what_it_is_in_one_line(solution):
    assert len(repr(solution)) < 120
    assert re.fullmatch(r"Solution\(24x40, 3 bits nf, rank 4, error 0\.\d{4} .*, step \d of 5\)", repr(solution))
    assert solution.output_error is None
    calibrated = loftq.quantize_weight(WEIGHT, bits=2, rank=4, moments=H)
    assert f"of outputs {calibrated.output_error:.4f}" in repr(calibrated)


@pytest.mark.parametrize(
    "given",
    [H, H.numpy(), H.double().numpy(), 300 * H, loftq.Moments.of(H)],
    ids=["tensor", "numpy", "float64", "a sum", "moments"],
)
def test_own_second_moments(given):
    solution = loftq.quantize_weight(WEIGHT, bits=2, rank=4, preset="qera-full", moments=given)
    outputs = INPUTS @ (WEIGHT - solution.reconstruct()).T
    assert solution.output_error == pytest.approx((outputs.norm() / (INPUTS @ WEIGHT.T).norm()).item(), rel=1e-4)
    other = loftq.quantize_weight(WEIGHT, bits=2, rank=4, preset="svd")  # of the same Q the best for the weights
    assert torch.equal(solution.dequantize(), other.dequantize())
    assert solution.output_error < Metric(H).norm(WEIGHT - other.reconstruct()) / Metric(H).norm(WEIGHT)


def test_rounding_is_no_fault():
    """Few tokens, whose H has no full rank; sums in another order; 16 bits."""
    few = INPUTS[:10].T @ INPUTS[:10]
    uneven = H + H.abs().max() * 1e-6 * torch.randn(40, 40, generator=GENERATOR)
    for given in (few, uneven, H.bfloat16(), torch.zeros(40, 40)):
        assert loftq.quantize_weight(WEIGHT, bits=2, rank=4, moments=given).output_error is not None


OFF_DIAGONAL = torch.eye(40).roll(20, 0)  # symmetric, its trace 0
CORNERS = torch.zeros(40, 40)  # a pair whose correlation would be 1.2
CORNERS[20, 39] = CORNERS[39, 20] = 1
WRONG = {
    "inputs": (INPUTS, "got shape (300, 40)"),
    "another width": (torch.eye(24), "second moments of shape (40, 40), got shape (24, 24)"),
    "a diagonal": (H.diagonal(), "got shape (40,)"),
    "no matrix": ({}, "got dict"),
    "integers": (torch.eye(40).long(), "got int64"),
    "sparse": (H.to_sparse(), "dense and in memory"),
    "meta": (H.to("meta"), "dense and in memory"),
    "infinite": (H / 0, "not all finite"),
    "lopsided": (H.tril(), "symmetric"),
    "negative": (-H, "none negative"),
    "no squares": (OFF_DIAGONAL, "the largest of all entries"),
    "indefinite": (H.where(CORNERS == 0, 1.2 * (H[20, 20] * H[39, 39]).sqrt()), "positive semidefinite"),
    "objects": (np.full((40, 40), None), "numpy array of object"),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_no_second_moments_are(what):
    given, word = WRONG[what]
    with pytest.raises(UsageError, match=re.escape(word)):
        loftq.quantize_weight(WEIGHT, bits=2, rank=4, preset="qera-full", moments=given)
