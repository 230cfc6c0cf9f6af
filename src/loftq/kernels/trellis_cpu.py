"""Compiled CPU kernels of the trellis code, in the contract of :mod:`loftq.kernels.reference`.

Decoded values equal the reference's to the bit. Encoders find paths of equal error to the last digits of float32; where
two paths cost the same they may differ.
"""

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from loftq.codes import RATE_UNIT, levels
from loftq.kernels import products, viterbi, windows
from loftq.kernels.threads import run_over_rows
from loftq.numerics import Quantized, trellis_rounding
from loftq.numerics.trellis import better_scales, first_bits, first_scales
from loftq.spec import QuantSpec, trellis_groups

NAME = "cpu"


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
    earlier = earlier if fitted else None
    scales = first_scales(target, spec) if earlier is None else dict(earlier.scales)
    codes = best_windows(target, scales, spec, earlier and earlier.codes)
    table, rates = levels(spec.code, spec.width), _rates(scales, spec, target.shape[1])
    if fitted:
        sums = torch.empty(2, len(target), 1, dtype=torch.float64, device="cpu")
        run_over_rows(viterbi.sums, len(target), target, codes, rates, table, sums)
        scales = better_scales(sums[0], sums[1], scales, spec)
    residual = torch.empty_like(target) if out is None else out
    run_over_rows(viterbi.residual, len(target), weight, codes, rates, table, _scale(scales), residual)
    return Quantized(codes, scales), residual


def best_windows(target: Tensor, scales: dict[str, Tensor], spec: QuantSpec, earlier: Tensor | None = None) -> Tensor:
    """The best windows of every sequence, as :func:`loftq.numerics.trellis.best_windows`."""
    rows, columns = target.shape
    groups, length = trellis_groups(rows)
    codes = torch.empty(rows, columns, dtype=torch.int16, device="cpu")
    before = codes.new_empty(0, 0) if earlier is None else earlier.contiguous()
    table, rates = levels(spec.code, spec.width), _rates(scales, spec, columns)
    args = target.contiguous(), _scale(scales), rates, table, spec.width, length, before, codes
    run_over_rows(viterbi.encode, groups * columns, *args)
    return codes


# The contract's functions are the reference's, with the compiled search.
feedback = functools.partial(trellis_rounding.feedback, best_windows=best_windows)
descend = functools.partial(trellis_rounding.descend, best_windows=best_windows)


def multiplicand(stored: dict[str, Tensor], spec: QuantSpec, columns: int) -> products.Multiplicand:
    """The stored tensors as products see them."""
    strings = _strings(stored, spec, columns)
    return products.Multiplicand(
        *(len(strings.scale), columns, strings),
        product=windows.kernel,
        decode=functools.partial(_decode_part, strings),
        unit=strings.group,
    )


dequantize = functools.partial(products.dequantize, multiplicand)
linear = functools.partial(products.linear, multiplicand)
linear_grad_input = functools.partial(products.linear_grad_input, multiplicand)


def _decode_part(strings: "Strings", part: slice, out: Tensor) -> None:
    packed = strings.packed[part.start // strings.group * strings.n_bytes :]
    some = strings._replace(packed=packed, scale=strings.scale[part])
    run_over_rows(windows.kernel(1), len(out), *some, None, out)


class Strings(NamedTuple):
    """What :mod:`loftq.kernels.windows` is told about a packed weight."""

    packed: Tensor  # int8, the strings of all groups
    n_bytes: int  # of a group
    rates: Tensor  # int64 (in,)
    starts: Tensor  # int64 (in,), the first bit of every column in its group
    shifts: Tensor  # uint8 (16, in), where windows begin, from the first of each ``read`` rows
    absent: Tensor  # int16 (in,), 0, or for a column without bits the place of a zero in ``table``
    read: int  # rows whose windows are read at once, 8 or 16
    even: bool  # all columns have one rate
    group: int  # its rows
    window: int  # its bits
    table: Tensor  # float32, the levels and a zero
    scale: Tensor  # float32 (out,)


def _strings(stored: dict[str, Tensor], spec: QuantSpec, columns: int) -> Strings:
    packed, scale = stored["weight"].detach().contiguous(), _scale(stored)
    group, even, n_bytes = trellis_groups(len(scale))[1], "weight_rate" not in stored, packed.shape[1]
    packed = packed.flatten()
    if len(packed) < windows.LEAST:
        packed = torch.nn.functional.pad(packed, (0, windows.LEAST - len(packed)))
    if even:
        layout = _even_layout(spec.rate, spec.width, group, columns)
    else:
        layout = _layout(stored["weight_rate"].detach(), spec.width, group)
    return Strings(packed, n_bytes, *layout, even, group, spec.width, _table(spec.code, spec.width), scale)


@functools.cache
@torch.inference_mode(False)
def _table(code: str, window: int) -> Tensor:
    return torch.nn.functional.pad(levels(code, window), (0, 2**window))


def _layout(rates: Tensor, window: int, group: int) -> tuple[Tensor, Tensor, Tensor, Tensor, int]:
    rates, rows = rates.to(torch.int64), torch.arange(RATE_UNIT, device="cpu")[:, None]
    offsets = rows * rates // RATE_UNIT
    read = windows.UNIT if int(offsets[-1].max()) + window <= windows.READ else windows.UNIT // 2
    shifts = offsets - offsets[::read].repeat_interleave(read, 0)
    absent = rates.eq(0).to(torch.int16) << window
    return rates, first_bits(rates, group), shifts.to(torch.uint8), absent, read


@functools.lru_cache(64)
@torch.inference_mode(False)
def _even_layout(rate: int, window: int, group: int, columns: int) -> tuple[Tensor, Tensor, Tensor, Tensor, int]:
    return _layout(torch.full((columns,), rate, device="cpu"), window, group)


def _scale(scales: dict[str, Tensor]) -> Tensor:
    return scales["weight_scale"].detach().float().flatten().contiguous()


def _rates(scales: dict[str, Tensor], spec: QuantSpec, columns: int) -> Tensor:
    if "weight_rate" in scales:
        return scales["weight_rate"].detach().contiguous()
    return torch.full((columns,), spec.rate, dtype=torch.uint8, device="cpu")
