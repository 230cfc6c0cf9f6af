"""Products with packed weights on a CPU, whatever their code: straight from the codes for few tokens, else by BLAS.

A back end makes them the functions of :mod:`loftq.kernels.reference` by its ``multiplicand`` of the stored tensors.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numba import njit
from torch import Tensor

from loftq.kernels.reference import Adapter, add_adapters
from loftq.kernels.threads import run_over_rows
from loftq.kernels.vectors import real, store
from loftq.numerics.machine import SLOW_DTYPES
from loftq.spec import QuantSpec

FEW_TOKENS = 8  # up to here a product reads the packed weight once; beyond, decoding it first is faster
TOGETHER = 4  # tokens multiplied at once, where there are several
FEW_DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # of activations that float32 holds
IN_FLOAT32 = (torch.float32, *SLOW_DTYPES)  # of activations whose products with a decoded weight are in float32
PART = 1 << 21  # weights decoded at a time for a product in float32

summed = njit(nogil=True, cache=True, fastmath={"reassoc", "contract", "nsz"})  # sums in any order, as BLAS's


class Multiplicand(NamedTuple):
    """A packed weight, as products see it."""

    rows: int
    columns: int
    arguments: tuple[Any, ...]  # what kernels are told about it
    product: Callable[[int], Callable]  # tokens that are multiplied at once -> the kernel
    decode: Callable[[slice, Tensor], None]  # some rows of the dense weight, into memory in float32 or bfloat16
    unit: int  # the rows begin at a multiple of it


# Stored tensors by suffix, their spec, and the columns of the matrix -> the weight.
View = Callable[[dict[str, Tensor], QuantSpec, int], Multiplicand]


def dequantize(
    multiplicand: View, stored: dict[str, Tensor], spec: QuantSpec, columns: int, dtype: torch.dtype
) -> Tensor:
    """The dense weight ``(out, in)`` in ``dtype``."""
    return _dense(multiplicand(stored, spec, columns), dtype)


def _dense(weight: Multiplicand, dtype: torch.dtype) -> Tensor:
    """float32 and bfloat16 are written directly, other dtypes by way of float32."""
    direct = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
    out = torch.empty(weight.rows, weight.columns, dtype=direct, device="cpu")
    weight.decode(slice(0, weight.rows), out)
    return out.to(dtype)


def linear(
    multiplicand: View,
    x: Tensor,
    stored: dict[str, Tensor],
    spec: QuantSpec,
    columns: int,
    bias: Tensor | None = None,
    adapters: Sequence[Adapter] = (),
) -> Tensor:
    """``x @ W.T + bias``, with adapters beside it. For few tokens from the packed weight; else it is decoded first."""
    weight = multiplicand(stored, spec, columns)
    if x.numel() <= FEW_TOKENS * weight.columns and x.dtype in FEW_DTYPES:
        if x.dtype != torch.float16 and len(adapters) < 2 and all(_is_float(a, b) for a, b, _ in adapters):
            return _few_products(weight, x, bias, *adapters)
        return add_adapters(_few_products(weight, x.float(), bias).to(x.dtype), x, adapters)
    rows = x.detach().reshape(-1, weight.columns)
    if x.dtype not in IN_FLOAT32:
        y = torch.nn.functional.linear(rows, _dense(weight, x.dtype), None if bias is None else bias.to(x.dtype))
    else:
        rows = rows.float()
        y = rows.new_empty(len(rows), weight.rows)
        for part, decoded in _parts(weight):
            torch.mm(rows, decoded.T, out=y[:, part])
        y = (y if bias is None else y.add_(bias)).to(x.dtype)
    return add_adapters(y.view(*x.shape[:-1], weight.rows), x, adapters)


def _is_float(*tensors: Tensor) -> bool:
    return all(tensor.dtype == torch.float32 for tensor in tensors)


def _few_products(weight: Multiplicand, x: Tensor, bias: Tensor | None, adapter: Adapter | None = None) -> Tensor:
    """One token, or :data:`TOGETHER` at once, in float32; ``x`` and the result in float32 or bfloat16.

    What comes before and after is compiled too: where a weight has just passed through the caches, a small operator of
    PyTorch's takes many times as long as on its own.
    """
    tokens, few = x.numel() // weight.columns, 1 if x.numel() == weight.columns else TOGETHER
    padded = -(-tokens // few) * few
    rows = torch.empty(padded, weight.columns, dtype=torch.float32, device="cpu")
    y, thin, a, b, scaling = rows.new_empty(padded, weight.rows), None, None, None, 0.0
    if adapter is not None:
        a, b, scaling = adapter[0].detach().contiguous(), adapter[1].detach().contiguous(), adapter[2]
        thin = rows.new_empty(tokens, a.shape[0])
    run_over_rows(_before, 1, x.detach().contiguous().view(tokens, weight.columns), rows, a, thin)
    for t in range(0, padded, few):
        run_over_rows(weight.product(few), weight.rows, *weight.arguments, rows[t : t + few], y[t : t + few])
    out = torch.empty((*x.shape[:-1], weight.rows), dtype=x.dtype, device="cpu")
    bias = None if bias is None else bias.detach().float().contiguous()
    run_over_rows(_after, weight.rows, y, bias, thin, b, np.float32(scaling), out.view(tokens, weight.rows))
    return out


@summed
def _before(x, rows, a, thin, start, stop):
    """``x`` in float32, with zeros behind; ``thin = x @ a.T``."""
    rows[len(x) :] = 0
    for t in range(len(x)):
        for j in range(x.shape[1]):
            rows[t, j] = real(x[t, j])
        if a is not None:
            for r in range(len(a)):
                total = np.float32(0)
                for j in range(x.shape[1]):
                    total += rows[t, j] * a[r, j]
                thin[t, r] = total


@summed
def _after(y, bias, thin, b, scaling, out, start, stop):
    """``y + bias``, rounded, then ``+ thin @ b.T * scaling``, rounded."""
    for t in range(len(out)):
        for i in range(start, stop):
            value = y[t, i]
            if bias is not None:
                value += bias[i]
            store(out, t * out.shape[1] + i, value)
            if b is not None:
                total = np.float32(0)
                for r in range(b.shape[1]):
                    total += thin[t, r] * b[i, r]
                store(out, t * out.shape[1] + i, real(out[t, i]) + total * scaling)


def linear_grad_input(
    multiplicand: View, grad: Tensor, stored: dict[str, Tensor], spec: QuantSpec, columns: int
) -> Tensor:
    """``grad @ W``: decoded, then BLAS."""
    weight = multiplicand(stored, spec, columns)
    rows = grad.detach().reshape(-1, weight.rows)
    if grad.dtype not in IN_FLOAT32:
        result = rows @ _dense(weight, grad.dtype)
    else:
        rows = rows.float()
        result = rows.new_zeros(len(rows), weight.columns)
        for part, decoded in _parts(weight):
            result.addmm_(rows[:, part], decoded)
    return result.view(*grad.shape[:-1], weight.columns).to(grad.dtype)


def _parts(weight: Multiplicand) -> Iterator[tuple[slice, Tensor]]:
    """The dense weight in float32, some rows at a time, always in the same memory.

    Fresh memory for a whole weight costs more, in page faults, than decoding it.
    """
    units = -(-max(16, PART // weight.columns) // weight.unit)
    step = min(weight.rows, units * weight.unit)
    held = _memory(step * weight.columns)
    for start in range(0, weight.rows, step):
        part = slice(start, min(start + step, weight.rows))
        decoded = held[: (part.stop - start) * weight.columns].view(-1, weight.columns)
        weight.decode(part, decoded)
        yield part, decoded


_scratch = threading.local()


def _memory(count: int) -> Tensor:
    """Memory for so many float32 values, this thread's own, the same at every call."""
    held: Tensor | None = getattr(_scratch, "part", None)
    if held is None or held.numel() < count:
        held = _scratch.part = torch.empty(count, dtype=torch.float32, device="cpu")
    return held[:count]
