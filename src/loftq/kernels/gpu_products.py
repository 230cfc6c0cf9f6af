"""Products with packed weights on a CUDA device, whatever their code: straight from the codes for few tokens.

More than :data:`FEW_TOKENS` go through the dense weight and PyTorch's matrix product. A back end makes them the
functions of :mod:`loftq.kernels.reference` by its ``multiplicand`` of the stored tensors.
"""

import contextlib
import functools
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
from torch import Tensor

from loftq import codes
from loftq.kernels.reference import Adapter, add_adapters, dense_linear
from loftq.spec import QuantSpec

FEW_TOKENS = 64  # up to here a product reads the packed weight itself. Not yet measured
FEW_ON_CORES = 16  # the same where no tensor core multiplies: a thread's sums of more tokens do not fit its registers
TENSOR_CORES = (8, 0)  # compute capability from which Triton uses them, for 16 bits
PROGRAMS = 512  # a product's inner axis is split until there are about as many. Not yet measured
DIRECT = (torch.float32, torch.bfloat16, torch.float16)  # what the kernels read and write; other dtypes are converted


class DeviceMultiplicand(NamedTuple):
    """A packed weight on a device, as products see it.

    Attributes:
        tile: rows and columns that a program decodes at a time.
        decode: launches the kernel that writes the dense weight into memory in one of :data:`DIRECT`.
        product: launches the kernel for few tokens on a grid ``(programs, splits)``, with ``x (tokens, inner)``,
            ``y (splits, tokens, outer)``, the tiles that a program walks through, and its constants T and BY_ROWS.
    """

    device: torch.device
    rows: int
    columns: int
    tile: tuple[int, int]
    decode: Callable[[Tensor], None]
    product: Callable[..., None]


View = Callable[[dict[str, Tensor], QuantSpec, int], DeviceMultiplicand]


def dequantize(
    multiplicand: View, stored: dict[str, Tensor], spec: QuantSpec, columns: int, dtype: torch.dtype
) -> Tensor:
    """The dense weight ``(out, in)`` in ``dtype``, computed in float32."""
    return dense(multiplicand(stored, spec, columns), dtype)


def dense(weight: DeviceMultiplicand, dtype: torch.dtype) -> Tensor:
    """The dense weight in ``dtype``."""
    direct = dtype if dtype in DIRECT else torch.float32
    out = torch.empty(weight.rows, weight.columns, dtype=direct, device=weight.device)
    with on(weight.device):
        weight.decode(out)
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
    """``x @ W.T + bias``, with adapters beside it."""
    weight = multiplicand(stored, spec, columns)
    if not _few(x, columns):
        return dense_linear(x, dense(weight, x.dtype), bias, adapters)
    return add_adapters(_few_products(weight, x, bias, by_rows=False), x, adapters)


def linear_grad_input(
    multiplicand: View, grad: Tensor, stored: dict[str, Tensor], spec: QuantSpec, columns: int
) -> Tensor:
    """``grad @ W``, by the same rule as :func:`linear`."""
    weight = multiplicand(stored, spec, columns)
    if _few(grad, weight.rows):
        return _few_products(weight, grad, None, by_rows=True)
    return grad @ dense(weight, grad.dtype)


def _few(x: Tensor, features: int) -> bool:
    return x.dtype in DIRECT and x.numel() // features <= _most_tokens(x)


def _most_tokens(x: Tensor) -> int:
    """Of float32, whose products are to be exact to its last bits, and of all dtypes on older devices: fewer."""
    old = x.device.type == "cuda" and torch.cuda.get_device_capability(x.device) < TENSOR_CORES
    return FEW_ON_CORES if old or x.dtype == torch.float32 else FEW_TOKENS


def _few_products(weight: DeviceMultiplicand, x: Tensor, bias: Tensor | None, by_rows: bool) -> Tensor:
    """``x @ W.T + bias``, or by rows ``x @ W``: sums over parts of the inner axis."""
    (inner, outer), (inner_tile, outer_tile) = (weight.columns, weight.rows), weight.tile[::-1]
    if by_rows:
        inner, outer, inner_tile, outer_tile = outer, inner, outer_tile, inner_tile
    tiles, programs = ceil(inner, inner_tile), ceil(outer, outer_tile)
    steps = ceil(tiles, ceil(PROGRAMS, programs))  # tiles that one program walks through
    splits = ceil(tiles, steps)
    rows = x.detach().reshape(-1, inner).contiguous()
    whole = splits == 1 and bias is None  # else parts are summed in float32, and rounded once
    y = x.new_empty((splits, len(rows), outer), dtype=x.dtype if whole else torch.float32)
    tokens = max(16, 1 << (len(rows) - 1).bit_length())
    with on(x.device):
        weight.product((programs, splits), rows, y, steps, T=tokens, BY_ROWS=by_rows)
    y = y.sum(0) if splits > 1 else y[0]
    if bias is not None:
        y += bias
    return y.to(x.dtype).view(*x.shape[:-1], outer)


def on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device, which need not be the tensors'."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def ceil(length: int, part: int) -> int:
    return -(-length // part)


@functools.cache
def levels(code: str, bits: int, device: torch.device) -> Tensor:
    """The levels of a code on a device."""
    return kept_on(device, codes.levels(code, bits))


def kept_on(device: torch.device, table: Tensor) -> Tensor:
    """A table on a device, for as long as the process lives, whatever its first user is in the middle of.

    It is copied by a thread of its own. The caller's may be in inference mode, or warm up for CUDA graphs: then PyTorch
    takes its memory from the graphs' pool, and refuses what is still held there after the call.
    """
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(table.to, device).result()
