# ruff: noqa: N803  (constants of a compiled kernel are in capitals)
"""Triton kernels of the trellis code for CUDA devices, in the contract of :mod:`loftq.kernels.reference`.

A tile of windows is decoded where it is used: three bytes hold any window, and the table of levels stays in the first
cache. ``_decode`` writes the dense weight, ``_product`` multiplies a few tokens straight from the packed strings
(:mod:`loftq.kernels.gpu_products`). ``_viterbi`` searches one sequence a program; what it keeps of every row lies in
global memory. Decoded values equal the reference's to the bit.

Tried under Triton's interpreter, and compiled for sm_90; not yet measured on a GPU.
"""

import functools
from typing import Any, NamedTuple

import torch
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]
from torch import Tensor

from loftq.codes import RATE_UNIT
from loftq.kernels import gpu_products
from loftq.kernels.gpu_products import DeviceMultiplicand, ceil, levels, on
from loftq.numerics import Quantized, trellis, trellis_rounding
from loftq.spec import QuantSpec, trellis_groups

NAME = "cuda"
ROWS, COLUMNS, WARPS = 64, 64, 4  # of the tile that a program decodes at a time. Not yet measured
SEARCH_WARPS = 4  # of a program that searches a sequence. Not yet measured


def quantize_residual(
    target: Tensor,
    weight: Tensor,
    spec: QuantSpec,
    out: Tensor | None = None,
    *,
    fitted: bool = False,
    earlier: Quantized | None = None,
) -> tuple[Quantized, Tensor]:
    """Quantize ``target``, and the float32 residual ``weight - dequantize(codes)``, in ``out`` if given."""
    quantized = trellis.quantize(target, spec, fitted=fitted, earlier=earlier, search=viterbi)
    return quantized, torch.sub(weight.float(), trellis.dequantize(quantized, spec), out=out)


def best_windows(target: Tensor, scales: dict[str, Tensor], spec: QuantSpec, earlier: Tensor | None = None) -> Tensor:
    """The best windows of every sequence, as :func:`loftq.numerics.trellis.best_windows`."""
    return trellis.best_windows(target, scales, spec, earlier, viterbi)


# The contract's functions are the reference's, with the compiled search.
feedback = functools.partial(trellis_rounding.feedback, best_windows=best_windows)
descend = functools.partial(trellis_rounding.descend, best_windows=best_windows)


