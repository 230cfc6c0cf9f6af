"""The same numbers as bitsandbytes: tables, NF4 codes, and the statistics of double quantization."""

import pytest
import torch
from torch import Tensor

from loftq.numerics import dequantize, dynamic_8bit, normal_float, quantize, scale_and_zero
from loftq.numerics.codebooks import halfway
from loftq.spec import QuantSpec
from quantizers import Fitted
from quantizers import quantize as fitted_quantize

functional = pytest.importorskip("bitsandbytes.functional")


def weights(kind: str) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    w = torch.randn(256, 1024, generator=generator)
    if kind == "cubed":
        return w**3
    if kind == "lognormal":
        return w * torch.randn(256, 1024, generator=generator).exp()
    return w * 0.02


KINDS = ("normal", "cubed", "lognormal")


def test_nf4_table_to_the_bit() -> None:
    assert torch.equal(functional.get_4bit_type("nf4", device="cpu"), normal_float(4))


def test_dynamic_table_to_the_bit() -> None:
    assert torch.equal(functional.create_dynamic_map(), dynamic_8bit())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_nf4_codes_scales_and_values(kind: str, dtype: torch.dtype) -> None:
    w = weights(kind).to(dtype)
    packed, state = functional.quantize_4bit(w, blocksize=64, quant_type="nf4")
    theirs = torch.stack([packed.flatten() >> 4, packed.flatten() & 15], -1).view(w.shape)  # high nibble first
    spec = QuantSpec(bits=4, scale_dtype="float32")
    ours = quantize(w, spec)
    assert torch.equal(ours.scales["weight_scale"].flatten(), state.absmax)
    assert torch.equal(ours.codes, theirs)
    state.dtype = torch.float32
    assert torch.equal(dequantize(ours, spec), functional.dequantize_4bit(packed, state))


def test_nf4_with_fitted_scales_decodes_to_the_bit() -> None:
    """bitsandbytes multiplies by what it calls absmax; that about half of them are negative is all the same to it."""
    w, spec = weights("normal"), Fitted(bits=4, scale_dtype="float32")
    ours = fitted_quantize(w, spec)
    scale = ours.scales["weight_scale"]
    assert (scale < 0).any()
    packed, state = functional.quantize_4bit(w, blocksize=64, quant_type="nf4")
    state.absmax, codes = scale.flatten(), ours.codes.flatten()
    theirs = functional.dequantize_4bit(((codes[0::2] << 4) | codes[1::2]).view_as(packed), state)
    assert torch.equal(dequantize(ours, spec), theirs)


@pytest.mark.parametrize("kind", KINDS)
def test_double_quantization(kind: str) -> None:
    """Equal mean and absmax. bitsandbytes' CPU kernel finds 8-bit codes through a table of 65,536 equal steps over
    [-1, 1], so it misses the nearest code where a midpoint is less than half a step away; ours is the nearest.
    """
    w = weights(kind)
    _, state = functional.quantize_4bit(w, blocksize=64, quant_type="nf4", compress_statistics=True)
    spec = QuantSpec(bits=4, double_quant=True)
    ours = quantize(w, spec).scales
    assert torch.equal(ours["weight_scale_mean"].squeeze(), state.offset)
    assert torch.equal(ours["weight_scale_absmax"], state.state2.absmax)

    scale = quantize(w, QuantSpec(bits=4, scale_dtype="float32")).scales["weight_scale"].flatten()
    scaled = (scale - state.offset) / state.state2.absmax.repeat_interleave(256)[: scale.numel()]
    mine, theirs = ours["weight_scale"].flatten(), state.absmax
    differ = mine != theirs
    assert differ.float().mean() < 0.01
    gaps = halfway(dynamic_8bit()).double()
    to_midpoint = (scaled[differ].double()[:, None] - gaps).abs().amin(1)
    half_a_step = 1 / 65535
    assert (to_midpoint <= half_a_step * (1 + 1e-3)).all()
    on_steps = (((scaled + 1) * 32767.5).round() / 32767.5 - 1).float()
    assert (torch.bucketize(on_steps, gaps.float()) != theirs).sum() <= 2  # their rule, up to rounding
    error = (dynamic_8bit()[mine.int()] - scaled).abs()
    assert (error <= (dynamic_8bit()[theirs.int()] - scaled).abs() + 1e-7).all()


def test_nested_statistics_decode_as_bitsandbytes_reads_them() -> None:
    w = weights("normal")
    _, state = functional.quantize_4bit(w, blocksize=64, quant_type="nf4", compress_statistics=True)
    spec = QuantSpec(bits=4, double_quant=True)
    ours = quantize(w, spec).scales
    state.state2.absmax = ours["weight_scale_absmax"]
    read = functional.dequantize_blockwise(ours["weight_scale"].flatten(), state.state2) + state.offset
    assert torch.equal(read, scale_and_zero(ours)[0].flatten())
