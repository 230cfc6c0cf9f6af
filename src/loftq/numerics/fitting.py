"""Scales fitted to the least squared error of every block, instead of taken from its largest weight.

Lloyd's two steps in turn ("Least squares quantization in PCM", IEEE Trans. Inf. Theory 28, 1982), with the levels given
and only their scale free:

    c = nearest level to w / s
    s = <w, c> / <c, c>

Neither raises the block's error, but they end in a local minimum, and at 4 bits there are many: so there are several
starts. Where the levels are lopsided, a scale of the other sign is another code book that costs no byte.

Sums are folded in halves, and products and sums rounded one by one, so that any back end can have the same bits.
"""

from collections.abc import Callable, Iterator
from typing import TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from loftq.codes import get, levels
from loftq.numerics.blockwise import (
    dequantize,
    fit_scales,
    in_blocks,
    nearest,
    row_chunks,
    scale_and_zero,
    store_scales,
)
from loftq.numerics.codebooks import midpoints
from loftq.spec import QuantSpec

LOWEST = {2: 0.3, 3: 0.45, 4: 0.6, 8: 0.9}  # bits: first of the starts, as a part of the scale that reaches all weights
HIGHEST, STARTS = 1.1, 8  # last of the starts, and their number, for either sign
AROUND = (1.0, 0.92, 0.96, 1.04, 1.08)  # with an earlier scale: the multiples of it to start from
ROUNDS = 3  # of both steps, from the best start
TINY = torch.finfo(torch.float32).tiny

Scales: TypeAlias = dict[str, Tensor]  # as stored, by suffix
Raw: TypeAlias = tuple[Float[Tensor, "out blocks"], Float[Tensor, "out blocks"]]  # scale and zero point in float32


