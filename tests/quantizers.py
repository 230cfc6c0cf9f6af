"""A way to quantize as one value, so that laws take it from a table: how a matrix is stored, how scales are chosen."""

from dataclasses import dataclass

from torch import Tensor

from loftq import codes
from loftq.kernels import reference
from loftq.numerics import Quantized
from loftq.spec import QuantSpec

WIDTHS = [  # of all codes in blocks
    (code, bits) for code in codes.names() if codes.get(code).form == "blocks" for bits in codes.get(code).widths
]


@dataclass(frozen=True, kw_only=True)
class Fitted(QuantSpec):
    """Stored as its parent is; the scales are fitted."""


def quantize(weight: Tensor, spec: QuantSpec, earlier: Quantized | None = None) -> Quantized:
    """In plain PyTorch."""
    return reference.quantize_residual(weight, weight, spec, fitted=isinstance(spec, Fitted), earlier=earlier)[0]
