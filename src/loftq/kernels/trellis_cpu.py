"""Compiled CPU kernels of the trellis code, in the contract of :mod:`loftq.kernels.reference`."""

import torch
from torch import Tensor

from loftq.kernels import viterbi
from loftq.kernels.cpu import _over_rows


def best_windows(
    target: Tensor, scale: Tensor, rates: Tensor, levels: Tensor, group: int, earlier: Tensor | None = None
) -> Tensor:
    """The windows of little squared error, int16 ``(out, in)``, as :func:`loftq.kernels.viterbi.encode` finds them.

    Args:
        target: float32 (out, in).
        scale: float32 (out, 1), as a reader of the file gets it.
        rates: uint8 (in,), sixteenths of a bit a weight.
        levels: float32 (2^L,).
        group: rows of a group.
        earlier: int16 (out, in), windows that are kept in the sequences where they are better.
    """
    rows, columns = target.shape
    window = len(levels).bit_length() - 1
    codes = torch.empty(rows, columns, dtype=torch.int16, device="cpu")
    before = codes.new_empty(0, 0) if earlier is None else earlier.contiguous()
    args = target.contiguous(), scale.flatten().contiguous(), rates, levels, window, group, before, codes
    _over_rows(viterbi.encode, -(-rows // group) * columns, *args)
    return codes
