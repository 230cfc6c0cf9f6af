# ruff: noqa: N803  (constants of a compiled kernel are in capitals)
"""Triton kernels for CUDA devices: a packed weight is decoded where it is used, and never kept.

Two kernels share one decoder, :func:`_tile`. ``_decode`` writes dense rows: the whole weight, or the rows of an
embedding that are looked up. ``_product`` multiplies a few tokens straight from the packed bytes
(:mod:`loftq.kernels.gpu_products`). Decoded values equal the reference's to the bit: computed in float32 without
contraction, then rounded once.

:func:`quantize_residual`, :func:`feedback`, :func:`descend` and :func:`pack` are the reference's, on the device: a
solver calls them once a step and once a matrix, beside an SVD.

Tried under Triton's interpreter, and compiled for sm_75 to sm_120; not yet measured on a GPU.
"""

import functools
import threading
from typing import Any, NamedTuple

import torch
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]
from torch import Tensor
from triton import knobs  # pyright: ignore[reportMissingImports]

from loftq.kernels import gpu_products
from loftq.kernels.gpu_products import DeviceMultiplicand, ceil, dense, kept_on, levels
from loftq.kernels.reference import descend as descend
from loftq.kernels.reference import feedback as feedback
from loftq.kernels.reference import pack as pack
from loftq.kernels.reference import quantize_residual as quantize_residual
from loftq.numerics import dynamic_8bit
from loftq.numerics.packing import GROUPS
from loftq.spec import NESTED_BLOCK, QuantSpec

NAME = "cuda"
ROWS, COLUMNS, WARPS = 64, 128, 8  # of the tile that a program decodes at a time: 32 weights a thread, none spilled
NESTED = tl.constexpr(NESTED_BLOCK)

# Only the depth of the pipeline is tuned: other tiles or warps could add in another order, and so change bits.
PIPELINES = [triton.Config({}, num_warps=WARPS, num_stages=stages) for stages in (1, 3)]
TUNED_BY = ["n_rows", "steps", "T", "BY_ROWS", "BITS", "BLOCK"]  # all that a pipeline's shared memory depends on, too
_tuning = threading.Lock()  # the tuner keeps a call's arguments in itself, and nn.DataParallel calls from threads


def multiplicand(
    stored: dict[str, Tensor], spec: QuantSpec, columns: int, scale_rows: Tensor | None = None
) -> DeviceMultiplicand:
    """The stored tensors as products see them; with ``scale_rows``, row ``i`` has the scales of ``scale_rows[i]``."""
    weight, constants = _weight(stored, spec, columns)
    n_rows = len(weight.packed)

    def decode(out: Tensor) -> None:
        if n_rows:  # with contraction a double-quantized scale could miss the reference's last bit
            launch: Any = _decode[ceil(n_rows, ROWS), ceil(columns, COLUMNS)]  # pyright: ignore[reportIndexIssue]
            launch(weight, scale_rows, out, n_rows, **constants, num_warps=WARPS, enable_fp_fusion=False)

    def product(grid: tuple[int, int], x: Tensor, y: Tensor, steps: int, **sizes: int) -> None:
        launch: Any = _product[grid]  # pyright: ignore[reportIndexIssue]
        with _tuning:
            launch(weight, x, y, n_rows, len(x), steps, **constants, **sizes, enable_fp_fusion=True)

    return DeviceMultiplicand(weight.packed.device, n_rows, columns, (ROWS, COLUMNS), decode, product)


dequantize = functools.partial(gpu_products.dequantize, multiplicand)
linear = functools.partial(gpu_products.linear, multiplicand)
linear_grad_input = functools.partial(gpu_products.linear_grad_input, multiplicand)


def embedding(rows: Tensor, stored: dict[str, Tensor], spec: QuantSpec, columns: int, dtype: torch.dtype) -> Tensor:
    """The rows of an embedding table with the given indices ``(n,)``, without decoding the others."""
    chosen = stored["weight"].index_select(0, rows)  # refuses indices beyond the table, as nn.Embedding does
    return dense(multiplicand({**stored, "weight": chosen}, spec, columns, rows.contiguous()), dtype)


