"""Compiled CPU kernels: the reference's arithmetic in one pass over memory, with the same results to the bit.

Numba compiles on first use, into a cache beside this file (or the user's cache directory). Kernels work on a range of
rows without the interpreter's lock; every thread that PyTorch has gets a range (:mod:`loftq.kernels.threads`), so a
solver's worker, which has one, runs its kernel alone.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from numba import njit
from torch import Tensor

from loftq.codes import HOST, Absmax, levels
from loftq.kernels import fitting, products, rounding
from loftq.kernels.reference import embedding as embedding  # rows are gathered packed, then decoded
from loftq.kernels.threads import run_over_rows
from loftq.kernels.vectors import (
    LANES,
    add_products,
    add_scaled,
    add_totals,
    fetch,
    look_up,
    multiply,
    real,
    spread,
    store,
    subtract,
    zeros,
)
from loftq.numerics import Quantized, fit_scales, fitted_scales, scale_and_zero, store_scales
from loftq.numerics import rounding as by_output
from loftq.numerics.codebooks import midpoints
from loftq.numerics.fitting import AROUND, ROUNDS, start_parts
from loftq.spec import QuantSpec, packed_shape

NAME = "cpu"
CACHED = 8192  # activations that fast caches hold
AHEAD = 2048  # bytes between the codes that are asked for and those that are read
KNOWN = (32, 64, 128)  # sizes of blocks that get a kernel of their own
FEW_GAPS = 15  # up to here counting the smaller ones, vectorised, beats a table that tells where to look

compiled = njit(nogil=True, cache=True)
inlined = njit(nogil=True, cache=True, forceinline=True)  # into its callers, where its constants are known


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
    target, weight = target.detach().float().contiguous(), weight.detach().float().contiguous()
    if fitted:
        scales = _fitted_scales(target, spec, earlier and earlier.scales)
    else:
        is_absmax = type(spec.codebook).scale is Absmax.scale
        scales = _absmax_scales(target, spec) if is_absmax else fit_scales(target, spec)
    scale, zero, block = _expanded(scales, spec, target.shape)
    codes, residual = torch.empty_like(target, dtype=torch.uint8), torch.empty_like(target) if out is None else out
    gaps, table = midpoints(spec.code, spec.width), levels(spec.code, spec.width)
    arrays = target, weight, scale, zero
    if len(gaps) <= FEW_GAPS:
        run_over_rows(_quantize_by_counting, len(target), *arrays, gaps, table, block, codes, residual)
    else:
        cells = _cells(spec.code, spec.width)
        run_over_rows(_quantize_by_cells, len(target), *arrays, *cells, table, block, codes, residual)
    return Quantized(codes, scales), residual


def _round_block(values: Tensor, upper: Tensor, scale: Tensor, zero: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    gaps, table = midpoints(spec.code, spec.width), levels(spec.code, spec.width)
    codes, fed = torch.empty_like(values, dtype=torch.uint8), torch.empty_like(values)
    run_over_rows(rounding.round_block, len(values), values, upper, scale, zero, gaps, table, codes, fed)
    return codes, fed


def _descend_block(
    pull: Tensor, codes: Tensor, own: Tensor, scale: Tensor, zero: Tensor, spec: QuantSpec
) -> tuple[Tensor, Tensor]:
    gaps, table = midpoints(spec.code, spec.width), levels(spec.code, spec.width)
    codes, moved = codes.clone(), torch.empty_like(pull)
    run_over_rows(rounding.descend_block, len(pull), pull, codes, own.contiguous(), scale, zero, gaps, table, moved)
    return codes, moved


def _search(target: Tensor, spec: QuantSpec, near: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
    block = min(spec.block_size, target.shape[1])
    result = target.new_empty(2, len(target), -(-target.shape[1] // block))
    start = target.new_empty(2, 0, 0) if near is None else torch.stack(near)
    factors = torch.tensor(start_parts(spec.code, spec.width) if near is None else AROUND, **HOST)
    gaps, table = midpoints(spec.code, spec.width), levels(spec.code, spec.width)
    args = target, start, factors, ROUNDS, gaps, table, spec.codebook.zero is not None, block, result
    run_over_rows(fitting.search, len(target), *args)
    return result[0], result[1]


def _block_errors(target: Tensor, scales: dict[str, Tensor], spec: QuantSpec, least: float) -> Tensor:
    scale, zero, block = _expanded(scales, spec, target.shape)
    gaps, table, errors = midpoints(spec.code, spec.width), levels(spec.code, spec.width), torch.empty_like(scale)
    args = target, scale, zero, gaps, table, np.float32(least), block, errors
    run_over_rows(fitting.block_errors, len(target), *args)
    return errors


# The contract's functions are the reference's, with the compiled parts.
_fitted_scales = functools.partial(fitted_scales, search=_search, block_errors=_block_errors)
feedback = functools.partial(by_output.feedback, fit=_fitted_scales, round_block=_round_block)
descend = functools.partial(by_output.descend, descend_block=_descend_block)


def _absmax_scales(target: Tensor, spec: QuantSpec) -> dict[str, Tensor]:
    block = min(spec.block_size, target.shape[1])
    absmax = target.new_empty(len(target), -(-target.shape[1] // block))
    run_over_rows(_absmax, len(target), target, block, absmax)
    return store_scales(absmax.div_(levels(spec.code, spec.width)[-1].item()), spec)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes to bytes, as :func:`loftq.numerics.pack`."""
    rows, columns = codes.shape
    packed = codes.new_empty(packed_shape(rows, columns, bits), dtype=torch.int8)
    run_over_rows(_pack, rows, codes.contiguous(), bits, packed.view(rows, -1))
    return packed