def viterbi(target: Tensor, scale: Tensor, table: Tensor, walk: trellis.Walk) -> Tensor:
    """The windows of sequences ``(n, length)``, as :func:`loftq.numerics.trellis.viterbi`."""
    shifts = torch.tensor([walk.shift(j) for j in range(walk.length)], dtype=torch.int32, device=target.device)
    slowest = walk.rate // RATE_UNIT  # bits by which a window moves at least
    constants = {"L": walk.window, "STATES": 1 << (walk.window - slowest), "CHOICES": 1 << (slowest + 1)}
    path = torch.empty(target.shape, dtype=torch.int32, device=target.device)
    least = target.new_empty(len(target), walk.length + 1, constants["STATES"])
    near = min(trellis.SEAM, walk.length // 2)
    launch: Any = _viterbi[(len(target),)]  # pyright: ignore[reportIndexIssue]
    with on(target.device):
        args = target.contiguous(), scale.contiguous(), shifts, table, least, path, walk.length, near
        launch(*args, **constants, num_warps=SEARCH_WARPS)
    return path


def multiplicand(stored: dict[str, Tensor], spec: QuantSpec, columns: int) -> DeviceMultiplicand:
    """The stored tensors as products see them."""
    weight, constants = _weight(stored, spec, columns)

    def decode(out: Tensor) -> None:
        launch: Any = _decode[ceil(weight.rows, ROWS), ceil(columns, COLUMNS)]  # pyright: ignore[reportIndexIssue]
        launch(weight, out, **constants, num_warps=WARPS, enable_fp_fusion=False)

    def product(grid: tuple[int, int], x: Tensor, y: Tensor, steps: int, **sizes: int) -> None:
        launch: Any = _product[grid]  # pyright: ignore[reportIndexIssue]
        launch(weight, x, y, len(x), steps, **constants, **sizes, num_warps=WARPS)

    return DeviceMultiplicand(weight.scale.device, weight.rows, columns, (ROWS, COLUMNS), decode, product)


dequantize = functools.partial(gpu_products.dequantize, multiplicand)
linear = functools.partial(gpu_products.linear, multiplicand)
linear_grad_input = functools.partial(gpu_products.linear_grad_input, multiplicand)


class TrellisWeight(NamedTuple):
    """What a kernel is told about a packed weight."""

    packed: Tensor  # uint8 (groups, bytes)
    scale: Tensor  # (out,), as stored
    levels: Tensor
    rates: Tensor | None  # uint8 (in,), where columns have rates of their own
    starts: Tensor | None  # int32 (in,), then the first bit of every column in its group
    n_bytes: int  # of a group
    rows: int
    columns: int
    group: int  # rows of a group


def _weight(stored: dict[str, Tensor], spec: QuantSpec, columns: int) -> tuple[TrellisWeight, dict[str, int]]:
    """The kernels' view of the stored tensors, and the constants that they are compiled for."""
    held = {name: tensor.detach().contiguous() for name, tensor in stored.items()}
    packed, rates, starts = held["weight"].view(torch.uint8), held.get("weight_rate"), None
    group = trellis_groups(len(held["weight_scale"]))[1]
    if rates is not None:
        starts = trellis.first_bits(rates, group).to(torch.int32)
    weight = TrellisWeight(
        packed=packed,
        scale=held["weight_scale"].flatten(),
        levels=levels(spec.code, spec.width, packed.device),
        rates=rates,
        starts=starts,
        n_bytes=packed.shape[1],
        rows=len(held["weight_scale"]),
        columns=columns,
        group=group,
    )
    return weight, {"RATE": 0 if rates is not None else spec.rate, "L": spec.width, "R": ROWS, "C": COLUMNS}


# The kernels' constants. RATE: sixteenths of a bit, 0 where columns have rates of their own. L: bits of a window.
# R, C: rows and columns of a tile.


@triton.jit
def _bits(w, group, at, known):
    """At least 17 bits from a bit of a group's string on; zeros behind its end."""
    byte = at // 8
    place = w.packed + group.to(tl.int64)[:, None] * w.n_bytes + byte
    word = tl.load(place, mask=known & (byte < w.n_bytes), other=0).to(tl.int32)
    word |= tl.load(place + 1, mask=known & (byte + 1 < w.n_bytes), other=0).to(tl.int32) << 8
    word |= tl.load(place + 2, mask=known & (byte + 2 < w.n_bytes), other=0).to(tl.int32) << 16
    return word >> (at % 8)


@triton.jit
def _tile(w, rows, columns, RATE: tl.constexpr, L: tl.constexpr):
    """Decoded values ``(R, C)`` in float32; zero beyond the matrix."""
    inside = (rows < w.rows)[:, None] & (columns < w.columns)[None, :]
    group, j = rows // w.group, rows % w.group
    if RATE:
        rate = tl.full([1, 1], RATE, tl.int32)
        start = columns[None, :] * (w.group * RATE // 16)
    else:
        rate = tl.load(w.rates + columns, mask=columns < w.columns, other=0).to(tl.int32)[None, :]
        start = tl.load(w.starts + columns, mask=columns < w.columns, other=0)[None, :]
    at, n = j[:, None] * rate // 16, w.group * rate // 16
    word = _bits(w, group, start + at, inside)
    ahead = n - at  # bits before the string, a circle, begins anew
    wraps = ahead < L
    ahead = tl.where(wraps, ahead, L)
    first = _bits(w, group, start + at * 0, inside & wraps)
    window = ((word & ((1 << ahead) - 1)) | (first << ahead)) & ((1 << L) - 1)
    values = tl.load(w.levels + window, mask=inside & (rate > 0), other=0)
    scale = tl.load(w.scale + rows, mask=rows < w.rows, other=0).to(tl.float32)
    return values * scale[:, None]


@triton.jit
def _decode(w, out, RATE: tl.constexpr, L: tl.constexpr, R: tl.constexpr, C: tl.constexpr):
    rows, columns = tl.program_id(0) * R + tl.arange(0, R), tl.program_id(1) * C + tl.arange(0, C)
    values = _tile(w, rows, columns, RATE, L)
    at = rows.to(tl.int64)[:, None] * w.columns + columns[None, :]
    inside = (rows < w.rows)[:, None] & (columns < w.columns)[None, :]
    tl.store(out + at, values.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _product(
    w, x, y, tokens, steps,
    RATE: tl.constexpr, L: tl.constexpr, R: tl.constexpr, C: tl.constexpr, T: tl.constexpr, BY_ROWS: tl.constexpr,
):  # fmt: skip
    """``x @ W.T``, BY_ROWS ``x @ W``: for up to T tokens one tile of the result, summed over ``steps`` inner tiles."""
    outer, split = tl.program_id(0), tl.program_id(1)
    token = tl.arange(0, T)
    acc = tl.full([C if BY_ROWS else R, T], 0, tl.float32)
    for tile in range(split * steps, (split + 1) * steps):  # beyond the matrix there is nothing to add
        rows = (tile if BY_ROWS else outer) * R + tl.arange(0, R)
        columns = (outer if BY_ROWS else tile) * C + tl.arange(0, C)
        weight = _tile(w, rows, columns, RATE, L)
        if BY_ROWS:
            weight, inner, n_inner = tl.trans(weight), rows, w.rows
        else:
            inner, n_inner = columns, w.columns
        mask = (inner < n_inner)[:, None] & (token < tokens)[None, :]
        factor = tl.load(x + token[None, :] * n_inner + inner[:, None], mask=mask, other=0)
        acc = tl.dot(weight.to(factor.dtype), factor, acc, input_precision="ieee")
    if BY_ROWS:
        place, n_outer = outer * C + tl.arange(0, C), w.columns
    else:
        place, n_outer = outer * R + tl.arange(0, R), w.rows
    at = (split * tokens + token)[None, :] * n_outer + place[:, None]
    tl.store(y + at, acc.to(y.dtype.element_ty), mask=(place < n_outer)[:, None] & (token < tokens)[None, :])


@triton.jit
def _viterbi(
    x, s, shifts, levels, least, path, length, near, L: tl.constexpr, STATES: tl.constexpr, CHOICES: tl.constexpr
):
    """One sequence: the seam by a search around it with free ends, then the way from it round to it."""
    sequence = tl.program_id(0).to(tl.int64)
    x += sequence * length
    s += sequence * length
    path += sequence * length
    least += sequence * (length + 1) * STATES
    low = tl.arange(0, STATES)
    tl.store(least + 2 * near * STATES + low, low * 0.0)
    tl.debug_barrier()
    _backward(x, s, shifts, levels, least, length, near - 1, 2 * near, L, STATES)
    first = length - near
    count = 1 << (L - tl.load(shifts + first - 1))
    errors = tl.load(least + low, mask=low < count, other=float("inf"))
    _, state = tl.reduce((errors, low), 0, _lesser)
    state = _forward(x, s, shifts, levels, least, path, length, first, near, state, L, STATES, CHOICES)
    tl.debug_barrier()
    tl.store(least + length * STATES + low, tl.where(low == state, 0.0, float("inf")))
    tl.debug_barrier()
    _backward(x, s, shifts, levels, least, length, length - 1, length, L, STATES)
    _forward(x, s, shifts, levels, least, path, length, 0, length, state, L, STATES, CHOICES)


@triton.jit
def _backward(x, s, shifts, levels, least, length, last, steps, L: tl.constexpr, STATES: tl.constexpr):
    """The least error of all rows from each one on, for every state before it; the rows end with ``last``."""
    low = tl.arange(0, STATES)
    for done in range(steps):
        t = steps - 1 - done
        j = (last - done + length) % length
        k, new = tl.load(shifts + j), tl.load(shifts + (j + length - 1) % length)
        target, scale = tl.load(x + j), tl.load(s + j)
        known = low < (1 << (L - new))
        best = tl.full([STATES], float("inf"), tl.float32)
        for choice in range(1 << new):
            w = (choice << (L - new)) | low
            difference = target - scale * tl.load(levels + w, mask=known, other=0)
            after = tl.load(least + (t + 1) * STATES + (w >> k), mask=known, other=float("inf"))
            best = tl.minimum(best, difference * difference + after)
        tl.store(least + t * STATES + low, best, mask=known)
        tl.debug_barrier()  # the next row's minima are read by other threads


@triton.jit
def _lesser(error, place, other, other_place):
    """The lesser of two errors and its place; of equal ones the first."""
    first = (error < other) | ((error == other) & (place < other_place))
    return tl.where(first, error, other), tl.where(first, place, other_place)


@triton.jit
def _forward(
    x, s, shifts, levels, least, path, length, first, steps, state,
    L: tl.constexpr, STATES: tl.constexpr, CHOICES: tl.constexpr,
):  # fmt: skip
    """The best way on from ``state`` before row ``first``, and the state behind it. The lowest of equal choices."""
    choice = tl.arange(0, CHOICES)
    for t in range(steps):
        j = first + t
        k, new = tl.load(shifts + j), tl.load(shifts + (j + length - 1) % length)
        known = choice < (1 << new)
        w = (choice << (L - new)) | state
        difference = tl.load(x + j) - tl.load(s + j) * tl.load(levels + w, mask=known, other=0)
        after = tl.load(least + (t + 1) * STATES + (w >> k), mask=known, other=float("inf"))
        _, best = tl.reduce((difference * difference + after, choice), 0, _lesser)
        chosen = (best << (L - new)) | state
        tl.store(path + j, chosen)
        state = chosen >> k
    return state
