"""Every back end writes the bytes of the reference, and decodes them to the same bits."""

import itertools

import pytest
import torch
from backends import Backend, backend, compiled, compiled_only, guarded_memory, interpreted, stored

from loftq import codes
from loftq.errors import NumericalError
from loftq.kernels import reference
from loftq.numerics import encode, quantize
from loftq.spec import BITS, QuantSpec
from quantizers import WIDTHS

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = ((1, 1), (1, 70), (37, 1), (37, 72), (130, 200))
HUGE = 1 << 70  # larger than any row
SCALES = ({}, {"scale_dtype": "float32"}, {"scale_dtype": "float16"}, {"double_quant": True})


def spec_of(bits: int, code: str, block: int, scales: dict) -> QuantSpec:
    scales = {} if codes.get(code).per_tensor and "double_quant" in scales else scales
    return QuantSpec(bits=bits, code=code, block_size=block, **scales)


def codes_of(bits: int) -> list[str]:
    return [code for code, width in WIDTHS if width == bits]


def a_few() -> list[tuple[QuantSpec, tuple[int, int]]]:
    """Every width with every code, while the other properties take turns: each meets each width at least once."""
    blocks, turn = (64, 7, 32, HUGE, 24), 0
    chosen = []
    for i, bits in enumerate(BITS):
        for code in codes_of(bits):
            scales = SCALES[(turn + i) % len(SCALES)]
            chosen.append((spec_of(bits, code, blocks[turn % 5], scales), SHAPES[(turn + 3 * i + 3) % len(SHAPES)]))
            turn += 1
    return chosen


FEW = a_few()


def described(value: object) -> str:
    if isinstance(value, QuantSpec):
        block = "row" if value.block_size == HUGE else value.block_size
        scale = "nested" if value.double_quant else value.scale_dtype
        return f"{value.bits}-{value.code}-{block}-{scale}"
    return "x".join(map(str, value)) if isinstance(value, tuple) else str(value)


few = pytest.mark.parametrize(("spec", "shape"), FEW, ids=described)


def agree(kernels: Backend, tensors: dict[str, torch.Tensor], spec: QuantSpec, columns: int) -> None:
    for dtype in DTYPES:
        got = kernels("dequantize", tensors, spec, columns, dtype)
        wanted = reference.dequantize(tensors, spec, columns, dtype)
        assert got.dtype == dtype
        assert torch.equal(got, wanted), f"{described(spec)} as {dtype}"


@pytest.mark.sampled(3)
@few
def test_decoded_weight_to_the_bit(kernels: Backend, spec: QuantSpec, shape: tuple[int, int]) -> None:
    agree(kernels, stored(spec, *shape), spec, shape[1])


@pytest.mark.sampled(3)
@few
def test_looked_up_rows_to_the_bit(kernels: Backend, spec: QuantSpec, shape: tuple[int, int]) -> None:
    tensors = stored(spec, *shape)
    rows = torch.randint(shape[0], (9,))
    for chosen, dtype in ((rows, torch.float32), (rows.int()[::2], torch.bfloat16)):
        got = kernels("embedding", chosen, tensors, spec, shape[1], dtype)
        assert torch.equal(got, reference.embedding(chosen, tensors, spec, shape[1], dtype))
        assert torch.equal(got, reference.dequantize(tensors, spec, shape[1], dtype)[chosen.long()])


