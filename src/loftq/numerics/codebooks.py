"""Tables that quantization needs beside the levels of a code: where the nearest level changes, and the 8-bit code of
bitsandbytes for scales that are quantized themselves.
"""

import functools

import torch
from jaxtyping import Float
from torch import Tensor

from loftq.codes import HOST, levels


@functools.cache
@torch.inference_mode(False)
def dynamic_8bit() -> Float[Tensor, "256"]:
    """bitsandbytes' signed 8-bit dynamic code, for double quantization (arXiv 2110.02861, section 2.2).

    Seven decades; decade ``i`` (0 … 6) has ``2**i`` values a side, the middles of equal intervals of
    [0.1, 1] times ``10**(i - 6)``; then 0 and 1. The values are bitsandbytes' to the bit.
    """
    values = [0.0, 1.0]
    for decade in range(7):
        edges = torch.linspace(0.1, 1, 2**decade + 1, **HOST)
        middles = (10 ** (decade - 6) * ((edges[:-1] + edges[1:]) / 2)).tolist()
        values += middles + [-m for m in middles]
    return torch.tensor(sorted(values), **HOST)


@functools.cache
@torch.inference_mode(False)
def midpoints(code: str, bits: int) -> Float[Tensor, " gaps"]:
    """The midpoints between neighbouring levels, where the nearest level changes."""
    return halfway(levels(code, bits))


def halfway(sorted_levels: Float[Tensor, " levels"]) -> Float[Tensor, " gaps"]:
    """Middles of neighbouring levels, rounded once."""
    wide = sorted_levels.double()
    return ((wide[1:] + wide[:-1]) / 2).float()
