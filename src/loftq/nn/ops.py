"""The packed product as torch operators, so that compile, checkpointing and FSDP see one opaque call.

``stored`` is the list of a module's stored tensors in the order of :func:`loftq.spec.stored_tensors`; ``spec`` is
its spec as a string. Forward and backward both decode the packed weight; the dense weight is never kept.
"""

import functools
import json
from dataclasses import asdict

import torch
from torch import Tensor

from loftq.numerics import decode
from loftq.spec import QuantSpec, from_dict, stored_tensors


def spec_key(spec: QuantSpec) -> str:
    return json.dumps(asdict(spec), sort_keys=True)


@functools.cache
def _spec(key: str) -> tuple[QuantSpec, tuple[str, ...]]:
    spec = from_dict(QuantSpec, json.loads(key))
    return spec, tuple(stored_tensors(spec, 1, 1))


@torch.library.custom_op("loftq::dequantize", mutates_args=())
def dequantize(stored: list[Tensor], spec: str, columns: int, dtype: torch.dtype) -> Tensor:
    """The dense weight ``(out, in)`` in ``dtype``."""
    quant, names = _spec(spec)
    return decode(dict(zip(names, stored, strict=True)), quant, columns).to(dtype)


@dequantize.register_fake
def _(stored: list[Tensor], spec: str, columns: int, dtype: torch.dtype) -> Tensor:
    return stored[0].new_empty((stored[0].shape[0], columns), dtype=dtype)


@torch.library.custom_op("loftq::linear", mutates_args=())
def linear(x: Tensor, stored: list[Tensor], spec: str, columns: int) -> Tensor:
    """``x @ W.T`` for a packed W, in the dtype of ``x``. ``x``: ``(..., in)``; result ``(..., out)``."""
    return torch.nn.functional.linear(x, dequantize(stored, spec, columns, x.dtype))


@linear.register_fake
def _(x: Tensor, stored: list[Tensor], spec: str, columns: int) -> Tensor:
    return x.new_empty((*x.shape[:-1], stored[0].shape[0]))


@torch.library.custom_op("loftq::linear_grad_input", mutates_args=())
def linear_grad_input(grad: Tensor, stored: list[Tensor], spec: str, columns: int) -> Tensor:
    """``grad @ W``: the gradient of :func:`linear` with respect to its input."""
    return grad @ dequantize(stored, spec, columns, grad.dtype)


@linear_grad_input.register_fake
def _(grad: Tensor, stored: list[Tensor], spec: str, columns: int) -> Tensor:
    return grad.new_empty((*grad.shape[:-1], columns))


def _save(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    _, stored, ctx.spec, ctx.columns = inputs
    ctx.save_for_backward(*stored)


def _backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def]
    stored = list(ctx.saved_tensors)
    return linear_grad_input(grad, stored, ctx.spec, ctx.columns), [None] * len(stored), None, None


linear.register_autograd(_backward, setup_context=_save)