class Weight(NamedTuple):
    """What a kernel is told about a packed weight; None for what its code does not have."""

    packed: Tensor  # uint8 (rows, bytes)
    scale: Tensor  # (rows, blocks), as stored
    zero: Tensor | None
    absmax: Tensor | None  # with mean and dynamic: how the scales themselves are coded
    mean: Tensor | None
    dynamic: Tensor | None
    levels: Tensor
    n_bytes: int  # of a row
    columns: int
    blocks: int  # from one row's scales to the next one's; 0 where all rows share one scale


def _weight(stored: dict[str, Tensor], spec: QuantSpec, columns: int) -> tuple[Weight, dict[str, int]]:
    """The kernels' view of the stored tensors, and the constants that they are compiled for."""
    held = {name: tensor.detach().contiguous() for name, tensor in stored.items()}
    packed, scale = held["weight"].view(torch.uint8), held["weight_scale"]
    packed = packed.view(packed.shape[0], -1)
    nested = "weight_scale_absmax" in held
    weight = Weight(
        packed=packed,
        scale=scale,
        zero=held.get("weight_zero"),
        absmax=held.get("weight_scale_absmax"),
        mean=held.get("weight_scale_mean"),
        dynamic=_dynamic(packed.device) if nested else None,
        levels=levels(spec.code, spec.width, packed.device),
        n_bytes=packed.shape[1],
        columns=columns,
        blocks=scale.shape[1] if scale.shape[0] > 1 else 0,
    )
    codes, n_bytes = GROUPS[spec.width]
    block = 0 if spec.block(columns) == columns else spec.block_size
    scaled = 1 if block % codes == 0 else codes
    tile = {"R": ROWS, "G": COLUMNS // codes, "C": COLUMNS}
    return weight, {"BITS": spec.width, "CODES": codes, "BYTES": n_bytes, "BLOCK": block, "SCALED": scaled, **tile}


@functools.cache
def _dynamic(device: torch.device) -> Tensor:
    return kept_on(device, dynamic_8bit())


# The kernels' constants. BITS, CODES, BYTES: the width and its group, see GROUPS. BLOCK: the block size, 0 where a row
# is one block. SCALED: 1 where a group has one scale, else CODES. R, G, C: rows, groups and columns of a tile.


@triton.jit
def _codes(w, rows, known, groups, BITS: tl.constexpr, CODES: tl.constexpr, BYTES: tl.constexpr):
    """Codes ``(R, G, CODES)`` from each row's little-endian bit stream; 0 past its end, and in rows not ``known``."""
    word = tl.full([rows.shape[0], groups.shape[0]], 0, tl.int32)
    for k in tl.static_range(BYTES):  # pyright: ignore[reportGeneralTypeIssues]
        at = groups * BYTES + k
        mask = known[:, None] & (at < w.n_bytes)[None, :]
        byte = tl.load(w.packed + rows.to(tl.int64)[:, None] * w.n_bytes + at[None, :], mask=mask, other=0)
        word |= byte.to(tl.int32) << (8 * k)
    shifts = tl.arange(0, CODES) * BITS
    return (word[:, :, None] >> shifts[None, None, :]) & ((1 << BITS) - 1)  # pyright: ignore[reportOperatorIssue]


@triton.jit
def _tile(
    w, rows, scale_rows, known, groups,
    BITS: tl.constexpr, CODES: tl.constexpr, BYTES: tl.constexpr, BLOCK: tl.constexpr, SCALED: tl.constexpr,
    R: tl.constexpr, G: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Decoded values ``(R, C)`` in float32; finite, but meaningless, beyond the matrix."""
    codes = tl.reshape(_codes(w, rows, known, groups, BITS, CODES, BYTES), [R * C])
    table = tl.load(w.levels + tl.arange(0, 1 << BITS))
    values = tl.reshape(tl.gather(table, codes, 0), [R, G, CODES])

    column = groups[:, None] * CODES + tl.arange(0, SCALED)[None, :]
    block = column // BLOCK if BLOCK else column * 0
    at = scale_rows.to(tl.int64)[:, None, None] * w.blocks + block[None, :, :]
    inside = known[:, None, None] & (column < w.columns)[None, :, :]
    scale = tl.load(w.scale + at, mask=inside, other=0)
    if w.absmax is not None:
        centred = tl.load(w.dynamic + scale.to(tl.int32)) * tl.load(w.absmax + at // NESTED, mask=inside, other=0)
        scale = centred + tl.load(w.mean)
    if w.zero is not None:
        values -= tl.load(w.zero + at, mask=inside, other=0).to(tl.float32)
    return tl.reshape(values * scale.to(tl.float32), [R, C])


@triton.jit
def _decode(
    w, index, out, n_rows,
    BITS: tl.constexpr, CODES: tl.constexpr, BYTES: tl.constexpr, BLOCK: tl.constexpr, SCALED: tl.constexpr,
    R: tl.constexpr, G: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Dense rows. With an ``index``, packed row ``i`` has the scales of row ``index[i]``."""
    rows = tl.program_id(0) * R + tl.arange(0, R)
    groups = tl.program_id(1) * G + tl.arange(0, G)
    column = tl.program_id(1) * C + tl.arange(0, C)
    known = rows < n_rows
    scale_rows = rows if index is None else tl.load(index + rows, mask=known, other=0)
    values = _tile(w, rows, scale_rows, known, groups, BITS, CODES, BYTES, BLOCK, SCALED, R, G, C)
    at = rows.to(tl.int64)[:, None] * w.columns + column[None, :]
    tl.store(out + at, values.to(out.dtype.element_ty), mask=known[:, None] & (column < w.columns)[None, :])


@triton.autotune(PIPELINES[:1] if knobs.runtime.interpret else PIPELINES, key=TUNED_BY)
@triton.jit
def _product(
    w, x, y, n_rows, tokens, steps,
    BITS: tl.constexpr, CODES: tl.constexpr, BYTES: tl.constexpr, BLOCK: tl.constexpr, SCALED: tl.constexpr,
    R: tl.constexpr, G: tl.constexpr, C: tl.constexpr, T: tl.constexpr, BY_ROWS: tl.constexpr,
):  # fmt: skip
    """``x @ W.T``, BY_ROWS ``x @ W``: for up to T tokens one tile of the result, summed over ``steps`` inner tiles.

    The weight is the left factor: its tile is the tall side that tensor cores want, the tokens their narrow side.
    """
    outer, split = tl.program_id(0), tl.program_id(1)
    token = tl.arange(0, T)
    acc = tl.full([C if BY_ROWS else R, T], 0, tl.float32)
    for tile in range(split * steps, (split + 1) * steps):  # beyond the matrix there is nothing to add
        rows = (tile if BY_ROWS else outer) * R + tl.arange(0, R)
        groups = (outer if BY_ROWS else tile) * G + tl.arange(0, G)
        known = rows < n_rows
        weight = _tile(w, rows, rows, known, groups, BITS, CODES, BYTES, BLOCK, SCALED, R, G, C)
        if BY_ROWS:
            inner, n_inner = rows, n_rows
        else:
            inner, n_inner = tile * C + tl.arange(0, C), w.columns
        mask = (inner < n_inner)[:, None] & (token < tokens)[None, :]
        factor = tl.load(x + token[None, :] * n_inner + inner[:, None], mask=mask, other=0)
        weight = weight.to(factor.dtype)
        if not BY_ROWS:
            acc = tl.dot(weight, factor, acc, input_precision="ieee")
        elif factor.dtype == tl.float32:  # no tensor cores; transposed, Triton 3.7 does not compile it for sm_100
            acc += tl.trans(tl.dot(tl.trans(factor), weight, input_precision="ieee"))
        else:
            acc = tl.dot(tl.trans(weight), factor, acc, input_precision="ieee")
    if BY_ROWS:
        place, n_outer = outer * C + tl.arange(0, C), w.columns
    else:
        place, n_outer = outer * R + tl.arange(0, R), n_rows
    at = (split * tokens + token)[None, :] * n_outer + place[:, None]
    tl.store(y + at, acc.to(y.dtype.element_ty), mask=(place < n_outer)[:, None] & (token < tokens)[None, :])
