"""The packed product as torch operators, so that compile, checkpointing and FSDP see one opaque call.

``stored`` is the list of a module's stored tensors in the order of :func:`loftq.spec.stored_tensors`; ``spec`` is
its spec as a string. Forward and backward both decode the packed weight; the dense weight is never kept.
"""

import functools
import json
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from loftq.kernels import backend
from loftq.numerics.machine import SLOW_DTYPES
from loftq.spec import QuantSpec, from_dict, stored_rows, stored_tensors

_library = torch.library.Library("loftq", "DEF")


LOOKS = (torch.Tag.cudagraph_unsafe,)  # of an operator that looks at values: torch.compile leaves it out of CUDA graphs


def _operator(function: Callable[..., Tensor], tags: tuple[torch.Tag, ...] = ()) -> Any:
    """An operator of PyTorch's, its schema as the annotations say.

    ``torch.library.custom_op`` makes the same, and asks at every call of inference whether a result shares memory with
    an argument: that took longer than all else around a small product.
    """
    name = function.__name__
    schema = name + torch.library.infer_schema(function, mutates_args=())
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag, *tags))
    _library.impl(name, function, "CompositeExplicitAutograd")
    return getattr(torch.ops.loftq, name).default


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype that autocast has products of ``x`` computed in; None where it is off, or not for the device."""
    device = x.device.type
    on = device != "meta" and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if on else None


def autocast(x: Tensor) -> Tensor:
    """``x`` in the dtype that products of it are computed in."""
    dtype = autocast_dtype(x)
    return x if dtype is None else x.to(dtype)


def spec_key(spec: QuantSpec) -> str:
    return json.dumps(spec.to_dict(), sort_keys=True)


@functools.cache
def _spec(key: str) -> tuple[QuantSpec, tuple[str, ...]]:
    spec = from_dict(QuantSpec, json.loads(key))
    return spec, tuple(stored_tensors(spec, 1, 1))


def _named(stored: list[Tensor], key: str) -> tuple[ModuleType, dict[str, Tensor], QuantSpec]:
    """The back end for the tensors' device, the tensors by suffix, and their spec."""
    quant, names = _spec(key)
    return backend(stored[0].device, quant), dict(zip(names, stored, strict=True)), quant


def _rows(stored: list[Tensor], key: str) -> int:
    """Rows of the matrix."""
    quant, names = _spec(key)
    return stored_rows(quant, dict(zip(names, stored, strict=True)))


def _own(result: Tensor) -> Tensor:
    """``result``, no longer known as a view: autograd lets nobody change the view that an operator returns in place."""
    return torch.ops.aten._unsafe_view(result, result.shape) if result._is_view() else result


@_operator
def dequantize(stored: list[Tensor], spec: str, columns: int, dtype: torch.dtype) -> Tensor:
    """The dense weight ``(out, in)`` in ``dtype``."""
    kernels, tensors, quant = _named(stored, spec)
    return kernels.dequantize(tensors, quant, columns, dtype)


@torch.library.register_fake("loftq::dequantize", lib=_library)
def _(stored: list[Tensor], spec: str, columns: int, dtype: torch.dtype) -> Tensor:
    return stored[0].new_empty((_rows(stored, spec), columns), dtype=dtype)


@_operator
def linear(x: Tensor, stored: list[Tensor], spec: str, columns: int, bias: Tensor | None) -> Tensor:
    """``x @ W.T + bias`` for a packed W, in the dtype of ``x``. ``x``: ``(..., in)``; result ``(..., out)``."""
    kernels, tensors, quant = _named(stored, spec)
    return _own(kernels.linear(x, tensors, quant, columns, bias))


@torch.library.register_fake("loftq::linear", lib=_library)
def _(x: Tensor, stored: list[Tensor], spec: str, columns: int, bias: Tensor | None) -> Tensor:
    return x.new_empty((*x.shape[:-1], _rows(stored, spec)))


@_operator
def lora_linear(
    x: Tensor,
    stored: list[Tensor],
    spec: str,
    columns: int,
    bias: Tensor | None,
    a: list[Tensor],
    b: list[Tensor],
    scaling: list[float],
) -> Tensor:
    """:func:`linear` plus ``(x @ A.T) @ B.T * scaling`` of every adapter, as PEFT computes it. It has no gradient.

    Args:
        a: of every adapter, ``(rank, in)``.
        b: of every adapter, ``(out, rank)``.
    """
    kernels, tensors, quant = _named(stored, spec)
    return _own(kernels.linear(x, tensors, quant, columns, bias, list(zip(a, b, scaling, strict=True))))