def multiplicand(stored: dict[str, Tensor], spec: QuantSpec, columns: int) -> products.Multiplicand:
    """The stored tensors as products see them."""
    codes, constants = _codes(stored, spec, columns), _constants(spec, columns)
    decode = functools.partial(_decode_part, codes, constants.width)
    return products.Multiplicand(codes.packed.shape[0], columns, codes, constants.product, decode, unit=1)


dequantize = functools.partial(products.dequantize, multiplicand)
linear = functools.partial(products.linear, multiplicand)
linear_grad_input = functools.partial(products.linear_grad_input, multiplicand)


def _decode_part(codes: "PackedCodes", bits: int, part: slice, out: Tensor) -> None:
    zero = None if codes.zero is None else codes.zero[part]
    some = codes._replace(packed=codes.packed[part], scale=codes.scale[part], zero=zero)
    run_over_rows(_decoder(bits), len(out), *some, out)


def _expanded(stored: dict[str, Tensor], spec: QuantSpec, shape: Any) -> tuple[Tensor, Tensor, int]:
    """Scales and zero points as float32 ``(rows, blocks)``, and the block size: one block a row if per tensor."""
    scale, zero = scale_and_zero({k: v.detach() for k, v in stored.items()})
    rows, columns = shape
    block = spec.block(columns)
    scale = scale.expand(rows, -1).contiguous()
    zeros = torch.zeros_like(scale) if zero is None else zero.expand(rows, -1).contiguous()
    return scale, zeros, block


class PackedCodes(NamedTuple):
    """What the kernels are told about a packed weight."""

    packed: Tensor  # int8 (out, bytes)
    scale: Tensor  # (out, blocks), of a dtype that vectors.real reads
    zero: Tensor | None  # the same
    table: Tensor  # float32, the value of every code, as vectors.look_up wants it
    block: int


def _codes(stored: dict[str, Tensor], spec: QuantSpec, columns: int) -> PackedCodes:
    packed, scale, zero = stored["weight"].detach().contiguous(), stored["weight_scale"], stored.get("weight_zero")
    packed = packed if packed.dim() == 2 else packed.flatten(1)
    if spec.double_quant:
        scale, _ = scale_and_zero({k: v.detach() for k, v in stored.items()})
    scale = scale.detach().expand(packed.shape[0], -1).contiguous()
    zero = None if zero is None else zero.detach().expand(packed.shape[0], -1).contiguous()
    constants = _constants(spec, columns)
    return PackedCodes(packed, scale, zero, constants.table, constants.block)


