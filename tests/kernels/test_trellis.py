"""Kernels of the trellis code: they decode to the reference's bits, and leave its errors."""

import pytest
import torch
from torch import Tensor

import loftq.kernels
from loftq.codes import Trellis
from loftq.kernels import cpu, reference, trellis_cpu
from loftq.numerics import Quantized, dequantize, fit_scales, trellis
from loftq.spec import QuantSpec, stored_tensors, why_no_trellis

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MIXED = [0, 64, 35, 16, 47, 2, 32, 64, 3, 48, 0, 13]  # rates of columns; their mean is 27


def spec_of(rate: int, window: int = 8, **fields) -> QuantSpec:
    return QuantSpec(bits=rate / 16, code="trellis", window=window, **fields)


def random_strings(spec: QuantSpec, rows: int, columns: int) -> dict[str, Tensor]:
    """Any bytes are strings of some windows."""
    generator = torch.Generator().manual_seed(rows + columns)
    shape = stored_tensors(spec, rows, columns)["weight"][1]
    scale = torch.randn(rows, 1, generator=generator).bfloat16()
    return {"weight": torch.randint(-128, 128, shape, generator=generator).to(torch.int8), "weight_scale": scale}


def mixed(rows: int, columns: int, window: int = 10) -> tuple[dict[str, Tensor], QuantSpec]:
    spec = spec_of(27, window, column_rates=True)
    rates = torch.tensor(MIXED * (columns // len(MIXED)), dtype=torch.uint8)
    return {**random_strings(spec, rows, columns), "weight_rate": rates}, spec


def gaussian(rows: int, columns: int, seed: int = 0) -> Tensor:
    w = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    w[1], w[2], w[3] = 0, w[2] ** 3, w[3] * 1e-3
    return w


def agree(tensors: dict[str, Tensor], spec: QuantSpec, columns: int) -> None:
    for dtype in DTYPES:
        got = trellis_cpu.dequantize(tensors, spec, columns, dtype)
        assert got.dtype == dtype
        assert torch.equal(got, reference.dequantize(tensors, spec, columns, dtype))


@pytest.mark.parametrize("window", Trellis.WINDOWS)
@pytest.mark.parametrize("rows", [32, 203])
def test_every_rate_is_decoded_to_the_bit(window: int, rows: int) -> None:
    for rate in (r for r in range(1, 65) if not why_no_trellis(spec_of(r, window), rows)):
        agree(random_strings(spec_of(rate, window), rows, 3), spec_of(rate, window), 3)


@pytest.mark.parametrize(("rows", "columns"), [(128, 12), (200, 300), (576, 24)])
def test_rates_of_columns_are_decoded_to_the_bit(rows: int, columns: int) -> None:
    agree(*mixed(rows, columns), columns)
    agree(random_strings(spec_of(35, 10), rows, columns), spec_of(35, 10), columns)


@pytest.mark.parametrize("columns_have_rates", [False, True])
@pytest.mark.parametrize("tokens", [1, 4, 70])
@pytest.mark.parametrize("product", ["linear", "linear_grad_input"])
def test_products(product: str, tokens: int, columns_have_rates: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As accurate as dense ones, summed in float32; the weight is decoded in parts of one group and in one part."""
    for rows, columns in ((200, 300), (100, 12)):
        spec = spec_of(35, 10)
        tensors, spec = mixed(rows, columns) if columns_have_rates else (random_strings(spec, rows, columns), spec)
        weight = reference.dequantize(tensors, spec, columns, torch.float32)
        weight = weight if product == "linear_grad_input" else weight.T
        x = torch.randn(2, tokens, len(weight), generator=torch.Generator().manual_seed(tokens))[tokens > 1 :]
        wanted = x.double() @ weight.double()
        plain = (x @ weight - wanted).norm()
        for part in (1, 1 << 21):
            monkeypatch.setattr(trellis_cpu, "PART", part)
            got = getattr(trellis_cpu, product)(x, tensors, spec, columns)
            assert got.shape == wanted.shape
            assert (got - wanted).norm() <= 4 * plain  # BLAS adds in blocks, a kernel along its tile
        if product == "linear":
            bias = torch.randn(rows)
            torch.testing.assert_close(trellis_cpu.linear(x, tensors, spec, columns, bias), got + bias)
        half = x.bfloat16()
        dense = (half @ weight.bfloat16()).float()
        torch.testing.assert_close(getattr(trellis_cpu, product)(half, tensors, spec, columns).float(), dense)


@pytest.mark.parametrize(
    ("rate", "window", "rows"), [(16, 8, 64), (35, 8, 203), (51, 8, 33), (32, 10, 144), (24, 12, 32)]
)
def test_windows_leave_the_errors_of_the_reference(rate: int, window: int, rows: int) -> None:
    """To 1e-5: where two paths differ by less than float32 holds, either may be found."""
    spec, w = spec_of(rate, window), gaussian(rows, 6)
    other = Quantized(trellis.windows(random_strings(spec, rows, 6), spec, 6), {})
    for fitted, earlier in ((False, None), (True, None), (True, other)):
        given = earlier and Quantized(earlier.codes, fit_scales(w, spec))
        wanted, left = reference.quantize_residual(w, w, spec, fitted=fitted, earlier=given)
        found, residual = trellis_cpu.quantize_residual(w, w, spec, fitted=fitted, earlier=given)
        assert torch.equal(residual, w - dequantize(found, spec))
        torch.testing.assert_close(residual.square().sum(0), left.square().sum(0), rtol=1e-5, atol=0)
        for name, scale in wanted.scales.items():
            torch.testing.assert_close(found.scales[name], scale, rtol=2**-7, atol=0)  # one step of bfloat16
        assert torch.equal(trellis.windows(trellis.encode(found, spec), spec, 6), found.codes)  # they are paths


def test_windows_of_columns_with_rates() -> None:
    rates = torch.tensor(MIXED, dtype=torch.uint8)
    spec, w = spec_of(27, 8, column_rates=True), gaussian(160, 12)
    scales = {**fit_scales(w, spec), "weight_rate": rates}
    before = torch.zeros(160, 12, dtype=torch.int16)
    found = trellis_cpu.best_windows(w, scales, spec, before)
    wanted = trellis.best_windows(w, scales, spec, before)
    errors = [(w - dequantize(Quantized(codes, scales), spec)).square().sum(0) for codes in (found, wanted)]
    torch.testing.assert_close(*errors, rtol=1e-5, atol=0)
    again, residual = trellis_cpu.quantize_residual(w, w, spec, fitted=True, earlier=Quantized(found, scales))
    assert torch.equal(residual, w - dequantize(again, spec))
    assert (residual.square().sum(1) <= (w - dequantize(Quantized(found, scales), spec)).square().sum(1)).all()


def test_no_step_raises_an_error() -> None:
    spec, w, earlier = spec_of(35), gaussian(203, 24), None
    for step in range(5):
        target = w - 0.05 * step * gaussian(203, 24, seed=step)
        found, residual = trellis_cpu.quantize_residual(target, target, spec, fitted=True, earlier=earlier)
        if earlier is not None:
            before = (target - dequantize(earlier, spec)).double().square().sum()
            assert residual.double().square().sum() <= before * (1 + 1e-6)
        earlier = found


def test_bits_do_not_depend_on_threads() -> None:
    spec, w, x = spec_of(35), gaussian(203, 40), torch.randn(3, 40)
    tensors = random_strings(spec, 203, 40)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found, residual = trellis_cpu.quantize_residual(w, w, spec, fitted=True)
        decoded = [trellis_cpu.dequantize(tensors, spec, 40, dtype) for dtype in DTYPES]
        results.append(
            [found.codes, residual, *found.scales.values(), *decoded, trellis_cpu.linear(x, tensors, spec, 40)]
        )
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_the_form_chooses_the_kernels() -> None:
    assert loftq.kernels.backend(torch.device("cpu"), spec_of(32)) is trellis_cpu
    assert loftq.kernels.backend(torch.device("cpu"), QuantSpec(bits=2)) is cpu
    assert loftq.kernels.backend(torch.device("meta"), spec_of(32)) is reference
