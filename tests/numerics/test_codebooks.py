"""The code books, by the digits of the papers and of bitsandbytes."""

import pytest
import torch

from loftq.errors import UsageError
from loftq.numerics import dynamic_8bit, levels, normal_float
from loftq.numerics.codebooks import halfway, midpoints
from loftq.solver import solve
from loftq.spec import QuantSpec, SolveSpec
from quantizers import WIDTHS

NF2 = [-1, 0, 0.3379152, 1]
NF3 = [-1, -0.4786292, -0.2171418, 0, 0.1609302, 0.3379152, 0.562617, 1]
NF4 = [
    *(-1, -0.6961929, -0.525073, -0.3949175, -0.2844414, -0.1847734, -0.09105, 0),
    *(0.0795803, 0.1609302, 0.2461123, 0.3379152, 0.4407098, 0.562617, 0.7229567, 1),
]
BITS_OF_NF2 = [0xBF800000, 0x00000000, 0x3EAD033A, 0x3F800000]


@pytest.mark.parametrize(("bits", "digits"), [(2, NF2), (3, NF3), (4, NF4)])
def test_normal_float_has_the_published_digits(bits: int, digits: list[float]) -> None:
    torch.testing.assert_close(normal_float(bits), torch.tensor(digits), rtol=0, atol=2e-7)  # they have 7 digits


def test_normal_float_of_two_bits_to_the_last_bit() -> None:
    assert (normal_float(2).view(torch.int32).long() & 0xFFFFFFFF).tolist() == BITS_OF_NF2  # frozen: format v1


def test_two_bits_are_levels_of_four_bits() -> None:
    assert set(normal_float(2).tolist()) <= set(normal_float(4).tolist())


@pytest.mark.parametrize(("code", "bits"), WIDTHS)
def test_levels_are_sorted_and_distinct_but_for_a_second_zero(code: str, bits: int) -> None:
    table = levels(code, bits)
    assert table.shape == (2**bits,)
    assert table.dtype == torch.float32
    zeros = (table[:-1] == 0) & (table[1:] == 0)
    assert zeros.sum() <= 1
    assert (table.diff()[~zeros] > 0).all()
    gaps = midpoints(code, bits)
    assert ((table[:-1] < gaps) & (gaps < table[1:]))[~zeros].all()
    assert (gaps.diff() > 0).all()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_normal_float_has_zero_one_and_one_more_positive_level(bits: int) -> None:
    table = normal_float(bits)
    assert table[0] == -1
    assert table[-1] == 1
    assert table[2 ** (bits - 1) - 1] == 0
    assert (table > 0).sum() == (table < 0).sum() + 1


@pytest.mark.parametrize("bits", [1, 5, 16])
def test_other_widths_are_refused(bits: int) -> None:
    with pytest.raises(UsageError, match="2, 3, 4 or 8 bits"):
        normal_float(bits)


def test_uniform_levels() -> None:
    torch.testing.assert_close(levels("uniform", 2), torch.tensor([-1, -1 / 3, 1 / 3, 1]))
    assert levels("affine", 3).tolist() == [0, 1, 2, 3, 4, 5, 6, 7]


def test_fp4_levels_are_all_values_of_e2m1() -> None:
    """By the format's definition: sign, two exponent bits with bias 1, a mantissa bit; exponent 0 is subnormal."""
    values = []
    for byte in range(16):
        sign, exponent, mantissa = byte >> 3, byte >> 1 & 3, byte & 1
        magnitude = 2.0 ** (exponent - 1) * (1 + mantissa / 2) if exponent else mantissa / 2
        values.append(-magnitude if sign else magnitude)
    assert levels("fp4", 4).tolist() == sorted(values)


@pytest.mark.parametrize("largest", [0.5, 1, 1.5, 2, 3, 4, 6])
def test_weights_that_come_from_mxfp4_stay_as_they_are(largest: float) -> None:
    """Exponents for scales, blocks of 32: whatever the largest element of a block is. LoRA begins at zero there."""
    table, draw = levels("fp4", 4), torch.Generator().manual_seed(0)
    elements = table[table.abs() <= largest]
    codes = elements[torch.randint(len(elements), (6, 4, 32), generator=draw)]
    codes[..., 7] = -largest
    exponents = torch.randint(-120, 100, (6, 4, 1), generator=draw)
    weight = torch.ldexp(codes, exponents).flatten(1)
    for scales in ("formula", "fitted"):
        solution = solve(weight, QuantSpec(bits=4, code="fp4", block_size=32), 2, SolveSpec(scales=scales))
        assert torch.equal(solution.dequantize(), weight)
        assert solution.error == 0
        assert solution.a.any()
        assert not solution.b.any()


def test_integers_are_those_of_the_containers() -> None:
    """By the containers' definitions: GGUF's Q2_0 has q - 1, Q4_0 q - 8 with the scale's other sign, Q8_0 int8."""
    assert levels("int", 2).tolist() == [q - 1 for q in range(4)]
    assert levels("int", 3).tolist() == [-3, -2, -1, 0, 1, 2, 3, 4]
    assert levels("int", 4).tolist() == sorted(8 - q for q in range(16))
    assert sorted({*levels("int", 8).tolist()}) == [*range(-127, 128)]


@pytest.mark.parametrize(("code", "bits", "end"), [("int", 2, 2), ("int", 4, 8), ("iq4nl", 4, -127)])
def test_a_signed_scale_takes_the_largest_weight_to_the_end(code: str, bits: int, end: int) -> None:
    from loftq.codes import get

    block = torch.tensor([[[0.5, -3.0, 1.0]], [[0.5, 3.0, -1.0]]])
    scale, zero = get(code).scale(block, bits, lambda s: s)
    assert zero is None
    assert torch.equal(scale, torch.tensor([[-3.0], [3.0]]) / end)


def test_dynamic_code_covers_seven_decades() -> None:
    table = dynamic_8bit()
    assert table.shape == (256,)
    assert table[127] == 0
    assert table[-1] == 1
    torch.testing.assert_close(table[128].item(), 0.55e-6, rtol=1e-6, atol=0)
    assert torch.equal(table[:127].flip(0), -table[128:255])


def test_halfway_is_rounded_once() -> None:
    table = torch.tensor([1.0, 1.0 + 2**-22])
    assert halfway(table).item() == 1.0 + 2**-23


@pytest.mark.parametrize(
    "make", [lambda: normal_float(4), lambda: levels("uniform", 4), dynamic_8bit, lambda: midpoints("nf", 4)]
)
@pytest.mark.parametrize("inference", [False, True])
def test_tables_do_not_depend_on_who_asks_first(make, inference: bool) -> None:
    """Tables are cached for the process: a model built in bfloat16 on the meta device must not leave its own there."""
    expected = make().clone()
    for cached in (normal_float, levels, dynamic_8bit, midpoints):
        cached.cache_clear()
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("meta"), torch.inference_mode(inference):
        make()
    torch.set_default_dtype(torch.float32)
    assert torch.equal(make(), expected)
    assert torch.equal(make() * torch.ones(1, requires_grad=True), expected)