class Constants(NamedTuple):
    """What all weights of a spec and a width share."""

    width: int
    block: int
    table: Tensor
    product: Callable[[int], Callable]


@functools.cache
@torch.inference_mode(False)
def _constants(spec: QuantSpec, columns: int) -> Constants:
    table, block = levels(spec.code, spec.width), spec.block(columns)
    known = block if block in KNOWN and columns % block == 0 else 0
    product = functools.partial(_product, spec.width, known=known)
    return Constants(spec.width, block, table.repeat(max(1, LANES // len(table))), product)


@functools.cache
def _cells(code: str, bits: int) -> tuple[np.float32, np.float32, np.ndarray, np.ndarray]:
    """A table that finds codes: the scaled values in equal cells, so small that at most one gap lies in or near each.

    Returns where the first cell begins, cells per unit, the code before that gap for every cell, and the gaps with an
    infinity at the end. A place in the table is rounded; a hundredth of a cell is more than that can be wrong by.
    """
    gaps = midpoints(code, bits).numpy()
    wide = gaps.astype(np.float64)
    size = np.diff(wide).min() / 2
    edges = wide[0] + size * (np.arange(int((wide[-1] - wide[0]) / size) + 1) - 0.01)
    first_code = np.searchsorted(wide, edges).astype(np.int32)
    return gaps[0], np.float32(1 / size), first_code, np.append(gaps, np.float32(np.inf))


@compiled
def _absmax(target, block, absmax, start, stop):
    """The order of magnitudes is that of their bits, read as integers, with NaN above infinity, so that it is seen."""
    bits, largest_bits = target.view(np.uint32), absmax.view(np.uint32)
    for i in range(start, stop):
        for b in range(absmax.shape[1]):
            part, largest = bits[i, b * block : (b + 1) * block], np.uint32(0)
            for j in range(len(part)):
                magnitude = part[j] & np.uint32(0x7FFFFFFF)
                largest = magnitude if magnitude > largest else largest
            largest_bits[i, b] = largest


@compiled
def _quantize_by_counting(target, weight, scale, zero, gaps, levels, block, codes, residual, start, stop):
    x, c = np.empty(block, np.float32), np.empty(block, np.uint8)
    columns = target.shape[1]
    for i in range(start, stop):
        for b in range(scale.shape[1]):
            first = b * block
            size = min(block, columns - first)
            s, z = scale[i, b], zero[i, b]
            divisor = np.float32(1) if s == 0 else s
            for j in range(size):
                x[j] = target[i, first + j] / divisor + z
                c[j] = 0
            for k in range(0, len(gaps) - 2, 3):  # three gaps at a time: fewer passes over the block
                low, middle, high = gaps[k], gaps[k + 1], gaps[k + 2]
                for j in range(size):
                    c[j] += np.uint8(low < x[j]) + np.uint8(middle < x[j]) + np.uint8(high < x[j])
            for k in range(len(gaps) // 3 * 3, len(gaps)):
                for j in range(size):
                    c[j] += np.uint8(gaps[k] < x[j])
            for j in range(size):
                codes[i, first + j] = c[j]
                residual[i, first + j] = weight[i, first + j] - (levels[c[j]] - z) * s


@compiled
def _quantize_by_cells(
    target, weight, scale, zero, low, per_unit, first_code, gaps, levels, block, codes, residual, start, stop
):
    columns, last = target.shape[1], np.float32(len(first_code) - 1)
    for i in range(start, stop):
        for b in range(scale.shape[1]):
            first = b * block
            s, z = scale[i, b], zero[i, b]
            divisor = np.float32(1) if s == 0 else s
            for j in range(first, min(first + block, columns)):
                x = target[i, j] / divisor + z
                c = first_code[np.int32(min(max((x - low) * per_unit, np.float32(0)), last))]
                c += np.int32(gaps[c] < x)
                codes[i, j] = c
                residual[i, j] = weight[i, j] - (levels[c] - z) * s


@compiled
def _pack(codes, bits, packed, start, stop):
    columns, n_bytes = codes.shape[1], packed.shape[1]
    for i in range(start, stop):
        held, filled, at = np.uint32(0), 0, 0
        for j in range(columns):
            held |= np.uint32(codes[i, j]) << np.uint32(filled)
            filled += bits
            if filled >= 8:
                packed[i, at] = np.uint8(held & np.uint32(255))
                held >>= np.uint32(8)
                filled -= 8
                at += 1
        if at < n_bytes:
            packed[i, at] = np.uint8(held & np.uint32(255))


@compiled
def _code_at(packed, i, j, bits):
    """One code of a row, wherever its bits lie."""
    bit = j * bits
    at, shift = bit >> 3, bit & 7
    word = np.uint32(packed[i, at])
    if shift + bits > 8:
        word |= np.uint32(packed[i, at + 1]) << np.uint32(8)
    return (word >> np.uint32(shift)) & np.uint32((1 << bits) - 1)


@inlined
def _tiled(first, size, bits):
    """How many of ``size`` codes, from column ``first`` on, lie in whole tiles that begin at a byte."""
    return 0 if (first * bits) & 7 else size // LANES * LANES


@inlined
def _value(packed, scale, zero, table, i, j, b, bits):
    """One weight, wherever its bits lie."""
    value = table[_code_at(packed, i, j, bits)]
    if zero is not None:
        value -= real(zero[i, b])
    return value * real(scale[i, b])


@functools.cache
def _decoder(bits: int) -> Callable:
    @compiled
    def decode(packed, scale, zero, table, block, out, start, stop):
        columns, stride = out.shape[1], packed.shape[1]
        for i in range(start, stop):
            for b in range(scale.shape[1]):
                first = b * block
                size = min(block, columns - first)
                whole, codes, place = _tiled(first, size, bits), i * stride + (first * bits >> 3), i * columns + first
                s, z = spread(real(scale[i, b])), spread(np.float32(0))
                if zero is not None:
                    z = spread(real(zero[i, b]))
                for j in range(0, whole, LANES):
                    values = look_up(table, packed, codes + (j * bits >> 3), bits)
                    if zero is not None:
                        values = subtract(values, z)
                    store(out, place + j, multiply(values, s))
                for j in range(whole, size):
                    store(out, place + j, _value(packed, scale, zero, table, i, first + j, b, bits))

    return decode


@functools.cache
def _product(bits: int, few: int, known: int = 0) -> Callable:
    """``y[t, i] = W_i · rows[t]`` for ``few`` tokens at once, some columns at a time: what fast caches hold of them.

    Args:
        known: the size of all blocks, so that their loop is unrolled; 0 for any.
    """

    @compiled
    def product(packed, scale, zero, table, block, rows, y, start, stop):
        columns, stride, blocks, count = rows.shape[1], packed.shape[1], scale.shape[1], len(packed)
        size = known if known else block
        step = max(1, CACHED // (few * size))
        y[:, start:stop] = 0
        for low in range(0, blocks, step):
            for i in range(start, stop):
                sums = zeros(few)
                for b in range(low, min(low + step, blocks)):
                    first = b * size
                    codes, parts = i * stride + (first * bits >> 3), zeros(few)
                    z = spread(np.float32(0))
                    fetch(packed, codes + AHEAD)
                    if zero is not None:
                        z = spread(real(zero[i, b]))
                    whole = known if known else _tiled(first, min(size, columns - first), bits)
                    for j in range(0, whole, LANES):
                        values = look_up(table, packed, codes + (j * bits >> 3), bits)
                        if zero is not None:
                            values = subtract(values, z)
                        parts = add_products(parts, values, rows, first + j, columns)
                    sums = add_scaled(sums, parts, spread(real(scale[i, b])))
                add_totals(y, i, count, sums)
        if size % LANES or columns % LANES:
            for i in range(start, stop):
                for b in range(blocks):
                    first = b * size
                    last = min(first + size, columns)
                    for j in range(first + _tiled(first, last - first, bits), last):
                        value = _value(packed, scale, zero, table, i, j, b, bits)
                        for t in range(few):
                            y[t, i] += value * rows[t, j]

    return product
