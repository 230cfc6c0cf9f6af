"""Products with packed weights on a CPU, whatever their code: straight from the codes for few tokens, else by BLAS."""

import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from loftq.kernels.threads import run_over_rows

FEW_TOKENS = 8  # up to here a product reads the packed weight once; beyond, decoding it first is faster
TOGETHER = 4  # tokens multiplied at once, where there are several
FEW_DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # of activations that float32 holds
PART = 1 << 21  # weights decoded at a time for a product in float32


class Multiplicand(NamedTuple):
    """A packed weight, as products see it."""

    rows: int
    columns: int
    arguments: tuple[Any, ...]  # what kernels are told about it
    product: Callable[[int], Callable]  # tokens that are multiplied at once -> the kernel
    decode: Callable[[slice, Tensor], None]  # some rows of the dense weight, into memory in float32 or bfloat16
    unit: int  # the rows begin at a multiple of it


def dense(weight: Multiplicand, dtype: torch.dtype) -> Tensor:
    """The dense weight. float32 and bfloat16 are written directly, other dtypes by way of float32."""
    direct = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
    out = torch.empty(weight.rows, weight.columns, dtype=direct, device="cpu")
    weight.decode(slice(0, weight.rows), out)
    return out.to(dtype)


def multiply_by(weight: Multiplicand, x: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x @ W.T + bias``. For few tokens straight from the packed weight, in float32; else decoded first, then BLAS."""
    rows = x.detach().reshape(x.numel() // weight.columns, weight.columns)
    if len(rows) <= FEW_TOKENS and x.dtype in FEW_DTYPES:
        y = _few_products(weight, rows.float())
        y = (y if bias is None else y.add_(bias)).to(x.dtype)
    elif x.dtype != torch.float32:
        y = torch.nn.functional.linear(rows, dense(weight, x.dtype), None if bias is None else bias.to(x.dtype))
    else:
        y = rows.new_empty(len(rows), weight.rows)
        for part, decoded in _parts(weight):
            torch.mm(rows, decoded.T, out=y[:, part])
        y = y if bias is None else y.add_(bias)
    return y.view(*x.shape[:-1], weight.rows)


def _few_products(weight: Multiplicand, x: Tensor) -> Tensor:
    """``x @ W.T`` in float32: one token, or :data:`TOGETHER` at once."""
    tokens, few = len(x), 1 if len(x) == 1 else TOGETHER
    x = torch.nn.functional.pad(x, (0, 0, 0, -tokens % few)) if tokens % few else x.contiguous()
    y = x.new_empty(len(x), weight.rows)
    for t in range(0, len(x), few):
        run_over_rows(weight.product(few), weight.rows, *weight.arguments, x[t : t + few], y[t : t + few])
    return y[:tokens]


def multiply_back(weight: Multiplicand, grad: Tensor) -> Tensor:
    """``grad @ W``: decoded, then BLAS."""
    rows = grad.detach().reshape(-1, weight.rows)
    if grad.dtype != torch.float32:
        result = rows @ dense(weight, grad.dtype)
    else:
        result = rows.new_zeros(len(rows), weight.columns)
        for part, decoded in _parts(weight):
            result.addmm_(rows[:, part], decoded)
    return result.view(*grad.shape[:-1], weight.columns)


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
