"""Kernels of the trellis code: they decode to the reference's bits, and leave its errors."""

import pytest
import torch
from backends import NAMES, Backend, backend, compiled_only, guarded_memory
from torch import Tensor

import loftq.kernels
from loftq.codes import Trellis
from loftq.kernels import TRELLIS, cpu, products, reference, trellis_cpu, windows
from loftq.numerics import Quantized, dequantize, fit_scales, trellis
from loftq.spec import QuantSpec, stored_tensors, why_not

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MIXED = [0, 64, 35, 16, 47, 2, 32, 64, 3, 48, 0, 13]  # rates of columns; their mean is 27


@pytest.fixture(params=[name for name in NAMES if name != "reference"])
def kernels(request: pytest.FixtureRequest) -> Backend:
    return backend(request.param, TRELLIS)


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


def agree(kernels: Backend, tensors: dict[str, Tensor], spec: QuantSpec, columns: int) -> None:
    for dtype in DTYPES:
        got = kernels("dequantize", tensors, spec, columns, dtype)
        assert got.dtype == dtype
        assert torch.equal(got, reference.dequantize(tensors, spec, columns, dtype))


@pytest.mark.sampled(5)
@pytest.mark.parametrize("window", Trellis.WINDOWS)
@pytest.mark.parametrize("rows", [32, 203])
def test_every_rate_is_decoded_to_the_bit(kernels: Backend, window: int, rows: int) -> None:
    every = range(1, 65, 1 if kernels.module is trellis_cpu else 21)  # the interpreter takes its time
    for rate in (r for r in every if not why_not(spec_of(r, window), "linear", rows)):
        agree(kernels, random_strings(spec_of(rate, window), rows, 3), spec_of(rate, window), 3)


@pytest.mark.parametrize(("rows", "columns"), [(128, 12), (200, 300), (576, 24)])
def test_rates_of_columns_are_decoded_to_the_bit(kernels: Backend, rows: int, columns: int) -> None:
    agree(kernels, *mixed(rows, columns), columns)
    agree(kernels, random_strings(spec_of(35, 10), rows, columns), spec_of(35, 10), columns)


def test_more_columns_than_are_decoded_at_a_time() -> None:
    spec, columns = spec_of(35, 10), windows.COLUMNS + 76
    tensors, x = random_strings(spec, 48, columns), torch.randn(2, columns)
    agree(Backend(trellis_cpu, torch.device("cpu")), tensors, spec, columns)
    weight = reference.dequantize(tensors, spec, columns, torch.float32)
    torch.testing.assert_close(trellis_cpu.linear(x, tensors, spec, columns), x @ weight.T, rtol=1e-4, atol=1e-4)