@torch.library.register_fake("loftq::lora_linear", lib=_library)
def _(x: Tensor, stored: list[Tensor], spec: str, columns: int, *_: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], _rows(stored, spec)))


@_operator
def linear_grad_input(grad: Tensor, stored: list[Tensor], spec: str, columns: int) -> Tensor:
    """``grad @ W``: the gradient of :func:`linear` with respect to its input."""
    kernels, tensors, quant = _named(stored, spec)
    return _own(kernels.linear_grad_input(grad, tensors, quant, columns))


@torch.library.register_fake("loftq::linear_grad_input", lib=_library)
def _(grad: Tensor, stored: list[Tensor], spec: str, columns: int) -> Tensor:
    return grad.new_empty((*grad.shape[:-1], columns))


@_operator
def lookup(indices: Tensor, stored: list[Tensor], spec: str, columns: int, dtype: torch.dtype) -> Tensor:
    """Rows of a packed table: ``(*indices.shape, columns)`` in ``dtype``. Only the rows looked up are decoded."""
    if not indices.numel():
        return stored[0].new_empty((*indices.shape, columns), dtype=dtype)
    kernels, tensors, quant = _named(stored, spec)
    return kernels.embedding(indices.flatten(), tensors, quant, columns, dtype).view(*indices.shape, columns)


@torch.library.register_fake("loftq::lookup", lib=_library)
def _(indices: Tensor, stored: list[Tensor], spec: str, columns: int, dtype: torch.dtype) -> Tensor:
    return stored[0].new_empty((*indices.shape, columns), dtype=dtype)


