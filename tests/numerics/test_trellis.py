"""Laws of the trellis: every window can be read alone, no step raises an error, and the best path is found."""

import hashlib
import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from loftq import quantize_weight
from loftq.codes import Trellis, levels
from loftq.errors import InputError, NumericalError, UsageError
from loftq.numerics import Quantized, decode, dequantize, encode, quantize, trellis
from loftq.numerics.trellis import Walk, best_windows, viterbi
from loftq.spec import (
    QuantSpec,
    from_dict,
    stored_bytes,
    stored_rows,
    stored_tensors,
    trellis_groups,
    why_not,
)

RATES = range(1, 65)
DTYPES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32", torch.int8: "I8", torch.uint8: "U8"}


def spec_of(rate: int, window: int = 8, **fields) -> QuantSpec:
    return QuantSpec(bits=rate / 16, code="trellis", window=window, **fields)


def weight(rows: int, columns: int, seed: int = 0) -> Tensor:
    """Gaussian, with a row of zeros, a heavy-tailed one and a small one."""
    w = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    w[1], w[2], w[3] = 0, w[2] ** 3, w[3] * 1e-3
    return w


def random_windows(rows: int, columns: int, rate: int, window: int) -> Tensor:
    """Windows of random circular strings."""
    groups, length = trellis_groups(rows)
    n = length * rate // 16
    strings = torch.randint(2, (groups, columns, n), generator=torch.Generator().manual_seed(rate))
    places = (torch.arange(length)[:, None] * rate // 16 + torch.arange(window)) % n
    windows = (strings[:, :, places] << torch.arange(window)).sum(-1).to(torch.int16)
    return windows.transpose(1, 2).flatten(0, 1)[:rows]


def read_alone(stored: dict[str, Tensor], rates: list[int], window: int, row: int, column: int) -> int:
    """One window, by the format's definition: bit k of it is bit (o + k) mod n of the column's string."""
    length = trellis_groups(len(stored["weight_scale"]))[1]
    group, j = divmod(row, length)
    stream = np.unpackbits(stored["weight"][group].numpy().view(np.uint8), bitorder="little")
    first, n = length // 16 * sum(rates[:column]), length // 16 * rates[column]
    place = j // 16 * rates[column] + j % 16 * rates[column] // 16
    return sum(int(stream[first + (place + k) % n]) << k for k in range(window))


@pytest.mark.sampled(4)
@pytest.mark.parametrize("window", Trellis.WINDOWS)
@pytest.mark.parametrize("rows", [203, 33])
def test_windows_of_every_rate_are_stored_and_read_alone(window: int, rows: int) -> None:
    for rate in (r for r in RATES if not why_not(spec_of(r, window), "linear", rows)):
        spec, codes = spec_of(rate, window), random_windows(rows, 5, rate, window)
        stored = encode(Quantized(codes, {"weight_scale": torch.ones(rows, 1, dtype=torch.bfloat16)}), spec)
        described = {name: (DTYPES[t.dtype], tuple(t.shape)) for name, t in stored.items()}
        assert described == stored_tensors(spec, rows, 5)
        assert sum(t.numel() * t.element_size() for t in stored.values()) == stored_bytes(spec, rows, 5)
        assert stored_rows(spec, stored) == rows
        assert torch.equal(trellis.windows(stored, spec, 5), codes)
        assert torch.equal(decode(stored, spec, 5), levels("trellis", window)[codes.int()])
        for row, column in ((0, 0), (rows - 1, 4), (rows // 2, 2)):
            assert read_alone(stored, [rate] * 5, window, row, column) == codes[row, column]


def test_columns_with_rates_of_their_own() -> None:
    rates = [35, 0, 64, 16, 48, 47]  # mean 35
    spec = spec_of(35, column_rates=True)
    codes = torch.cat([random_windows(203, 1, rate, 8) for rate in rates if rate], 1)
    codes = torch.cat([codes[:, :1], torch.zeros(203, 1, dtype=torch.int16), codes[:, 1:]], 1)
    scales = {"weight_scale": torch.ones(203, 1, dtype=torch.bfloat16), "weight_rate": torch.tensor(rates).byte()}
    stored = encode(Quantized(codes, scales), spec)
    assert {name: (DTYPES[t.dtype], tuple(t.shape)) for name, t in stored.items()} == stored_tensors(spec, 203, 6)
    assert torch.equal(trellis.windows(stored, spec, 6), codes)
    values = decode(stored, spec, 6)
    assert torch.equal(values[:, 1], torch.zeros(203))
    assert torch.equal(values, dequantize(Quantized(codes, scales), spec))
    for row, column in ((202, 5), (17, 3), (100, 2)):
        assert read_alone(stored, rates, 8, row, column) == codes[row, column]


@pytest.mark.parametrize("rates", [[35, 35, 36], [3, 51, 51], [70, 35, 0]])
def test_rates_that_cannot_be(rates: list[int]) -> None:
    """Of a sum that is not promised, of fewer bits than a window has, above 4 bits: kernels would read beyond."""
    stored = {"weight_scale": torch.ones(32, 1), "weight_rate": torch.tensor(rates).byte()}
    with pytest.raises(InputError, match=r"weight_rate does not fit 2\.1875 bits a weight"):
        trellis.check_rates(stored, spec_of(35, column_rates=True))
    with pytest.raises(InputError, match="weight_rate does not fit"):  # as `merge` reads a damaged file
        decode({**stored, "weight": torch.zeros(1, 27, dtype=torch.int8)}, spec_of(35, column_rates=True), 3)
    trellis.check_rates({**stored, "weight_rate": torch.tensor([35, 64, 6]).byte()}, spec_of(35, column_rates=True))


def test_a_golden_string() -> None:
    """Windows of a string that is written by hand: n = 40 bits, the byte 0x2c first and so on round; format 2."""
    spec = spec_of(20)
    stored = {"weight": torch.tensor([[0x2C, 0x01, 0xF0, 0x55, 0x80]]).byte().view(torch.int8)}
    stored["weight_scale"] = torch.full((32, 1), 0.5).bfloat16()
    windows = trellis.windows(stored, spec, 1)[:, 0]
    # weight 0 from bit 0: 2c; weight 1 from bit 1: 012c >> 1; weight 4 from bit 5: 012c >> 5; weight 31 from bit 38:
    # the two high bits of 80, then six of 2c
    assert windows[[0, 1, 4, 31]].tolist() == [0x2C, 0x96, 0x09, 0b10 | (0x2C & 0b111111) << 2]
    assert torch.equal(encode(Quantized(windows[:, None], stored), spec)["weight"], stored["weight"])


@pytest.mark.parametrize(
    ("rows", "wanted"),
    [
        (32, (1, 32)),
        (64, (1, 64)),
        (100, (1, 112)),
        (192, (2, 96)),
        (576, (4, 144)),
        (688, (4, 176)),
        (4096, (32, 128)),
    ],
)
def test_groups_of_rows_by_the_rule_of_the_format(rows: int, wanted: tuple[int, int]) -> None:
    assert trellis_groups(rows) == wanted


def test_no_group_is_much_longer_than_its_rows() -> None:
    for rows in range(96, 6000):
        groups, length = trellis_groups(rows)
        assert length % 16 == 0
        assert (groups - 1) * length < rows <= groups * length
        assert groups * length - rows <= 48 + rows / 20


@pytest.mark.sampled(3)
@pytest.mark.parametrize("rate", [12, 16, 23, 35])
def test_no_other_path_through_the_seam_is_better(rate: int) -> None:
    """Against all strings that keep the seam, on a sequence so short that they can be counted."""
    walk = Walk(16, rate, 8)
    generator = torch.Generator().manual_seed(rate)
    table = torch.randn(256, generator=generator)
    target, scale = torch.randn(1, walk.length, generator=generator), torch.rand(1, walk.length, generator=generator)
    found = viterbi(target, scale, table, walk)[0]
    best = (target[0] - scale[0] * table[found]).square().sum().item()
    offsets = [j * rate // 16 for j in range(walk.length)]
    string = {
        (o + k) % walk.bits: int(w) >> k & 1 for o, w in zip(offsets, found.tolist(), strict=True) for k in range(8)
    }
    assert len(string) == walk.bits
    for place in itertools.chain(range(8, walk.bits), itertools.combinations(range(8, walk.bits), 2)):
        places = place if isinstance(place, tuple) else (place,)
        other = {p: b ^ (p in places) for p, b in string.items()}
        windows = [sum(other[(o + k) % walk.bits] << k for k in range(8)) for o in offsets]
        assert (target[0] - scale[0] * table[windows]).square().sum().item() >= best * (1 - 1e-6)


@pytest.mark.sampled(3)
@pytest.mark.parametrize(("rate", "rows"), [(16, 64), (23, 203), (35, 128), (51, 144)])
def test_no_step_raises_an_error(rate: int, rows: int) -> None:
    """Of a row, whose scale is fitted, nor of a sequence, whose windows are; the matrix moves as in the alternation."""
    spec, w, earlier = spec_of(rate), weight(rows, 24), None
    for step in range(4):
        target = w if step == 0 else w - 0.05 * weight(rows, 24, seed=step)
        found = quantize(target, spec, fitted=True, earlier=earlier)
        by_formula = quantize(target, spec)
        error = (target - dequantize(found, spec)).double().square()
        if earlier is not None:
            assert error.sum() <= (target - dequantize(earlier, spec)).double().square().sum() * (1 + 1e-6)
        else:
            rows_before = (target - dequantize(by_formula, spec)).double().square().sum(1)
            assert (error.sum(1) <= rows_before * (1 + 1e-6)).all()
        earlier = found


def test_an_earlier_path_is_kept_where_it_is_better() -> None:
    spec, w = spec_of(35), weight(128, 16)
    scales = {"weight_scale": torch.ones(128, 1).bfloat16()}
    other = random_windows(128, 16, 35, 8)
    exact = levels("trellis", 8)[other.int()]  # the earlier path of columns 0 to 7 has no error at all
    target = torch.cat([exact[:, :8], w[:, 8:]], 1)
    found = best_windows(target, scales, spec, other)
    assert torch.equal(found[:, :8], other[:, :8])
    assert not torch.equal(found[:, 8:], other[:, 8:])


@pytest.mark.parametrize("window", Trellis.WINDOWS)
def test_error_of_gaussian_weights(window: int) -> None:
    """By the table of docs/format.md, which benchmarks/trellis_levels.py printed; 4096 weights: within 3 percent."""
    w = torch.randn(128, 32, generator=torch.Generator().manual_seed(3))
    error = (w - dequantize(quantize(w, spec_of(32, window)), spec_of(32, window))).norm() / w.norm()
    assert error == pytest.approx({8: 0.2848, 10: 0.2766, 12: 0.2716}[window], rel=0.03)


def test_scales_and_powers_of_two() -> None:
    spec, w = spec_of(35), weight(64, 24)
    found = quantize(w, spec, fitted=True)
    for power in (-60, 40):
        scaled = quantize(w * 2.0**power, spec, fitted=True)
        assert torch.equal(scaled.codes, found.codes)
        assert torch.equal(dequantize(scaled, spec), dequantize(found, spec) * 2.0**power)
    assert torch.equal(dequantize(found, spec)[1], torch.zeros(24))
    assert torch.equal(dequantize(quantize(torch.zeros(64, 24), spec), spec), torch.zeros(64, 24))
    with pytest.raises(NumericalError, match="does not fit float16"):
        quantize(w * 1e6, spec_of(35, scale_dtype="float16"))


TABLES = {8: "39e249f27911ecf0", 10: "81a8ed75c42f9bed", 12: "00173be2a5a4b39d"}


def test_tables_are_of_the_promised_form() -> None:
    for window in Trellis.WINDOWS:
        table = levels("trellis", window)
        raw = table.half().numpy().astype("<f2").tobytes()
        assert hashlib.sha256(raw).hexdigest().startswith(TABLES[window])  # frozen: format version 2
        assert table.shape == (2**window,)
        assert torch.equal(table, table.half().float())
        assert table.unique().numel() > 0.8 * len(table)


def test_a_spec_keeps_the_fields_of_its_code() -> None:
    assert QuantSpec(bits=2.0, code="trellis", block_size=32).to_dict() == {
        "bits": 2,
        "code": "trellis",
        "scale_dtype": "bfloat16",
        "window": 10,
        "column_rates": False,
    }
    spec = spec_of(35, 12)
    assert from_dict(QuantSpec, spec.to_dict()) == spec
    assert QuantSpec(bits=2, window=12) == QuantSpec(bits=2)
    assert "window" not in QuantSpec(bits=2).to_dict()
    assert math.isclose(8 * stored_bytes(spec, 4096, 4096) / 4096**2, 2.1875 + 16 / 4096)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"bits": 2.2, "code": "trellis"},
            r"bits of code trellis must be one of the multiples of 1/16 up to 4, got 2.2",
        ),
        ({"bits": 8, "code": "trellis"}, "code trellis has multiples of 1/16 up to 4 bits; use code nf for 8"),
        ({"bits": 1.5}, "code nf has 2, 3, 4 or 8 bits; use code trellis for 1.5"),
        ({"bits": True, "code": "trellis"}, "got True"),
        ({"bits": 2, "code": "trellis", "window": 9}, "window must be one of 8, 10, 12, got 9"),
        ({"bits": 2, "code": "trellis", "double_quant": True}, "stores one scale a row"),
    ],
)
def test_refused_specs(fields: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        QuantSpec(**fields)


def test_what_a_trellis_cannot_hold() -> None:
    assert why_not(spec_of(35), "linear", 31) == "31 rows are too few for a trellis, which needs 32"
    assert why_not(spec_of(3, 10), "linear", 32) == "32 weights at 0.1875 bits are fewer bits than the window's 10"
    assert why_not(spec_of(35), "linear", 32) == ""
    assert why_not(QuantSpec(bits=2), "embedding", 8) == ""
    with pytest.raises(UsageError, match="31 rows are too few for a trellis"):
        quantize_weight(torch.randn(31, 64), bits=1.5, rank=4)


def test_no_step_of_the_trellis_raises_the_error() -> None:
    """The alternation falls at every step, and what is stored is what was solved."""
    w = torch.randn(64, 96, generator=torch.Generator().manual_seed(0))
    solution = quantize_weight(w, bits=2.1875, code="trellis", rank=8, window=8)
    assert solution.kept == 5
    assert all(after <= before * (1 + 1e-6) for before, after in itertools.pairwise(solution.errors[1:]))
    assert solution.quantized.codes.dtype == torch.int16
    stored = encode(solution.quantized, solution.quant)
    assert torch.equal(decode(stored, solution.quant, 96), solution.dequantize())
    assert (w - solution.reconstruct()).norm() / w.norm() == pytest.approx(solution.error, rel=1e-5)
    lloyd = quantize_weight(w, bits=2, rank=8)
    assert 8 * stored_bytes(solution.quant, 64, 96) <= 8 * stored_bytes(lloyd.quant, 64, 96) + 16 * 64
    assert solution.error < 0.9 * lloyd.error
