"""Vectors in compiled kernels: the same values whatever instructions the processor has."""

import numpy as np
import pytest
import torch
from numba import njit

from loftq.kernels import vectors
from loftq.kernels.vectors import LANES, look_up, real, spread, store, take
from loftq.numerics import pack
from loftq.spec import BITS

HERE = set(njit(lambda: 0).targetctx.codegen().magic_tuple()[2].split(","))  # type: ignore[attr-defined]
SETS = ([], ["+avx2"], ["+avx2", "+avx512f"], ["+avx2", "+avx512f", "+avx512vbmi"])


@pytest.mark.sampled(3)
@pytest.mark.parametrize("features", [some for some in SETS if set(some) <= HERE], ids=str)
@pytest.mark.parametrize("bits", BITS)
def test_codes_are_looked_up(bits: int, features: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Every code in every lane, from any byte, up to the last one of the memory."""
    monkeypatch.setattr(vectors, "_features", lambda context: features)

    @njit
    def looked_up(table, packed, out):
        for tile in range(len(out)):
            store(out, tile * LANES, look_up(table, packed, tile * 2 * bits, bits))

    levels = np.random.default_rng(0).standard_normal(2**bits).astype(np.float32)
    codes = (np.arange(2**bits)[:, None] + np.arange(LANES)) % 2**bits
    packed = pack(torch.from_numpy(codes.astype(np.uint8)), bits).numpy().view(np.uint8).copy()
    out = np.empty(codes.shape, np.float32)
    looked_up(np.tile(levels, max(1, LANES // len(levels))), packed, out)
    assert np.array_equal(out, levels[codes])


def test_values_are_taken_and_stored_as_bfloat16() -> None:
    @njit
    def taken(table, indices, out):
        store(out, 0, take(table, indices, 0))
        store(out, LANES, spread(table[0]))
        store(out, 2 * LANES, table[1])

    table = torch.randn(1000)
    table[:4] = torch.tensor([1.00390625, 1.01171875, -0.0, 1e-40])  # two ties
    indices = torch.cat([torch.arange(4), torch.randint(1000, (LANES - 4,))])
    out = torch.empty(2 * LANES + 1, dtype=torch.bfloat16)
    taken(table.numpy(), indices.numpy().astype(np.uint16), out.view(torch.uint16).numpy())
    assert torch.equal(out, torch.cat([table[indices], table[0].repeat(LANES), table[1:2]]).bfloat16())


@pytest.mark.parametrize("features", [some for some in ([], ["+f16c"]) if set(some) <= HERE], ids=str)
@pytest.mark.parametrize("kind", [np.uint8, np.uint16, np.int16, np.float32])
def test_stored_scales_are_read(kind: type, features: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """All finite ones: plain numbers, bfloat16, float16 with its denormals, float32."""
    monkeypatch.setattr(vectors, "_features", lambda context: features)

    @njit
    def read(stored, out):
        for i in range(len(stored)):
            out[i] = real(stored[i])

    stored = np.arange(256 if kind == np.uint8 else 65536).astype(kind)
    values = {
        np.uint16: lambda: torch.from_numpy(stored).view(torch.bfloat16),
        np.int16: lambda: stored.view(np.float16),
    }
    wanted = np.asarray(torch.as_tensor(values.get(kind, lambda: stored)()).float())
    out = np.empty(len(stored), np.float32)
    read(stored, out)
    finite = np.isfinite(wanted)
    assert np.array_equal(out[finite].view(np.uint32), wanted[finite].view(np.uint32))
