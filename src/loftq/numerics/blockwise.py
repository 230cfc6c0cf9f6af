"""Blockwise quantization: scales from blocks of a row, codes from the *stored* scales.

Every code decodes by one formula, ``value = (levels[code] - zero) * scale``. Scales are first brought to the
form in which they are stored (rounded, or quantized themselves), and only then are codes chosen, so what the
solver optimises is what a reader of the file gets.
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int16, UInt8
from torch import Tensor

from loftq.codes import Absmax, levels
from loftq.errors import NumericalError, option
from loftq.numerics.codebooks import dynamic_8bit, halfway, midpoints
from loftq.numerics.packing import pack, unpack
from loftq.spec import NESTED_BLOCK, QuantSpec

CHUNK = 1 << 22  # elements worked on at a time: bounds temporaries, and stays near the caches


@dataclass(frozen=True)
class Quantized:
    """A quantized matrix: one code per weight, of a trellis one window, and the tensors that scale it, as stored."""

    codes: UInt8[Tensor, "out in"] | Int16[Tensor, "out in"]
    scales: dict[str, Tensor]  # by suffix, as loftq.spec.stored_tensors has them


def nearest(weight: Float[Tensor, "out in"], scales: dict[str, Tensor], spec: QuantSpec) -> Quantized:
    """Nearest codes of a float32 ``weight`` against scales as they are stored."""
    scale, zero = scale_and_zero(scales)
    safe = torch.where(scale == 0, torch.ones_like(scale), scale)
    gaps = midpoints(spec.code, spec.width).to(weight.device)
    codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
    for rows in row_chunks(weight):
        parts = zip(in_blocks(weight[rows], spec), in_blocks(codes[rows], spec), strict=True)
        for (at, values), (_, out) in parts:
            scaled = values / _at(safe, rows, at)
            if zero is not None:
                scaled += _at(zero, rows, at)
            out.copy_(torch.bucketize(scaled, gaps, out_int32=True))
    return Quantized(codes, scales)


def dequantize(quantized: Quantized, spec: QuantSpec) -> Float[Tensor, "out in"]:
    """``(levels[code] - zero) * scale`` in float32."""
    table = levels(spec.code, spec.width).to(quantized.codes.device)
    values = torch.empty(quantized.codes.shape, dtype=torch.float32, device=quantized.codes.device)
    for rows in row_chunks(values):
        values[rows] = table[quantized.codes[rows].int()]
    return _rescale(values, quantized.scales, spec)


def encode(quantized: Quantized, spec: QuantSpec) -> dict[str, Tensor]:
    """The tensors of the file format, by suffix: packed codes and scales."""
    return {"weight": pack(quantized.codes, spec.width), **quantized.scales}


def decode(tensors: dict[str, Tensor], spec: QuantSpec, columns: int) -> Float[Tensor, "out in"]:
    """The float32 matrix that the tensors of the file format stand for.

    Where a byte holds whole codes, a table of 256 rows maps it to its levels at once.
    """
    packed = tensors["weight"]
    if 8 % spec.width:
        codes = unpack(packed, spec.width, columns)
        return dequantize(Quantized(codes, tensors), spec)
    every_byte = torch.arange(256, dtype=torch.uint8, device="cpu").view(torch.int8)[:, None]
    table = levels(spec.code, spec.width)[unpack(every_byte, spec.width, 8 // spec.width).int()]
    bytes_ = packed.reshape(packed.shape[0], -1).view(torch.uint8)
    values = torch.nn.functional.embedding(bytes_.int(), table.to(packed.device)).flatten(1)
    return _rescale(values[:, :columns].contiguous(), tensors, spec)


def decode_rows(tensors: dict[str, Tensor], spec: QuantSpec, columns: int, rows: Tensor) -> Float[Tensor, "n in"]:
    """Some rows of :func:`decode`, by their indices, without decoding the others: an embedding's lookup."""
    chosen = {"weight": tensors["weight"].index_select(0, rows)}  # which refuses negative indices, as an embedding does
    for name in ("weight_scale", "weight_zero"):
        if name in tensors:
            whole = tensors[name].shape[0] == 1 < tensors["weight"].shape[0]  # one scale for the matrix
            chosen[name] = tensors[name] if whole else tensors[name].index_select(0, rows)
    if "weight_scale_absmax" in tensors:  # the scales' own scales belong to places in the whole table
        blocks = tensors["weight_scale"].shape[1]
        places = rows[:, None] * blocks + torch.arange(blocks, device=rows.device)
        absmax = tensors["weight_scale_absmax"][places // NESTED_BLOCK]
        chosen["weight_scale"] = _undo_double(chosen["weight_scale"], absmax, tensors["weight_scale_mean"])
    return decode(chosen, spec, columns)


def _rescale(values: Tensor, scales: dict[str, Tensor], spec: QuantSpec) -> Tensor:
    """``(values - zero) * scale``, in place."""
    scale, zero = scale_and_zero(scales)
    for at, block in in_blocks(values, spec):
        if zero is not None:
            block -= _at(zero, slice(None), at)
        block *= _at(scale, slice(None), at)
    return values


def fit_scales(weight: Tensor, spec: QuantSpec) -> dict[str, Tensor]:
    """Scales and zero points of every block in their stored form, by suffix; NumericalError if one does not fit."""
    scale, zero = _fit(weight, spec)
    scales = store_scales(scale, spec)
    if zero is not None:
        scales["weight_zero"] = zero.to(torch.uint8) if spec.codebook.zero == "U8" else zero
    return scales


def _fit(weight: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor | None]:
    """Scales and zero points of every block, float32, before they are stored."""
    code, stored = spec.codebook, functools.partial(_rounded, spec=spec)
    if code.per_tensor:
        return code.scale(weight.reshape(1, 1, -1), spec.width, stored)
    found = [code.scale(block, spec.width, stored) for _, block in in_blocks(weight, spec)]
    zeros = [zero for _, zero in found if zero is not None]
    return torch.cat([scale for scale, _ in found], 1), torch.cat(zeros, 1) if zeros else None


def _rounded(scale: Tensor, spec: QuantSpec) -> Tensor:
    """Scales in ``scale_dtype``, or float32 before double quantization. NumericalError if they do not fit."""
    if not scale.isfinite().all():
        cure = (
            "scale the weights down" if isinstance(spec.codebook, Absmax) else "use code nf, or scale the weights down"
        )
        raise NumericalError(f"a scale of code {spec.code} is beyond float32: the weights are too large; {cure}")
    dtype = torch.float32 if spec.double_quant else getattr(torch, spec.scale_dtype)
    stored = scale.to(dtype)
    if not stored.isfinite().all():
        largest = scale.abs().max().item()
        wider = "bfloat16" if dtype == torch.float16 and largest < torch.finfo(torch.bfloat16).max else "float32"
        raise NumericalError(
            f"a scale of {largest:.4g} does not fit {spec.scale_dtype}, which ends at {torch.finfo(dtype).max:.4g}; "
            f"use {option('scale_dtype', wider)}"
        )
    return stored


def store_scales(scale: Tensor, spec: QuantSpec) -> dict[str, Tensor]:
    """Scales in their stored form: rounded to ``scale_dtype``, or bitsandbytes' double quantization."""
    scale = _rounded(scale, spec)
    if not spec.double_quant:
        return {"weight_scale": scale}
    flat = scale.flatten()
    mean = flat.mean()
    if not (flat - mean).isfinite().all():
        raise NumericalError(
            f"scales up to {flat.abs().max():.4g} overflow in double quantization; leave out {option('double_quant')}"
        )
    centred = torch.nn.functional.pad(flat - mean, (0, -flat.numel() % NESTED_BLOCK)).view(-1, NESTED_BLOCK)
    absmax = centred.abs().amax(1)
    safe = torch.where(absmax == 0, 1, absmax)
    gaps = halfway(dynamic_8bit()).to(scale.device)
    codes = torch.bucketize(centred / safe[:, None], gaps).to(torch.uint8)
    return {
        "weight_scale": codes.flatten()[: flat.numel()].view(scale.shape),
        "weight_scale_absmax": absmax,
        "weight_scale_mean": mean.reshape(1),
    }


def scale_and_zero(scales: dict[str, Tensor]) -> tuple[Tensor, Tensor | None]:
    """Stored scales and zero points as float32."""
    scale, zero = scales["weight_scale"], scales.get("weight_zero")
    if "weight_scale_absmax" in scales:
        absmax = scales["weight_scale_absmax"].repeat_interleave(NESTED_BLOCK)[: scale.numel()].view(scale.shape)
        scale = _undo_double(scale, absmax, scales["weight_scale_mean"])
    return scale.float(), None if zero is None else zero.float()


def _undo_double(codes: Tensor, absmax: Tensor, mean: Tensor) -> Tensor:
    """Scales from their 8-bit codes, an absmax for each, and the mean of all."""
    return dynamic_8bit().to(codes.device)[codes.int()] * absmax + mean


def in_blocks(values: Tensor, spec: QuantSpec) -> Iterator[tuple[slice, Tensor]]:
    """Views of the whole blocks ``(out, n, block)`` and of the short last one ``(out, 1, rest)``, with their places."""
    columns = values.shape[1]
    size = spec.block(columns)
    whole = columns // size
    yield slice(0, whole), values[:, : whole * size].unflatten(1, (whole, size))
    if columns % size:
        yield slice(whole, whole + 1), values[:, whole * size :].unsqueeze(1)


def _at(scale: Tensor, rows: slice, blocks: slice) -> Tensor:
    """Scales of some rows and blocks, shaped to broadcast over a block; a per-tensor scale has one row."""
    return scale[rows if scale.shape[0] > 1 else slice(None), blocks, None]


def row_chunks(matrix: Tensor) -> Iterator[slice]:
    step = max(1, CHUNK // max(1, matrix.shape[1]))
    for start in range(0, matrix.shape[0], step):
        yield slice(start, start + step)