@pytest.mark.slow
@pytest.mark.parametrize("bits", BITS)
def test_cpu_equals_the_reference_in_every_combination(bits: int) -> None:
    """Codes, scales, residual, bytes and decoded values: the full product of all properties."""
    cpu = backend("cpu")
    for code, scales, block, (rows, columns) in itertools.product(codes_of(bits), SCALES, (64, 32, 7, HUGE), SHAPES):
        spec = spec_of(bits, code, block, scales)
        weight = torch.randn(rows, columns) * 0.05
        weight[0, : columns // 2] = 0
        target = weight - torch.randn(rows, columns) * 0.01
        wanted, wanted_residual = reference.quantize_residual(target, weight, spec)
        got, residual = cpu.module.quantize_residual(target, weight, spec)
        assert torch.equal(got.codes, wanted.codes), described(spec)
        assert torch.equal(residual, wanted_residual), described(spec)
        assert got.scales.keys() == wanted.scales.keys()
        for name, scale in wanted.scales.items():
            assert torch.equal(got.scales[name], scale), described(spec)
            assert got.scales[name].dtype == scale.dtype
        packed = cpu.module.pack(wanted.codes, bits)
        assert torch.equal(packed, reference.pack(wanted.codes, bits)), described(spec)
        agree(cpu, {"weight": packed, **wanted.scales}, spec, columns)


@pytest.mark.sampled(3)
@pytest.mark.parametrize(("spec", "shape"), [few for few in FEW if not few[0].codebook.per_tensor], ids=described)
def test_fitted_scales_to_the_bit(kernels: Backend, spec: QuantSpec, shape: tuple[int, int]) -> None:
    """From the start, and from earlier scales. Rows of all sizes, one of zeros, some weights on the levels."""
    if kernels.device.type == "cuda" and spec.codebook.clips:
        pytest.skip("sums differ between devices")
    weight = torch.randn(shape) * torch.logspace(-3, 3, shape[0])[:, None]
    weight[0, : shape[1] // 2] = 0
    weight[-1] = weight[-1].sign()
    wanted = got = None
    for target in (weight, weight * 1.1 + 0.01):
        wanted, residual = reference.quantize_residual(target, weight, spec, fitted=True, earlier=wanted)
        moved = (t.to(kernels.device) for t in (target, weight))
        got, found = kernels.module.quantize_residual(*moved, spec, fitted=True, earlier=got)
        assert torch.equal(got.codes.cpu(), wanted.codes)
        assert torch.equal(found.cpu(), residual)
        assert got.scales.keys() == wanted.scales.keys()
        assert all(torch.equal(got.scales[name].cpu(), scale) for name, scale in wanted.scales.items())


@pytest.mark.sampled(3)
@few
def test_codes_and_bytes(kernels: Backend, spec: QuantSpec, shape: tuple[int, int]) -> None:
    """On a GPU only codes without sums: a mean or a deviation depends on the order of additions."""
    if kernels.device.type == "cuda" and spec.codebook.clips:
        pytest.skip("sums differ between devices")
    weight, target = torch.randn(shape).bfloat16(), torch.randn(shape)
    wanted, wanted_residual = reference.quantize_residual(target, weight, spec)
    moved = (t.to(kernels.device) for t in (target, weight))
    got, residual = kernels.module.quantize_residual(*moved, spec)
    assert torch.equal(got.codes.cpu(), wanted.codes)
    assert torch.equal(residual.cpu(), wanted_residual)
    assert residual.dtype == torch.float32
    assert torch.equal(kernels("pack", wanted.codes, spec.bits), encode(wanted, spec)["weight"])


def test_tensors_that_are_not_contiguous_and_want_gradients(kernels: Backend) -> None:
    spec = QuantSpec(bits=3, code="affine", block_size=7)
    weight = torch.randn(72, 38).T.requires_grad_()
    target = torch.randn(38, 144)[:, ::2]
    wanted, residual = reference.quantize_residual(target, weight.detach(), spec)
    got, got_residual = kernels.module.quantize_residual(*(t.to(kernels.device) for t in (target, weight)), spec)
    assert torch.equal(got.codes.cpu(), wanted.codes)
    assert torch.equal(got_residual.detach().cpu(), residual)
    codes = torch.randint(8, (72, 38), dtype=torch.uint8).T
    assert torch.equal(kernels("pack", codes, 3), reference.pack(codes.contiguous(), 3))
    tensors = encode(wanted, spec)
    strided = {k: torch.stack([v, v], -1).to(kernels.device)[..., 0] for k, v in tensors.items()}
    assert not any(v.is_contiguous() for v in strided.values())
    assert torch.equal(
        kernels.module.dequantize(strided, spec, 72, torch.float32).cpu(),
        reference.dequantize(tensors, spec, 72, torch.float32),
    )


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_refused(kernels: Backend, bad: float) -> None:
    weight = torch.randn(37, 72).to(kernels.device)
    weight[36, 70] = bad
    for code, bits in WIDTHS:
        with pytest.raises(NumericalError):
            kernels.module.quantize_residual(weight, weight, QuantSpec(bits=bits, code=code))


def test_extreme_scales(kernels: Backend) -> None:
    """Denormal and huge scales, values beyond float16, ties of bfloat16: rounded as IEEE says."""
    spec = QuantSpec(bits=4, scale_dtype="float32", block_size=8)
    tensors = stored(spec, 6, 64)
    extreme = torch.tensor([1e-45, 1e-39, 65519.9, 65520.1, 3.3e38, 1.00390625, 1.01171875, -2.5e-8])
    tensors["weight_scale"] = extreme.repeat(6, 1)
    with_overflow = [torch.float32, torch.bfloat16] + ([torch.float16] if kernels.module.NAME != "cuda" else [])
    for dtype in with_overflow:  # NumPy, under the interpreter, warns of what overflows
        got = kernels("dequantize", tensors, spec, 64, dtype)
        assert torch.equal(got, reference.dequantize(tensors, spec, 64, dtype))


def test_rows_beyond_the_table_are_refused(kernels: Backend) -> None:
    if kernels.device.type == "cuda":
        pytest.skip("on a device this is an assertion, which ends the process' use of it")
    spec = QuantSpec(bits=2)
    tensors = stored(spec, 37, 72)
    for bad in (37, 1 << 40, -1):
        with pytest.raises(IndexError):
            kernels("embedding", torch.tensor([0, bad]), tensors, spec, 72, torch.float32)


def test_callers_defaults_do_not_reach_the_kernels(kernels: Backend) -> None:
    """transformers loads models with another default dtype, and on the meta device."""
    spec = QuantSpec(bits=3, double_quant=True)
    weight, tensors, x = torch.randn(37, 72), stored(spec, 37, 72), torch.randn(2, 72)
    codes, residual = reference.quantize_residual(weight, weight, spec)
    dense, product = (reference.dequantize(tensors, spec, 72, torch.bfloat16), reference.linear(x, tensors, spec, 72))
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("meta"):
        got, got_residual = kernels.module.quantize_residual(*[weight.to(kernels.device)] * 2, spec)
        assert torch.equal(got.codes.cpu(), codes.codes)
        assert torch.equal(got_residual.cpu(), residual)
        assert torch.equal(kernels("dequantize", tensors, spec, 72, torch.bfloat16), dense)
        torch.testing.assert_close(kernels("linear", x, tensors, spec, 72), product)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("bits", BITS)
def test_no_place_outside_the_tensors_is_touched(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = interpreted()
    for code, block, shape in (("affine", 7, (37, 71)), ("nf", 64, (65, 129)), ("uniform-tensor", 64, (3, 5))):
        spec = spec_of(bits, code, block, {"double_quant": True})
        tensors = stored(spec, *shape)
        with guarded_memory(monkeypatch):
            kernels.dequantize(tensors, spec, shape[1], torch.float32)
            kernels.embedding(torch.tensor([2, 0, 2]), tensors, spec, shape[1], torch.float32)
            kernels.linear(torch.randn(3, shape[1]), tensors, spec, shape[1])
            kernels.linear_grad_input(torch.randn(3, shape[0]), tensors, spec, shape[1])


@pytest.mark.parametrize("architecture", [80, 90])
def test_kernels_compile_as_they_are_called(
    architecture: int, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """To machine code, without a GPU. What must be exact has no contracted and no flushing arithmetic."""
    gpu = compiled()
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
    dense = {
        80: [("embedding", QuantSpec(bits=3, code="affine", block_size=7, double_quant=True), (37, 71), torch.float32)],
        90: [
            ("dequantize", QuantSpec(bits=8, code="uniform", double_quant=True), (130, 200), torch.bfloat16),
            ("dequantize", QuantSpec(bits=4, code="uniform-tensor"), (1, 1), torch.float16),
        ],
    }[architecture]
    products = {
        80: [("linear", QuantSpec(bits=4, code="affine", block_size=32), (130, 200), torch.float32)],
        90: [
            ("linear", QuantSpec(bits=2, double_quant=True), (128, 256), torch.bfloat16),
            ("linear_grad_input", QuantSpec(bits=3), (1, 1), torch.float16),
        ],
    }[architecture]
    with compiled_only(monkeypatch, architecture) as kernels:
        for function, spec, shape, dtype in dense:
            tensors = encode(quantize(torch.randn(shape), spec), spec)
            rows = [torch.zeros(2, dtype=torch.long)] if function == "embedding" else []
            getattr(gpu, function)(*rows, tensors, spec, shape[1], dtype)
        for function, spec, shape, dtype in products:
            tensors = encode(quantize(torch.randn(shape), spec), spec)
            features = shape[1] if function == "linear" else shape[0]
            getattr(gpu, function)(torch.randn(1, features, dtype=dtype), tensors, spec, shape[1])
    assert len(kernels) == len(dense) + len(products)
    assert all(k.asm["cubin"] for k in kernels)
    for k in kernels[: len(dense)]:
        instructions = k.asm["ptx"]
        assert "mul.f32" in instructions or "mul.rn.f32" in instructions
        assert not any(f"{operation}." in instructions for operation in ("fma", "mad.rn", "ftz"))