@pytest.mark.sampled(5)
@pytest.mark.parametrize("columns_have_rates", [False, True])
@pytest.mark.parametrize("tokens", [1, 3, 70])
@pytest.mark.parametrize("product", ["linear", "linear_grad_input"])
def test_products_are_as_accurate_as_dense_ones(
    kernels: Backend, product: str, tokens: int, columns_have_rates: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As accurate as dense ones, summed in float32; on a CPU with the weight decoded in parts of one group."""
    if kernels.module is trellis_cpu:
        monkeypatch.setattr(products, "PART", 1)
    for rows, columns in ((200, 300), (100, 12)):
        spec = spec_of(35, 10)
        tensors, spec = mixed(rows, columns) if columns_have_rates else (random_strings(spec, rows, columns), spec)
        weight = reference.dequantize(tensors, spec, columns, torch.float32)
        weight = weight if product == "linear_grad_input" else weight.T
        x = torch.randn(1, tokens, len(weight), generator=torch.Generator().manual_seed(tokens))
        wanted = x.double() @ weight.double()
        got = kernels(product, x, tensors, spec, columns)
        assert got.shape == wanted.shape
        # BLAS adds in blocks, a kernel along its tile
        assert (got - wanted).norm() <= 4 * (x @ weight - wanted).norm()
        if product == "linear":
            bias = torch.randn(rows)
            torch.testing.assert_close(kernels(product, x, tensors, spec, columns, bias), got + bias)
        half = x.bfloat16()
        exact, dense = half.double() @ weight.double(), half @ weight.bfloat16()
        got = kernels(product, half, tensors, spec, columns)
        assert got.dtype == torch.bfloat16
        assert (got - exact).norm() <= 2 * (dense - exact).norm()


def test_nothing_outside_the_tensors_is_touched(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = backend("interpreted", TRELLIS)
    with guarded_memory(monkeypatch):
        for tensors, spec in (mixed(100, 12), (random_strings(spec_of(35), 33, 5), spec_of(35))):
            rows, columns = len(tensors["weight_scale"]), 12 if "weight_rate" in tensors else 5
            agree(kernels, tensors, spec, columns)
            for tokens in (1, 3):
                kernels("linear", torch.randn(tokens, columns), tensors, spec, columns)
                kernels("linear_grad_input", torch.randn(tokens, rows), tensors, spec, columns)
        w = gaussian(33, 1)
        kernels.module.quantize_residual(w, w, spec_of(35))


@pytest.mark.sampled(5)
@pytest.mark.parametrize(
    ("rate", "window", "rows"), [(35, 8, 33), (16, 8, 64), (51, 8, 203), (32, 10, 144), (24, 12, 32)]
)
def test_windows_leave_the_errors_of_the_reference(kernels: Backend, rate: int, window: int, rows: int) -> None:
    """To 1e-5: where two paths differ by less than float32 holds, either may be found."""
    if kernels.module is not trellis_cpu and (rate, window) != (35, 8):
        pytest.skip("the interpreter takes its time")
    columns = 6 if kernels.module is trellis_cpu else 1
    spec, w = spec_of(rate, window), gaussian(rows, columns)
    other = trellis.windows(random_strings(spec, rows, columns), spec, columns)
    for fitted, earlier in ((True, None), (True, Quantized(other, fit_scales(w, spec)))):
        wanted, left = reference.quantize_residual(w, w, spec, fitted=fitted, earlier=earlier)
        found, residual = quantize_residual(kernels, w, spec, fitted=fitted, earlier=earlier)
        assert torch.equal(residual, w - dequantize(found, spec))
        torch.testing.assert_close(residual.square().sum(0), left.square().sum(0), rtol=1e-5, atol=0)
        for name, scale in wanted.scales.items():
            torch.testing.assert_close(found.scales[name], scale, rtol=2**-7, atol=0)  # one step of bfloat16
        assert torch.equal(trellis.windows(trellis.encode(found, spec), spec, columns), found.codes)  # they are paths


def quantize_residual(
    kernels: Backend, w: Tensor, spec: QuantSpec, *, fitted: bool, earlier: Quantized | None
) -> tuple[Quantized, Tensor]:
    """On the kernels' device, from tensors and to tensors on the CPU."""
    if earlier is not None:
        scales = {name: scale.to(kernels.device) for name, scale in earlier.scales.items()}
        earlier = Quantized(earlier.codes.to(kernels.device), scales)
    moved = w.to(kernels.device)
    found, residual = kernels.module.quantize_residual(moved, moved, spec, fitted=fitted, earlier=earlier)
    return Quantized(found.codes.cpu(), {name: scale.cpu() for name, scale in found.scales.items()}), residual.cpu()


def test_windows_of_columns_with_rates(kernels: Backend) -> None:
    rates = torch.tensor([0, 64, 35, 9], dtype=torch.uint8)
    spec, w = spec_of(27, 8, column_rates=True), gaussian(32, 4)
    scales, before = {**fit_scales(w, spec), "weight_rate": rates}, torch.zeros(32, 4, dtype=torch.int16)
    moved = {name: scale.to(kernels.device) for name, scale in scales.items()}
    found = kernels.module.best_windows(w.to(kernels.device), moved, spec, before.to(kernels.device)).cpu()
    wanted = trellis.best_windows(w, scales, spec, before)
    errors = [(w - dequantize(Quantized(codes, scales), spec)).square().sum(0) for codes in (found, wanted)]
    torch.testing.assert_close(errors[0], errors[1], rtol=1e-5, atol=0)
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


@pytest.mark.slow
@pytest.mark.parametrize("architecture", [90])
def test_kernels_compile(architecture: int, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = backend("compiled", TRELLIS).module
    with compiled_only(monkeypatch, architecture) as kernels:
        for tensors, spec in (mixed(96, 12), (random_strings(spec_of(35, 10), 96, 12), spec_of(35, 10))):
            gpu.dequantize(tensors, spec, 12, torch.bfloat16)
        gpu.linear(torch.randn(3, 12).bfloat16(), tensors, spec, 12)
        gpu.linear_grad_input(torch.randn(3, 96).half(), tensors, spec, 12)
        gpu.viterbi(torch.randn(2, 128), torch.ones(2, 128), torch.randn(1024), trellis.Walk(128, 35, 10))
    assert len(kernels) == 5
    assert all(k.asm["cubin"] for k in kernels)


def test_the_form_chooses_the_kernels() -> None:
    assert loftq.kernels.backend(torch.device("cpu"), spec_of(32)) is trellis_cpu
    assert loftq.kernels.backend(torch.device("cpu"), QuantSpec(bits=2)) is cpu
    assert loftq.kernels.backend(torch.device("meta"), spec_of(32)) is reference
