"""Fitted scales: never worse than others, near the best there is, of either sign; and the levels made for them."""

import pytest
import torch
from torch import Tensor

from loftq import codes
from loftq.errors import UsageError
from loftq.numerics import Quantized, dequantize, encode, fitted_scales, levels, nearest, normal_float, quantize
from loftq.numerics.codebooks import halfway
from loftq.spec import QuantSpec, SolveSpec, check_solver, stored_bytes
from quantizers import WIDTHS

SPECS = {
    f"{code}{bits}{'-double' * double}": QuantSpec(bits=bits, code=code, double_quant=double)
    for code, bits in WIDTHS
    for double in (False, True)
    if not codes.get(code).per_tensor
}
specs = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
LOPSIDED = [spec for spec in SPECS.values() if spec.codebook.lopsided(spec.bits) and not spec.double_quant]


def weight(seed: int = 0) -> Tensor:
    """Gaussian rows, heavy-tailed ones, ones off centre, and some zeros."""
    w = torch.randn(24, 200, generator=torch.Generator().manual_seed(seed)) * 0.02
    w[6:12] = (w[6:12] * 50) ** 3
    w[12:18] += 0.03
    w[3, 64:128] = 0
    return w


def errors(w: Tensor, quantized: Quantized, spec: QuantSpec) -> Tensor:
    """Squared errors in float64, of every block, or of the whole matrix if its scales are coupled."""
    squares = (w.double() - dequantize(quantized, spec).double()).square()
    whole = squares[:, :192].unflatten(1, (3, 64)).sum(-1)
    return squares.sum() if spec.double_quant else torch.cat([whole, squares[:, 192:].sum(1, keepdim=True)], 1)


@pytest.mark.sampled(3)
@specs
def test_no_block_is_worse_than_by_the_formula(spec: QuantSpec) -> None:
    w = weight()
    fitted, formula = nearest(w, fitted_scales(w, spec), spec), quantize(w, spec)
    ours, theirs = errors(w, fitted, spec), errors(w, formula, spec)
    assert (ours <= theirs * (1 + 1e-6)).all()
    assert ours.sum() < 0.97 * theirs.sum() or spec.bits == 8
    sizes = [sum(t.numel() * t.element_size() for t in encode(q, spec).values()) for q in (fitted, formula)]
    assert sizes == [stored_bytes(spec, 24, 200)] * 2


@pytest.mark.sampled(3)
@specs
def test_no_block_is_worse_than_with_earlier_scales(spec: QuantSpec) -> None:
    """From scales fitted to another matrix: whatever they are, they are a candidate as they are stored."""
    for other in (weight(1), weight() * 1.01, torch.zeros(24, 200), weight() * 1e4):
        earlier = fitted_scales(other, spec)
        w = weight()
        again = nearest(w, fitted_scales(w, spec, earlier), spec)
        before = errors(w, nearest(w, earlier, spec), spec)
        assert (errors(w, again, spec) <= before * (1 + 1e-6)).all()


@pytest.mark.sampled(4)
@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("code", ["nf", "lloyd", "uniform"])
def test_close_to_the_best_scale_there_is(code: str, bits: int) -> None:
    """Against 2000 scales of either sign for each of 128 Gaussian blocks; at most 3 % more squared error."""
    spec = QuantSpec(bits=bits, code=code)
    w = torch.randn(64, 128, generator=torch.Generator().manual_seed(2))
    found = w - dequantize(nearest(w, fitted_scales(w, spec), spec), spec)
    blocks, table = w.view(-1, 1, 64), levels(spec.code, spec.bits)
    best = torch.full((len(blocks),), torch.inf)
    reach = blocks.abs().amax(-1, keepdim=True) / table.abs().max()
    for part in torch.linspace(0.2, 1.2, 1000).split(50):
        for sign in (1, -1):
            scale = sign * part[:, None] * reach
            values = table[torch.bucketize(blocks / scale, halfway(table))] * scale
            best = torch.minimum(best, (blocks - values).square().sum(-1).amin(1))
    assert found.square().sum() <= 1.03 * best.sum()


@pytest.mark.parametrize("spec", LOPSIDED, ids=str)
def test_scales_of_either_sign(spec: QuantSpec) -> None:
    """Where levels are lopsided about half of the scales are negative, and the mirror image has those of other sign."""
    w = weight()
    scale = fitted_scales(w, spec)["weight_scale"]
    assert 0.2 < (scale < 0).float().mean() < 0.8
    if spec.code == "lloyd":
        assert torch.equal(fitted_scales(-w, spec)["weight_scale"], -scale)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_lloyd_levels_are_where_gaussian_blocks_want_them(bits: int) -> None:
    """One more round of their algorithm leaves them: each is the scale-weighted mean of what it stands for."""
    spec, table = QuantSpec(bits=bits, code="lloyd", scale_dtype="float32"), levels("lloyd", bits)
    w = torch.randn(4000, 64, generator=torch.Generator().manual_seed(3))
    quantized = nearest(w, fitted_scales(w, spec), spec)
    scale = quantized.scales["weight_scale"].expand_as(w)
    codes = quantized.codes.flatten().long()
    products, squares = torch.zeros(2, len(table)).double()
    products.index_add_(0, codes, (w * scale).flatten().double())
    squares.index_add_(0, codes, scale.square().flatten().double())
    again = products / squares
    torch.testing.assert_close((again / again.max()).float(), table, rtol=0, atol=0.01)
    assert table.max() == 1
    for other in (normal_float(bits), torch.linspace(-1, 1, 2**bits)):
        code = "nf" if torch.equal(other, normal_float(bits)) else "uniform"
        rival = QuantSpec(bits=bits, code=code, scale_dtype="float32")
        theirs = nearest(w, fitted_scales(w, rival), rival)
        error = [(w - dequantize(q, s)).norm() for q, s in ((quantized, spec), (theirs, rival))]
        assert error[0] < 0.98 * error[1]


def test_what_cannot_be_fitted_is_refused() -> None:
    with pytest.raises(UsageError, match="uniform-tensor has none; use code uniform"):
        check_solver(QuantSpec(bits=4, code="uniform-tensor"), SolveSpec(scales="fitted"))
    with pytest.raises(UsageError, match="lloyd has 2, 3 or 4 bits; use code nf for 8"):
        QuantSpec(bits=8, code="lloyd")
