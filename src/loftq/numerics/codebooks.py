"""Code books: the values that a code of a given width stands for, before scaling.

Tables are made once a process, so they must not depend on who asks first: models are often built under another
default dtype, on the meta device, or in inference mode.
"""

import functools
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from loftq.errors import UsageError

HOST: Any = {"dtype": torch.float32, "device": "cpu"}
OFFSET = 0.9677083  # outer quantile of NF4 in QLoRA's released code; LoftQ's code uses it for every width


@functools.cache
@torch.inference_mode(False)
def normal_float(bits: int) -> Float[Tensor, " levels"]:
    """Levels of the NormalFloat code, sorted, in [-1, 1], with an exact zero.

    QLoRA (arXiv 2305.14314, section 3): quantiles of N(0, 1) taken separately on each side of zero, then
    divided by the largest. One more positive level than negative. Built in the precision of the released
    code (float32 probabilities, float64 quantiles), so that NF4 equals bitsandbytes' table to the bit.

    Returns: ``2**bits`` float32 values. For 2 bits: -1, 0, 0.3379, 1.
    Raises: UsageError if ``bits`` is not 2, 3, 4 or 8.
    """
    if bits not in (2, 3, 4, 8):
        raise UsageError(f"NormalFloat has 2, 3, 4 or 8 bits, got {bits!r}")
    half = 2**bits // 2
    positive = torch.special.ndtri(torch.linspace(OFFSET, 0.5, half + 1, **HOST)[:-1].double())
    negative = -torch.special.ndtri(torch.linspace(OFFSET, 0.5, half, **HOST)[:-1].double())
    values = torch.cat([negative, torch.zeros(1, **HOST).double(), positive]).float().sort().values
    return values / values.max()


LLOYD = {  # benchmarks/levels.py
    2: (-0.7643, -0.1683, 0.347, 1.0),
    3: (-0.7998, -0.4859, -0.2539, -0.0516, 0.1443, 0.3541, 0.6087, 1.0),
    4: (
        *(-0.9163, -0.7046, -0.5496, -0.4214, -0.3097, -0.2088, -0.1148, -0.0244),
        *(0.065, 0.1554, 0.2484, 0.3477, 0.4572, 0.5847, 0.7472, 1.0),
    ),
}


@functools.cache
@torch.inference_mode(False)
def levels(code: str, bits: int) -> Float[Tensor, " levels"]:
    """The ``2**bits`` sorted levels of a code (see :class:`loftq.spec.QuantSpec`).

    ``nf`` is :func:`normal_float`; ``lloyd`` a table of the levels that leave Gaussian blocks of 64 the least squared
    error if scale and sign are fitted, lopsided so that the sign is of use; ``uniform`` is ``linspace(-1, 1)``, without
    a zero (the block uniform of LoftQ's released quantizer); ``affine`` and ``uniform-tensor`` count 0, 1, … and use a
    zero point.
    """
    if code == "nf":
        return normal_float(bits)
    if code == "lloyd":
        return torch.tensor(LLOYD[bits], **HOST)
    if code == "uniform":
        return torch.linspace(-1, 1, 2**bits, **HOST)
    return torch.arange(2**bits, **HOST)


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
    """Where the nearest level changes: halfway between neighbours."""
    return halfway(levels(code, bits))


def halfway(sorted_levels: Float[Tensor, " levels"]) -> Float[Tensor, " gaps"]:
    """Middles of neighbouring levels, rounded once."""
    wide = sorted_levels.double()
    return ((wide[1:] + wide[:-1]) / 2).float()