def search(weight: Float[Tensor, "out in"], spec: QuantSpec, near: Raw | None = None) -> Raw:
    """Scale and zero point of every block, before they are rounded to what is stored.

    Args:
        near: an earlier scale and zero point, to start from.
    """
    table, gaps = (each(spec.code, spec.width).to(weight.device) for each in (levels, midpoints))
    result = weight.new_empty(2, len(weight), -(-weight.shape[1] // spec.block_size))
    for rows in row_chunks(weight):
        for at, block in in_blocks(weight[rows], spec):
            unit = _unit(block)
            block = block / unit[..., None]
            given = None if near is None else (near[0][rows, at] / unit, near[1][rows, at])
            scale, zero = _best(block, list(_starts(block, spec, given)), table, gaps, spec.codebook.zero is not None)
            result[0, rows, at], result[1, rows, at] = scale * unit, zero
    return result[0], result[1]


def block_errors(
    weight: Float[Tensor, "out in"], scales: Scales, spec: QuantSpec, least: float = TINY
) -> Float[Tensor, "out blocks"]:
    """Squared error of every block under stored scales.

    In units of the power of two below the block's largest magnitude, squared; the unit is not below ``least``.
    """
    distance = weight - dequantize(nearest(weight, scales, spec), spec)
    pairs = zip(in_blocks(weight, spec), in_blocks(distance, spec), strict=True)
    return torch.cat([_sum((part / _unit(block, least)[..., None]).square()) for (_, block), (_, part) in pairs], 1)


def fitted_scales(
    weight: Float[Tensor, "out in"],
    spec: QuantSpec,
    earlier: Scales | None = None,
    search: Callable[[Tensor, QuantSpec, Raw | None], Raw] = search,
    block_errors: Callable[[Tensor, Scales, QuantSpec, float], Tensor] = block_errors,
) -> Scales:
    """Scales and zero points of the least squared error that is found, as they are stored.

    As stored they are compared with those of the code's formula, or with ``earlier`` ones, and the better are taken:
    block by block; all together under double quantization, which couples the blocks. So no error is above theirs.

    Args:
        weight: float32 and contiguous.
        earlier: scales, as stored, of a matrix much like this one.
        search, block_errors: a back end's own.

    Raises: NumericalError as :func:`loftq.numerics.quantize`.
    """
    other = fit_scales(weight, spec) if earlier is None else earlier
    scale, zero = search(weight, spec, None if earlier is None else _raw(earlier))
    found = store_scales(scale, spec)
    if spec.codebook.zero is not None:
        found["weight_zero"] = zero.to(torch.uint8)
    least = _unit(weight.flatten()).item() if spec.double_quant else TINY
    ours, theirs = (block_errors(weight, scales, spec, least) for scales in (found, other))
    if spec.double_quant:
        return found if ours.double().sum() < theirs.double().sum() else other
    return {name: torch.where(ours < theirs, found[name], other[name]) for name in found}


def _raw(scales: Scales) -> Raw:
    scale, zero = scale_and_zero(scales)
    return scale, torch.zeros_like(scale) if zero is None else zero


def _unit(block: Tensor, least: float = TINY) -> Tensor:
    """The power of two below the largest magnitude: to divide by it is exact, and squares stay in float32's range."""
    largest = block.abs().amax(-1)
    return (largest.view(torch.int32) & 0x7F800000).view(torch.float32).clamp(min=least)


def _starts(block: Tensor, spec: QuantSpec, near: Raw | None) -> Iterator[Raw]:
    if near is not None:
        yield from ((near[0] * factor, near[1]) for factor in AROUND)
        return
    parts, table = start_parts(spec.code, spec.width), levels(spec.code, spec.width)
    if spec.codebook.zero is not None:
        low, high = block.amin(-1).clamp(max=0), block.amax(-1).clamp(min=0)
        reach = (high - low) / table[-1].item()
        zero = (-low / torch.where(reach == 0, 1, reach)).round()
    else:
        reach = block.abs().amax(-1) / table.abs().max().item()
        zero = torch.zeros_like(reach)
    yield from ((reach * part, zero) for part in parts)


def start_parts(code: str, bits: int) -> list[float]:
    """Initial scales, as fractions of the scale that reaches all weights; of both signs for asymmetric levels."""
    parts = torch.linspace(LOWEST[bits], HIGHEST, STARTS, dtype=torch.float32, device="cpu").tolist()
    return [*parts, *(-part for part in parts)] if get(code).lopsided(bits) else parts


def _best(block: Tensor, starts: list[Raw], table: Tensor, gaps: Tensor, affine: bool) -> Raw:
    """From every start both steps once, from the best of them :data:`ROUNDS` times more."""
    best, top = starts[0], torch.full_like(starts[0][0], -1)
    for start in [*starts, *[None] * ROUNDS]:
        scale, zero = start or best
        scale, zero, score = _step(block, scale, zero, table, gaps, affine)
        better = score > top
        best = torch.where(better, scale, best[0]), torch.where(better, zero, best[1])
        top = torch.where(better, score, top)
    return best


def _step(
    block: Tensor, scale: Tensor, zero: Tensor, table: Tensor, gaps: Tensor, affine: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Nearest levels, then the scale, and for affine the zero point, that fit them best; and by how much.

    With levels ``c`` and the best scale the squared error is ``<w, w> - <w, c>² / <c, c>``: the score is what is taken.
    """
    inverse = 1 / torch.where(scale == 0, 1, scale)
    level = table[torch.bucketize(block * inverse[..., None] + zero[..., None], gaps)]
    both, square = _sum(block * level), _sum(level * level)
    if affine:  # a line through (level, weight): where it meets zero, rounded, is the zero point
        count, level, total = block.shape[-1], _sum(level), _sum(block)
        mean = level / count
        slope = (both - total * mean) / (square - level * mean)
        place = (mean - total / count / slope).round()
        zero = torch.where((place >= 0) & (place <= table[-1]), place, zero)
        both = both - zero * total
        square = square - zero * (level + level - zero * count)
    scale = both / torch.where(square == 0, 1, square)
    return scale, zero, both * scale


def _sum(values: Tensor) -> Tensor:
    """Sum over the last axis, the second half onto the first until one is left."""
    while (size := values.shape[-1]) > 1:
        half = (size + 1) // 2
        values = torch.cat([values[..., : size - half] + values[..., half:], values[..., size - half : half]], -1)
    return values[..., 0]
