"""Codes of 2, 3, 4 or 8 bits to bytes and back: one little-endian bit stream a row.

Code ``i`` of a row takes bits ``i*bits`` to ``(i+1)*bits - 1`` of the row's stream, low bits first; the last
byte is filled with zeros. Bytes are held as int8 (see docs/decisions/0002). At 8 bits the packed tensor has an
axis of length one in the middle, so that no packed tensor can be taken for a dense weight (docs/format.md).
"""

import torch
from jaxtyping import Int8, UInt8
from torch import Tensor

from loftq.spec import packed_shape

__all__ = ["pack", "packed_shape", "unpack"]

GROUPS = {2: (4, 1), 3: (8, 3), 4: (2, 1), 8: (1, 1)}  # bits: codes and bytes of the smallest whole group


def pack(codes: UInt8[Tensor, "out in"], bits: int) -> Int8[Tensor, "out ..."]:
    """Codes to bytes. Shape of the result: ``packed_shape(out, in, bits)``."""
    rows, columns = codes.shape
    n_codes, n_bytes = GROUPS[bits]
    groups = -(-columns // n_codes)
    padded = torch.nn.functional.pad(codes, (0, groups * n_codes - columns))
    words = torch.zeros(rows, groups, dtype=torch.int32, device=codes.device)
    for i in range(n_codes):
        words |= padded[:, i::n_codes].to(torch.int32) << (i * bits)
    stream = torch.stack([(words >> (8 * j)) & 0xFF for j in range(n_bytes)], dim=-1)
    shape = packed_shape(rows, columns, bits)
    stream = stream.to(torch.uint8).view(rows, -1)[:, : shape[-1]]
    return stream.contiguous().view(torch.int8).reshape(shape)


def unpack(packed: Int8[Tensor, "out ..."], bits: int, columns: int) -> UInt8[Tensor, "out in"]:
    """Bytes to codes, the inverse of :func:`pack`."""
    rows = packed.shape[0]
    n_codes, n_bytes = GROUPS[bits]
    groups = -(-columns // n_codes)
    stream = packed.reshape(rows, -1).view(torch.uint8)
    stream = torch.nn.functional.pad(stream, (0, groups * n_bytes - stream.shape[1]))
    words = torch.zeros(rows, groups, dtype=torch.int32, device=packed.device)
    for j in range(n_bytes):
        words |= stream[:, j::n_bytes].to(torch.int32) << (8 * j)
    mask = 2**bits - 1
    codes = torch.empty(rows, groups, n_codes, dtype=torch.uint8, device=packed.device)
    for i in range(n_codes):
        codes[..., i] = (words >> (i * bits)) & mask
    return codes.view(rows, -1)[:, :columns].contiguous()
