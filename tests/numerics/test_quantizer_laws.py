"""Laws × rows: every law runs on every way to store a matrix. A new code adds rows and inherits the laws.

Where a code cannot keep a law it is excused by name and with the reason, and ``test_excuses_are_needed`` shows that
the law really fails there.
"""

import functools
import re
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from loftq import codes
from loftq.errors import NumericalError
from loftq.numerics import Quantized, blockwise, decode, dequantize, encode, levels, scale_and_zero, unpack
from loftq.options import SCALE_DTYPES
from loftq.spec import QuantSpec, packed_shape, stored_bytes, stored_tensors
from quantizers import WIDTHS, Fitted, quantize

BLOCKS = (64, 32, 7, 4096)  # whole blocks and a short last one; 7 leaves a last block of one value; larger than the row
STORED = [*((d, False) for d in SCALE_DTYPES), ("float32", True)]
BLOCKWISE = [(code, bits) for code, bits in WIDTHS if not codes.get(code).per_tensor]
PER_TENSOR = [(code, bits) for code, bits in WIDTHS if codes.get(code).per_tensor]
ROWS = [
    *(
        QuantSpec(bits=bits, code=code, block_size=block, scale_dtype=dtype, double_quant=double)
        for code, bits in BLOCKWISE
        for block in BLOCKS
        for dtype, double in STORED
    ),
    *(  # every width of every code, while blocks and ways to store the scales take turns
        Fitted(bits=bits, code=code, block_size=BLOCKS[turn % 4], scale_dtype=dtype, double_quant=double)
        for i, (code, bits) in enumerate(BLOCKWISE)
        for turn in (i, i + 2 + i // 4 % 2)
        for dtype, double in [STORED[(turn + i // 4) % 4]]
    ),
    *(
        QuantSpec(bits=bits, code=code, block_size=block, scale_dtype=dtype)
        for code, bits in PER_TENSOR
        for block in (64, 7)
        for dtype in SCALE_DTYPES
    ),
]


@functools.cache
def weight(rows: int = 12, columns: int = 148) -> Tensor:
    """Gaussian rows, heavy-tailed rows, rows off centre, one of mixed magnitudes; a block of zeros in the first."""
    generator = torch.Generator().manual_seed(7)
    w = torch.randn(rows, columns, generator=generator)
    w[1::4] = w[1::4] ** 3
    w[2::4] = w[2::4] * 0.1 + 0.3
    w[3::4] *= torch.logspace(-1, 1, columns)
    w[0, :64] = 0
    return w


def values(w: Tensor, spec: QuantSpec) -> Tensor:
    return dequantize(quantize(w, spec), spec)


def same(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=0)


def law_nearest(spec: QuantSpec) -> None:
    """No other code of the same block decodes nearer to the weight, against the scales as they are stored."""
    w = weight()
    quantized = quantize(w, spec)
    distance = (w.double() - dequantize(quantized, spec).double()).abs()
    best = distance
    for step in (-1, 1):  # levels are sorted, so it is enough to look at the neighbours
        codes = (quantized.codes.int() + step).clamp(0, 2**spec.bits - 1).to(torch.uint8)
        other = dequantize(Quantized(codes, quantized.scales), spec)
        best = torch.minimum(best, (w.double() - other.double()).abs())
    scale, zero = scale_and_zero(quantized.scales)
    span = levels(spec.code, spec.bits).abs().max() + (0 if zero is None else zero.abs().max())
    assert (distance - best).max() <= 4e-7 * scale.abs().max() * span


def law_half_a_gap(spec: QuantSpec) -> None:
    """Without rounding of the scales, absmax and min-max scales reach every weight: at most half a gap of error."""
    table = levels(spec.code, spec.bits).double()
    quantized = quantize(weight(), spec)
    scale = scale_and_zero(quantized.scales)[0].double()
    widths = torch.full((scale.shape[1],), min(spec.block_size, 148))
    widths[-1] = 148 - widths[:-1].sum()
    bound = scale.repeat_interleave(widths, 1) * table.diff().max() / 2
    # affine: an integer zero point moves the grid by up to half a gap more
    bound *= 2 if spec.codebook.zero else 1
    error = (weight().double() - dequantize(quantized, spec).double()).abs()
    assert (error <= bound * (1 + 1e-5)).all()


def law_idempotent(spec: QuantSpec) -> None:
    """Fitted scales are found from some starts. A few weights are multiples of many scales, so that in short blocks the
    way back is sure from the scales themselves only.
    """
    first = quantize(weight(), spec)
    once = dequantize(first, spec)
    short = isinstance(spec, Fitted) and spec.block_size < 32
    same(dequantize(quantize(once, spec, first if short else None), spec), once)


def law_power_of_two(spec: QuantSpec) -> None:
    w = weight() * 64 if spec.scale_dtype == "float16" else weight()  # float16 has few normal numbers
    quantized = quantize(w, spec)
    for power in (1, 4) if spec.scale_dtype == "float16" else (-20, 1, 4):
        scaled = quantize(w * 2.0**power, spec)
        same(scaled.codes, quantized.codes)
        same(dequantize(scaled, spec), dequantize(quantized, spec) * 2.0**power)


def law_zero_block(spec: QuantSpec) -> None:
    """A block of zeros among others decodes to zeros."""
    w = weight().clone()
    w[5], w[6, : spec.block_size] = 0, 0
    quantized = quantize(w, spec)
    got = dequantize(quantized, spec)
    assert (got[5] == 0).all()
    assert (got[6, : spec.block_size] == 0).all()
    assert all(s.isfinite().all() for s in quantized.scales.values())


def law_zero_matrix(spec: QuantSpec) -> None:
    quantized = quantize(torch.zeros(3, 148), spec)
    assert (dequantize(quantized, spec) == 0).all()
    assert all(s.isfinite().all() for s in quantized.scales.values())


def law_stored_round_trip(spec: QuantSpec) -> None:
    """What is stored decodes to the same bits, whole and by rows, and has the promised names, shapes and bytes."""
    for rows, columns in ((12, 148), (1, 33), (3, 1)):
        w = weight()[:rows, :columns]
        quantized = quantize(w, spec)
        stored = encode(quantized, spec)
        same(decode(stored, spec, columns), dequantize(quantized, spec))
        same(unpack(stored["weight"], spec.bits, columns), quantized.codes)
        chosen = torch.tensor([rows - 1, 0, rows - 1])
        same(blockwise.decode_rows(stored, spec, columns, chosen), dequantize(quantized, spec)[chosen])

        dtypes = {
            torch.float32: "F32",
            torch.bfloat16: "BF16",
            torch.float16: "F16",
            torch.int8: "I8",
            torch.uint8: "U8",
        }
        described = {k: (dtypes[t.dtype], tuple(t.shape)) for k, t in stored.items()}
        assert described == stored_tensors(spec, rows, columns)
        assert sum(t.numel() * t.element_size() for t in stored.values()) == stored_bytes(spec, rows, columns)
        assert stored["weight"].shape == packed_shape(rows, columns, spec.bits)


def law_rows_are_independent(spec: QuantSpec) -> None:
    whole = values(weight(), spec)
    for rows in (slice(3, 4), slice(2, 9), slice(0, None, 3)):
        same(values(weight()[rows], spec), whole[rows])


def law_short_last_block_stands_alone(spec: QuantSpec) -> None:
    whole = values(weight(), spec)
    start = 148 // spec.block_size * spec.block_size
    same(values(weight()[:, start:], spec), whole[:, start:])


def law_half_precision_input(spec: QuantSpec) -> None:
    """16-bit weights are quantized as the float32 values that they are; so are float64 values that float32 holds."""
    for dtype in (torch.float16, torch.bfloat16):
        w = weight().to(dtype)
        same(values(w, spec), values(w.float(), spec))
    same(values(weight().double(), spec), values(weight(), spec))


def law_layout_in_memory(spec: QuantSpec) -> None:
    w = weight()
    apart = torch.zeros(24, 296)
    apart[::2, ::2] = w
    for view in (w.T.contiguous().T, apart[::2, ::2]):
        assert not view.is_contiguous()
        same(values(view, spec), values(w, spec))


def law_chunks_do_not_show(spec: QuantSpec) -> None:
    whole = quantize(weight(), spec)
    expected = dequantize(whole, spec)
    for chunk in (1, 5 * 148 + 3):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(blockwise, "CHUNK", chunk)
            pieces = quantize(weight(), spec)
            same(pieces.codes, whole.codes)
            same(dequantize(pieces, spec), expected)


def law_denormal(spec: QuantSpec) -> None:
    """Values too small for any scale become zeros or stay as small; nothing divides by zero."""
    for size in (1e-40, 1e-44):
        quantized = quantize(weight().sign() * size, spec)
        assert all(s.isfinite().all() for s in quantized.scales.values())
        assert dequantize(quantized, spec).abs().max() <= 1e-7


def law_huge(spec: QuantSpec) -> None:
    """Near float32's end the result is finite, or an error says what to do."""
    w = weight() / weight().abs().max() * 3e38
    code, below = spec.codebook, levels(spec.code, spec.bits).max() > 1
    no_larger = not code.clips and code.zero is None  # no scale is above the largest weight
    if no_larger and spec.scale_dtype != "float16" and not spec.double_quant:
        assert values(w, spec).isfinite().all()
        return
    message = ""
    try:
        got = values(w, spec)
    except NumericalError as e:
        message = str(e)
    if message:
        assert re.search(r"use scale_dtype=|use code nf|leave out double_quant", message)
    else:  # only scales well below the largest weight may fit, or have a sum that does
        assert no_larger
        assert below
        assert got.isfinite().all()


def law_constant(spec: QuantSpec) -> None:
    """A constant matrix is met up to the rounding of a scale."""
    for constant in (0.37, -0.37, 1e-3):
        got = values(torch.full((3, 148), constant), spec)
        torch.testing.assert_close(got, torch.full((3, 148), constant), rtol=2**-8, atol=0)


def law_single_row_and_column(spec: QuantSpec) -> None:
    """A lone value is its own block: met up to the rounding of its scale."""
    one = torch.tensor([[0.3]])
    torch.testing.assert_close(values(one, spec), one, rtol=2**-8, atol=0)
    column = values(weight()[:, :1], spec)
    assert column.shape == (12, 1)
    assert column.isfinite().all()
    assert values(weight()[:1], spec).shape == (1, 148)


Law = Callable[[QuantSpec], None]
LAWS: list[Law] = [law for key, law in sorted(globals().items()) if key.startswith("law_")]


def excuse(law: Law, spec: QuantSpec) -> str | None:
    """Why ``law`` does not hold for ``spec``; None if it must."""
    code, table = spec.codebook, levels(spec.code, spec.bits)
    tensor, double = code.per_tensor, spec.double_quant
    if law is law_half_a_gap:
        if isinstance(spec, Fitted):
            return "a fitted scale clips the largest weights"
        if code.zero is None and table[0] != -table[-1]:
            return "the levels of one side reach less far, and a weight as large there is clipped"
        if code.clips:
            return "a scale from mean and sigma clips the largest weights"
        if double or spec.scale_dtype != "float32":
            return "a scale rounded down does not reach the largest weight"
    if law is law_idempotent:
        if code.clips:
            return "mean and sigma of the quantized block are not those of the block"
        if double:
            return "the mean and absmax of the decoded scales are not those of the scales"
        if isinstance(spec, Fitted) and (spec.scale_dtype == "float32" or spec.bits == 8):
            return "the search for a scale ends in one that is as good, up to rounding"
        if code.zero:
            return "after rounding of scale and zero point a block need not use its outer codes, so its range shrinks"
    if law is law_power_of_two and tensor:
        return "the 1e-8 in the scale does not scale"
    if law is law_zero_block:
        if tensor:
            return "one scale and zero point for all: zero is not on the grid"
        if code.zero is None and table.all() and double:
            return "no level is zero, and the 8-bit code does not keep a scale of zero"
    if law is law_rows_are_independent or law is law_short_last_block_stands_alone:
        if tensor:
            return "one scale for all blocks"
        if double:
            return "256 scales share an absmax, and all share a mean"
    return None


GROUPS: dict[str, list[QuantSpec]] = {}  # rows that differ in the storage of scales share a test: it saves seconds
for row in ROWS:
    fitted = "fitted-" if isinstance(row, Fitted) else ""
    GROUPS.setdefault(f"{fitted}{row.code}{row.bits}-b{row.block_size}", []).append(row)
CASES = [  # one of four is quick, so that every width of every code is among them, while blocks take turns
    pytest.param(law, kept, id=f"{law.__name__}-{group}", marks=pytest.mark.slow if (turn + turn // 4) % 4 else [])
    for law in LAWS
    for turn, (group, specs) in enumerate(GROUPS.items())
    if (kept := [spec for spec in specs if not excuse(law, spec)])
]
EXCUSES = sorted({(law.__name__, reason) for law in LAWS for spec in ROWS if (reason := excuse(law, spec))})


@pytest.mark.parametrize(("law", "specs"), CASES)
def test_quantizer_law(law: Law, specs: list[QuantSpec]) -> None:
    for spec in specs:
        try:
            law(spec)
        except Exception as e:
            raise AssertionError(f"{law.__name__} does not hold for {spec}") from e


@pytest.mark.slow
@pytest.mark.parametrize(("law_name", "reason"), EXCUSES)
def test_excuses_are_needed(law_name: str, reason: str) -> None:
    """An excuse stays only while the law fails without it."""
    law: Law = globals()[law_name]
    broken = 0
    for spec in ROWS:
        if excuse(law, spec) == reason:
            try:
                law(spec)
            except AssertionError:
                broken += 1
    assert broken, f"{law_name} holds for all of its excused rows; drop the excuse: {reason}"


@pytest.mark.parametrize(
    ("code", "dtype", "largest", "message"),
    [
        ("nf", "float16", 1e5, r"1e\+05 does not fit float16, which ends at 6.55e\+04; use scale_dtype='bfloat16'"),
        ("nf", "float16", 3.4e38, "use scale_dtype='float32'"),
        ("nf", "bfloat16", 3.4e38, r"does not fit bfloat16, which ends at 3.39e\+38; use scale_dtype='float32'"),
        (
            "uniform",
            "float32",
            3e38,
            "beyond float32: the weights are too large; use code nf, or scale the weights down",
        ),
        ("affine", "float32", 3e38, "beyond float32"),
        ("uniform-tensor", "bfloat16", 3e38, "beyond float32"),
    ],
)
def test_a_scale_that_does_not_fit_names_the_cure(code: str, dtype: str, largest: float, message: str) -> None:
    w = torch.tensor([[1.0, -1.0, 0.5, 1.0]]) * largest
    with pytest.raises(NumericalError, match=message):
        quantize(w, QuantSpec(bits=4, code=code, scale_dtype=dtype))


def test_double_quantization_of_huge_scales_names_the_cure() -> None:
    w = torch.full((2, 128), 3e38)
    with pytest.raises(NumericalError, match="leave out double_quant"):
        quantize(w, QuantSpec(bits=4, double_quant=True))


def test_a_scale_too_small_for_float16_keeps_a_constant_tensor() -> None:
    """The uniform-tensor code's scale of a constant is 1e-8 / levels, which float16 rounds to zero."""
    spec = QuantSpec(bits=2, code="uniform-tensor", scale_dtype="float16")
    got = values(torch.full((4, 4), 0.37), spec)
    torch.testing.assert_close(got, torch.full((4, 4), 0.37), rtol=1e-5, atol=0)


def test_parameters_leave_no_graph() -> None:
    spec = QuantSpec(bits=4)
    quantized = quantize(torch.nn.Parameter(weight().clone()), spec)
    assert not any(t.requires_grad for t in encode(quantized, spec).values())


@pytest.mark.parametrize("spec", [replace(ROWS[0], scale_dtype="float32"), ROWS[-1]], ids=str)
def test_caller_defaults_do_not_matter(spec: QuantSpec) -> None:
    """transformers builds models under another default dtype and device; tables and results stay the same."""
    expected = quantize(weight(), spec)
    stored = encode(expected, spec)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("meta"):
        got = quantize(weight(), spec)
        decoded = decode(stored, spec, 148)
    same(got.codes, expected.codes)
    same(decoded, dequantize(expected, spec))