def _save_linear(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    _, stored, ctx.spec, ctx.columns, bias = inputs
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(*stored)


def _of_linear(ctx, grad: Tensor):  # type: ignore[no-untyped-def]
    stored, to_x, to_bias = list(ctx.saved_tensors), None, None
    if ctx.needs_input_grad[0]:
        to_x = linear_grad_input(grad, stored, ctx.spec, ctx.columns)
    if ctx.needs_input_grad[4]:
        to_bias = grad.reshape(-1, grad.shape[-1]).sum(0).to(ctx.bias_dtype)
    return to_x, [None] * len(stored), None, None, to_bias


def _save_linear_grad_input(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    _, stored, ctx.spec, ctx.columns = inputs
    ctx.save_for_backward(*stored)


def _of_linear_grad_input(ctx, grad: Tensor):  # type: ignore[no-untyped-def]
    stored = list(ctx.saved_tensors)
    return linear(grad, stored, ctx.spec, ctx.columns, None), [None] * len(stored), None, None


# Without the bias, each is the other's derivative: the product with a constant matrix, and with its transpose.
torch.library.register_autograd("loftq::linear", _of_linear, setup_context=_save_linear, lib=_library)
torch.library.register_autograd(
    "loftq::linear_grad_input", _of_linear_grad_input, setup_context=_save_linear_grad_input, lib=_library
)


def known(ends: Tensor) -> Tensor:
    """The ends of experts' rows on the CPU, where all products of a forward and its backward look at them: a device is
    waited for once.
    """
    return ends if ends.is_meta else ends.cpu()


def _groups(ends: Tensor, count: int) -> tuple[list[tuple[int, slice]], slice]:
    """Experts that have rows, with these; and the rows of none."""
    stops = [min(end, count) for end in ends.tolist()]
    starts = [0, *stops[:-1]]
    pairs = enumerate(zip(starts, stops, strict=True))
    return [(e, slice(start, stop)) for e, (start, stop) in pairs if stop > start], slice(stops[-1], count)


def _by_expert(
    x: Tensor, ends: Tensor, stored: list[Tensor], spec: str, columns: int, width: int, product: str
) -> Tensor:
    """A product of the back end, ``width`` wide, of every expert's rows with its weight; zero for the rows of none."""
    y = x.new_empty(len(x), width)
    groups, rest = _groups(ends, len(x))
    for e, part in groups:
        kernels, tensors, quant = _named([tensor[e] for tensor in stored], spec)
        y[part] = getattr(kernels, product)(x[part], tensors, quant, columns)
    y[rest] = 0
    return y


@functools.partial(_operator, tags=LOOKS)
def experts(x: Tensor, ends: Tensor, stored: list[Tensor], spec: str, rows: int, columns: int) -> Tensor:
    """``x_i @ W_e.T`` for packed experts; only those that have rows are decoded, one at a time.

    Args:
        x: ``(n, in)``, sorted by expert.
        ends: of every expert, the number of the row after its last, ``(experts,)``; best on the CPU, by :func:`known`.
            What is beyond them all gives zero.
        stored: each with the experts as leading axis.
    """
    return _by_expert(x, ends, stored, spec, columns, rows, "linear")


@torch.library.register_fake("loftq::experts", lib=_library)
def _(x: Tensor, ends: Tensor, stored: list[Tensor], spec: str, rows: int, columns: int) -> Tensor:
    return x.new_empty(len(x), rows)


@functools.partial(_operator, tags=LOOKS)
def experts_grad_input(grad: Tensor, ends: Tensor, stored: list[Tensor], spec: str, rows: int, columns: int) -> Tensor:
    """``grad_i @ W_e``: the gradient of :func:`experts` with respect to its input."""
    return _by_expert(grad, ends, stored, spec, columns, columns, "linear_grad_input")


@torch.library.register_fake("loftq::experts_grad_input", lib=_library)
def _(grad: Tensor, ends: Tensor, stored: list[Tensor], spec: str, rows: int, columns: int) -> Tensor:
    return grad.new_empty(len(grad), columns)


def _save_experts(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    _, ends, stored, *ctx.sizes = inputs
    ctx.save_for_backward(ends, *stored)


def _of_experts(ctx, grad: Tensor):  # type: ignore[no-untyped-def]
    ends, *stored = ctx.saved_tensors
    return experts_grad_input(grad, ends, stored, *ctx.sizes), None, [None] * len(stored), None, None, None


def _of_experts_grad_input(ctx, grad: Tensor):  # type: ignore[no-untyped-def]
    ends, *stored = ctx.saved_tensors
    return experts(grad, ends, stored, *ctx.sizes), None, [None] * len(stored), None, None, None


torch.library.register_autograd("loftq::experts", _of_experts, setup_context=_save_experts, lib=_library)
torch.library.register_autograd(
    "loftq::experts_grad_input", _of_experts_grad_input, setup_context=_save_experts, lib=_library
)


def _product(a: Tensor, b: Tensor, out: Tensor) -> None:
    if a.dtype in SLOW_DTYPES and a.device.type == "cpu":
        out.copy_(a.float() @ b.float())
    else:
        torch.mm(a, b, out=out)


@functools.partial(_operator, tags=LOOKS)
def grouped_mm(x: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    """``x_i @ W_e`` for dense ``(experts, in, out)``; ``x`` and ``ends`` as :func:`experts` takes them.

    The gradient of an expert without rows is zero, not missing.
    """
    y = x.new_empty(len(x), weights.shape[2])
    groups, rest = _groups(ends, len(x))
    for e, part in groups:
        _product(x[part], weights[e], out=y[part])
    y[rest] = 0
    return y


@torch.library.register_fake("loftq::grouped_mm", lib=_library)
def _(x: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    return x.new_empty(len(x), weights.shape[2])


@functools.partial(_operator, tags=LOOKS)
def grouped_outer(x: Tensor, grad: Tensor, ends: Tensor) -> Tensor:
    """``sum_i x_i^T grad_i`` over the rows of each expert: the gradient of :func:`grouped_mm` for its weights."""
    result = x.new_zeros(len(ends), x.shape[1], grad.shape[1])
    for e, part in _groups(ends, len(x))[0]:
        _product(x[part].T, grad[part], out=result[e])
    return result


@torch.library.register_fake("loftq::grouped_outer", lib=_library)
def _(x: Tensor, grad: Tensor, ends: Tensor) -> Tensor:
    return x.new_empty(len(ends), x.shape[1], grad.shape[1])


def _save_grouped(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.save_for_backward(*inputs)


def _of_grouped(ctx, grad: Tensor):  # type: ignore[no-untyped-def]
    x, weights, ends = ctx.saved_tensors
    to_x = grouped_mm(grad, weights.transpose(1, 2), ends) if ctx.needs_input_grad[0] else None
    to_weights = grouped_outer(x, grad, ends) if ctx.needs_input_grad[1] else None
    return to_x, to_weights, None


torch.library.register_autograd("loftq::grouped_mm", _of_grouped, setup_context=_save_grouped, lib=_library)
