# ruff: noqa: N803  (constants of a compiled kernel are in capitals)
"""Triton kernels for CUDA devices: a packed weight is decoded where it is used, and never kept.

Two kernels share one decoder, :func:`_tile`. ``_decode`` writes dense rows: the whole weight, or the rows of an
embedding that are looked up. ``_product`` multiplies a few tokens straight from the packed bytes; more than
:data:`FEW_TOKENS` go through the dense weight and PyTorch's matrix product. Decoded values equal the reference's to the
bit: computed in float32 without contraction, then rounded once.

:func:`quantize_residual`, :func:`feedback`, :func:`descend` and :func:`pack` are the reference's, on the device: a
solver calls them once a step and once a matrix, beside an SVD.

Tried under Triton's interpreter, and compiled for sm_80, sm_90 and sm_100; not yet measured on a GPU.
"""

import contextlib
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]
from torch import Tensor
from triton import knobs  # pyright: ignore[reportMissingImports]

from loftq.kernels.reference import Adapter, add_adapters, dense_linear
from loftq.kernels.reference import descend as descend
from loftq.kernels.reference import feedback as feedback
from loftq.kernels.reference import pack as pack
from loftq.kernels.reference import quantize_residual as quantize_residual
from loftq.numerics import dynamic_8bit, levels
from loftq.spec import NESTED_BLOCK, QuantSpec

NAME = "cuda"
FEW_TOKENS = 64  # up to here a product reads the packed weight itself. Not yet measured
ROWS, COLUMNS, WARPS = 64, 128, 8  # of the tile that a program decodes at a time: 32 weights a thread, none spilled
PROGRAMS = 512  # a product's inner axis is split until there are about as many. Not yet measured
GROUPS = {2: (4, 1), 3: (8, 3), 4: (2, 1), 8: (1, 1)}  # bits: codes and bytes of the smallest whole group
DIRECT = (torch.float32, torch.bfloat16, torch.float16)  # what the kernels read and write; other dtypes are converted
NESTED = tl.constexpr(NESTED_BLOCK)

# Only the depth of the pipeline is tuned: other tiles or warps could add in another order, and so change bits.
PIPELINES = [triton.Config({}, num_warps=WARPS, num_stages=stages) for stages in (1, 3)]


def dequantize(stored: dict[str, Tensor], spec: QuantSpec, columns: int, dtype: torch.dtype) -> Tensor:
    """The dense weight ``(out, in)`` in ``dtype``, computed in float32."""
    return _decoded(stored, spec, columns, dtype, None)


def embedding(rows: Tensor, stored: dict[str, Tensor], spec: QuantSpec, columns: int, dtype: torch.dtype) -> Tensor:
    """The rows of an embedding table with the given indices ``(n,)``, without decoding the others."""
    chosen = stored["weight"].index_select(0, rows)  # refuses indices beyond the table, as nn.Embedding does
    return _decoded({**stored, "weight": chosen}, spec, columns, dtype, rows.contiguous())


def linear(
    x: Tensor,
    stored: dict[str, Tensor],
    spec: QuantSpec,
    columns: int,
    bias: Tensor | None = None,
    adapters: Sequence[Adapter] = (),
) -> Tensor:
    """``x @ W.T + bias``. For few tokens straight from the packed weight, else decoded first, then a dense product."""
    if not _few(x, columns):
        return dense_linear(x, dequantize(stored, spec, columns, x.dtype), bias, adapters)
    return add_adapters(_multiplied(x, stored, spec, columns, by_rows=False, bias=bias), x, adapters)


def linear_grad_input(grad: Tensor, stored: dict[str, Tensor], spec: QuantSpec, columns: int) -> Tensor:
    """``grad @ W``, by the same rule as :func:`linear`."""
    if _few(grad, stored["weight"].shape[0]):
        return _multiplied(grad, stored, spec, columns, by_rows=True)
    return grad @ dequantize(stored, spec, columns, grad.dtype)


