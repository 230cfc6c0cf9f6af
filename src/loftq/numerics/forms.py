"""Quantized matrices of every form: each call goes to the functions of the code's own form."""

from types import ModuleType

from jaxtyping import Float
from torch import Tensor

from loftq.numerics import blockwise, fitting, trellis
from loftq.numerics.blockwise import Quantized
from loftq.spec import QuantSpec


def quantize(
    weight: Float[Tensor, "out in"], spec: QuantSpec, *, fitted: bool = False, earlier: Quantized | None = None
) -> Quantized:
    """Codes of ``weight`` under ``spec``, the nearest ones or the best found, with scales by the code's formula.

    Scales are computed in float32. A block, or row, whose stored scale is zero decodes to exact zeros.

    Args:
        fitted: scales of the least squared error instead.
        earlier: a quantized matrix, much like this one; fitted scales are at least as good for it as these.

    Raises: NumericalError if a scale does not fit float32, or does not fit ``spec.scale_dtype``.
    """
    if spec.codebook.form == "trellis":
        return trellis.quantize(weight, spec, fitted=fitted, earlier=earlier)
    weight = weight.detach().float().contiguous()
    given = earlier and earlier.scales
    scales = fitting.fitted_scales(weight, spec, given) if fitted else blockwise.fit_scales(weight, spec)
    return blockwise.nearest(weight, scales, spec)


def dequantize(quantized: Quantized, spec: QuantSpec) -> Float[Tensor, "out in"]:
    """The float32 matrix that codes and scales stand for."""
    return _form(spec).dequantize(quantized, spec)


def encode(quantized: Quantized, spec: QuantSpec) -> dict[str, Tensor]:
    """The tensors of the file format, by suffix."""
    return _form(spec).encode(quantized, spec)


def decode(tensors: dict[str, Tensor], spec: QuantSpec, columns: int) -> Float[Tensor, "out in"]:
    """The float32 matrix that the tensors of the file format stand for."""
    return _form(spec).decode(tensors, spec, columns)


def _form(spec: QuantSpec) -> ModuleType:
    return trellis if spec.codebook.form == "trellis" else blockwise
