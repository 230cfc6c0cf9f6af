"""Bytes of packed codes: golden ones that freeze the format, and an independent bit stream as oracle."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loftq.numerics import pack, unpack
from loftq.spec import BITS, packed_shape

LENGTHS = [*range(1, 41), 64, 100, 148]

GOLDEN = [  # frozen: format v1
    (2, [1, 0, 3, 2], "b1"),
    (2, [0, 1, 2, 3, 3], "e403"),
    (3, [0, 1, 2, 3, 4, 5, 6, 7], "88c6fa"),
    (3, [7, 0, 5], "4701"),
    (4, [0, 1, 2, 15, 8], "10f208"),
    (8, [0, 1, 127, 128, 255], "00017f80ff"),
]


def bit_stream(codes: np.ndarray, bits: int) -> np.ndarray:
    """The format's words, in numpy: bit j of code i is bit ``i*bits + j`` of the row; byte k holds bits 8k to 8k+7."""
    rows, columns = codes.shape
    every_bit = (codes[:, :, None] >> np.arange(bits)) & 1
    return np.packbits(every_bit.reshape(rows, columns * bits).astype(np.uint8), axis=1, bitorder="little")


@pytest.mark.parametrize(("bits", "codes", "expected"), GOLDEN)
def test_golden_bytes(bits: int, codes: list[int], expected: str) -> None:
    packed = pack(torch.tensor([codes], dtype=torch.uint8), bits)
    assert packed.dtype == torch.int8
    assert packed.numpy().tobytes().hex() == expected
    assert unpack(packed, bits, len(codes)).tolist() == [codes]


@pytest.mark.parametrize("bits", BITS)
def test_every_length_against_the_bit_stream(bits: int) -> None:
    generator = torch.Generator().manual_seed(bits)
    for columns in LENGTHS:
        codes = torch.randint(0, 2**bits, (3, columns), generator=generator, dtype=torch.uint8)
        packed = pack(codes, bits)
        assert packed.shape == packed_shape(3, columns, bits)
        assert packed.is_contiguous()
        assert np.array_equal(packed.view(torch.uint8).numpy().reshape(3, -1), bit_stream(codes.numpy(), bits))
        assert torch.equal(unpack(packed, bits, columns), codes)


@settings(deadline=None, max_examples=60, database=None, derandomize=True)
@given(data=st.data(), bits=st.sampled_from(BITS), rows=st.integers(1, 4), columns=st.integers(1, 40))
def test_round_trip(data: st.DataObject, bits: int, rows: int, columns: int) -> None:
    flat = data.draw(st.lists(st.integers(0, 2**bits - 1), min_size=rows * columns, max_size=rows * columns))
    codes = torch.tensor(flat, dtype=torch.uint8).view(rows, columns)
    packed = pack(codes, bits)
    assert np.array_equal(packed.view(torch.uint8).numpy().reshape(rows, -1), bit_stream(codes.numpy(), bits))
    assert torch.equal(unpack(packed, bits, columns), codes)


@pytest.mark.parametrize("bits", BITS)
def test_packed_shapes_by_width(bits: int) -> None:
    shape = pack(torch.zeros(5, 33, dtype=torch.uint8), bits).shape
    assert shape == {2: (5, 9), 3: (5, 13), 4: (5, 17), 8: (5, 1, 33)}[bits]


@pytest.mark.parametrize("bits", BITS)
def test_rows_are_bytes_of_their_own(bits: int) -> None:
    """A slice of packed rows is the packed slice: shards by row need no repacking."""
    codes = torch.randint(0, 2**bits, (6, 33), dtype=torch.uint8)
    assert torch.equal(pack(codes, bits)[2:5], pack(codes[2:5], bits))


@pytest.mark.parametrize("bits", BITS)
def test_views_in_memory(bits: int) -> None:
    codes = torch.randint(0, 2**bits, (33, 6), dtype=torch.uint8).T
    packed = pack(codes, bits)
    assert torch.equal(packed, pack(codes.contiguous(), bits))
    apart = torch.zeros(12, *packed.shape[1:], dtype=torch.int8)
    apart[::2] = packed
    assert torch.equal(unpack(apart[::2], bits, 33), codes)


@pytest.mark.parametrize("bits", BITS)
def test_trailing_bits_are_zero_and_ignored(bits: int) -> None:
    codes = torch.full((1, 5), 2**bits - 1, dtype=torch.uint8)
    packed = pack(codes, bits)
    spare = packed.numel() * 8 - 5 * bits
    last = packed.flatten()[-1].item() & 0xFF
    assert last >> (8 - spare) == 0 if spare else last == 0xFF
    dirty = packed.clone()
    dirty.view(torch.uint8).flatten()[-1] |= 0xFF << (8 - spare) & 0xFF
    assert torch.equal(unpack(dirty, bits, 5), codes)