def _few(x: Tensor, features: int) -> bool:
    return x.dtype in DIRECT and x.numel() // features <= FEW_TOKENS


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
        levels=_levels(spec.code, spec.width, packed.device),
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
def _levels(code: str, bits: int, device: torch.device) -> Tensor:
    return levels(code, bits).to(device)


@functools.cache
def _dynamic(device: torch.device) -> Tensor:
    return dynamic_8bit().to(device)


def _on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device, which need not be the tensors'."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def _decoded(
    stored: dict[str, Tensor], spec: QuantSpec, columns: int, dtype: torch.dtype, scale_rows: Tensor | None
) -> Tensor:
    weight, constants = _weight(stored, spec, columns)
    n_rows = len(weight.packed)
    out = weight.packed.new_empty((n_rows, columns), dtype=dtype if dtype in DIRECT else torch.float32)
    if n_rows:
        launch: Any = _decode[_ceil(n_rows, ROWS), _ceil(columns, COLUMNS)]  # pyright: ignore[reportIndexIssue]
        with _on(out.device):  # with contraction a double-quantized scale could miss the reference's last bit
            launch(weight, scale_rows, out, n_rows, **constants, num_warps=WARPS, enable_fp_fusion=False)
    return out.to(dtype)


def _multiplied(
    x: Tensor, stored: dict[str, Tensor], spec: QuantSpec, columns: int, by_rows: bool, bias: Tensor | None = None
) -> Tensor:
    weight, constants = _weight(stored, spec, columns)
    n_rows = len(weight.packed)
    inner, outer, inner_tile, outer_tile = columns, n_rows, COLUMNS, ROWS
    if by_rows:
        inner, outer, inner_tile, outer_tile = outer, inner, outer_tile, inner_tile
    tiles, programs = _ceil(inner, inner_tile), _ceil(outer, outer_tile)
    steps = _ceil(tiles, _ceil(PROGRAMS, programs))  # tiles that one program walks through
    splits = _ceil(tiles, steps)
    rows = x.detach().reshape(-1, inner).contiguous()
    whole = splits == 1 and bias is None  # else parts are summed in float32, and rounded once
    y = x.new_empty((splits, len(rows), outer), dtype=x.dtype if whole else torch.float32)
    constants |= {"T": max(16, 1 << (len(rows) - 1).bit_length()), "BY_ROWS": by_rows}
    launch: Any = _product[programs, splits]  # pyright: ignore[reportIndexIssue]
    with _on(x.device):
        launch(weight, rows, y, n_rows, len(rows), steps, **constants, enable_fp_fusion=True)
    y = y.sum(0) if splits > 1 else y[0]
    if bias is not None:
        y += bias
    return y.to(x.dtype).view(*x.shape[:-1], outer)


def _ceil(length: int, part: int) -> int:
    return -(-length // part)


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


@triton.autotune(PIPELINES[:1] if knobs.runtime.interpret else PIPELINES, key=["n_rows", "steps", "T", "BITS"])
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
            weight, inner, n_inner = tl.trans(weight), rows, n_rows
        else:
            inner, n_inner = tile * C + tl.arange(0, C), w.columns
        mask = (inner < n_inner)[:, None] & (token < tokens)[None, :]
        factor = tl.load(x + token[None, :] * n_inner + inner[:, None], mask=mask, other=0)
        acc = tl.dot(weight.to(factor.dtype), factor, acc, input_precision="ieee")
    if BY_ROWS:
        place, n_outer = outer * C + tl.arange(0, C), w.columns
    else:
        place, n_outer = outer * R + tl.arange(0, R), n_rows
    at = (split * tokens + token)[None, :] * n_outer + place[:, None]
    tl.store(y + at, acc.to(y.dtype.element_ty), mask=(place < n_outer)[:, None] & (token < tokens)[None, :])
