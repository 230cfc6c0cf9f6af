"""The kernels' contract in plain PyTorch: what every other back end is compared with, and the one for any device."""

from collections.abc import Sequence

import torch
from torch import Tensor

from loftq.numerics import Quantized, decode, decode_rows, quantize
from loftq.numerics import dequantize as dequantize_codes
from loftq.numerics import descend as descend
from loftq.numerics import feedback as feedback
from loftq.numerics import pack as pack
from loftq.spec import QuantSpec

NAME = "reference"

Adapter = tuple[Tensor, Tensor, float]  # A (rank, in), B (out, rank), their scaling


def quantize_residual(
    target: Tensor,
    weight: Tensor,
    spec: QuantSpec,
    out: Tensor | None = None,
    *,
    fitted: bool = False,
    earlier: Quantized | None = None,
) -> tuple[Quantized, Tensor]:
    """Quantize ``target``, and the float32 residual ``weight - dequantize(codes)``.

    Args:
        out: float32 and contiguous; takes the residual. It may be ``target``.
        fitted: scales of the least squared error, instead of those of the code's formula.
        earlier: a quantized matrix, much like the target; fitted scales are at least as good for it as these.
    """
    quantized = quantize(target, spec, fitted=fitted, earlier=earlier)
    return quantized, torch.sub(weight.float(), dequantize_codes(quantized, spec), out=out)


def dequantize(stored: dict[str, Tensor], spec: QuantSpec, columns: int, dtype: torch.dtype) -> Tensor:
    """The dense weight ``(out, in)`` in ``dtype``, computed in float32."""
    return decode(stored, spec, columns).to(dtype)


def linear(
    x: Tensor,
    stored: dict[str, Tensor],
    spec: QuantSpec,
    columns: int,
    bias: Tensor | None = None,
    adapters: Sequence[Adapter] = (),
) -> Tensor:
    """``x @ W.T + bias`` in the dtype of ``x``, with adapters beside it."""
    return dense_linear(x, dequantize(stored, spec, columns, x.dtype), bias, adapters)


def dense_linear(x: Tensor, weight: Tensor, bias: Tensor | None, adapters: Sequence[Adapter]) -> Tensor:
    """``x @ weight.T + bias`` for a decoded weight in the dtype of ``x``, with adapters beside it."""
    bias = None if bias is None else bias.to(x.dtype)
    return add_adapters(torch.nn.functional.linear(x, weight, bias), x, adapters)


def add_adapters(y: Tensor, x: Tensor, adapters: Sequence[Adapter]) -> Tensor:
    """``y + (x @ A.T) @ B.T * s`` for every adapter, in the dtype of ``y`` and rounded where PEFT rounds."""
    total, product = y, torch.nn.functional.linear
    for a, b, s in adapters:
        total = total + product(product(x.to(a.dtype), a), b) * s
    return total.to(y.dtype)


def linear_grad_input(grad: Tensor, stored: dict[str, Tensor], spec: QuantSpec, columns: int) -> Tensor:
    """``grad @ W`` in the dtype of ``grad``."""
    return grad @ dequantize(stored, spec, columns, grad.dtype)


def embedding(rows: Tensor, stored: dict[str, Tensor], spec: QuantSpec, columns: int, dtype: torch.dtype) -> Tensor:
    """The rows of an embedding table with the given indices ``(n,)``, without decoding the others."""
    return decode_rows(stored, spec, columns, rows).to(dtype)
