"""Quantized matrices in blocks or as a trellis: each call is passed to the functions of the code's form."""

from types import ModuleType

from jaxtyping import Float
from torch import Tensor

from loftq.numerics import blockwise, fitting, rounding, trellis, trellis_rounding
from loftq.numerics.blockwise import Quantized
from loftq.numerics.metric import Downdate
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


def feedback(
    target: Float[Tensor, "out in"], columns: Float[Tensor, "in in"], spec: QuantSpec, *, fitted: bool = False
) -> Quantized:
    """Quantize with error feedback in H: see :mod:`loftq.numerics.rounding`.

    Args:
        target: float32.
        columns: H; damped before it is inverted.
        fitted: scales of the least error, instead of those of the code's formula.
    """
    return _rounding(spec).feedback(target, columns, spec, fitted=fitted)


def descend(
    target: Float[Tensor, "out in"],
    quantized: Quantized,
    columns: Float[Tensor, "in in"] | Downdate,
    spec: QuantSpec,
    *,
    fitted: bool = False,
    residual: Float[Tensor, "out in"] | None = None,
) -> Quantized:
    """One round of coordinate descent in H, from a quantized matrix to one with no more error.

    Args:
        target: float32.
        columns: H, not damped.
        fitted: move the scales too, within what their stored form can hold.
        residual: ``target − Q``, where it is known; it becomes that of the result.
    """
    return _rounding(spec).descend(target, quantized, columns, spec, fitted=fitted, residual=residual)


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


def _rounding(spec: QuantSpec) -> ModuleType:
    return trellis_rounding if spec.codebook.form == "trellis" else rounding
