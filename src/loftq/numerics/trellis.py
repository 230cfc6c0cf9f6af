"""The trellis code: neighbouring weights share bits, so that a weight has 2^L levels at any rate of p/16 bits.

Rows are split in groups of N, and the N weights of a group in one column are a *sequence*: a circular string of
``n = N p / 16`` bits. Weight j has the *window* of L bits that begins at bit ``o_j = floor(j p / 16)``, low bit first:

    value = levels[window] * scale[row]

From one weight to the next, ``k = o_{j+1} - o_j`` old bits leave at the low end and as many new ones come in at the
high end: windows are the edges of a trellis, and the best string for a sequence is found by Viterbi's algorithm (IEEE
Trans. Inf. Theory 13, 1967). With fractional rates any weight can still be decoded alone.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int, Int16, Integer, UInt8
from torch import Tensor

from loftq.codes import RATE_UNIT, levels
from loftq.errors import InputError
from loftq.numerics.blockwise import CHUNK, Quantized, fit_scales, scale_and_zero, store_scales
from loftq.numerics.blockwise import dequantize as dequantize_blocks
from loftq.spec import QuantSpec, trellis_groups

RATE_STEP = 8  # sixteenths of a bit by which the rates of columns differ
SEAM = 24  # weights on either side of a sequence's seam by which the bits that its ends share are found
STATES = (1 << 22, 1 << 19)  # windows of all sequences that are worked on at a time, on a device and on a CPU


@dataclass(frozen=True)
class Walk:
    """The positions at which the windows of a sequence begin.

    Attributes:
        length: N.
        rate: p, in sixteenths of a bit.
        window: L.
    """

    length: int
    rate: int
    window: int

    @property
    def bits(self) -> int:
        """n, the bits of the circular string."""
        return self.length * self.rate // RATE_UNIT

    def offset(self, j: int) -> int:
        """o_j, the first bit of weight j's window."""
        return j * self.rate // RATE_UNIT

    def shift(self, j: int) -> int:
        """Bits by which the window of the next weight, or across the seam of the first, begins later."""
        return self.offset(j + 1) - self.offset(j)

    def offsets(self, device: torch.device) -> Int[Tensor, " length"]:
        return torch.arange(self.length, device=device) * self.rate // RATE_UNIT


Search = Callable[[Tensor, Tensor, Tensor, Walk], Tensor]  # as :func:`viterbi`


def quantize(
    weight: Float[Tensor, "out in"],
    spec: QuantSpec,
    *,
    fitted: bool = False,
    earlier: Quantized | None = None,
    search: Search | None = None,
) -> Quantized:
    """The best windows of every sequence, and a scale for every row.

    By formula a row's scale is its root mean square. Fitted, it is ``<w, level> / <level, level>`` of the windows that
    were found, as it is stored, where that lowers the row's error.

    Args:
        earlier: a quantized matrix much like this one. Fitted scales begin from its own; a sequence keeps its windows
            where they are better. So no row's and no sequence's error is above what it leaves.
        search: a back end's own :func:`viterbi`.

    Raises: NumericalError as :func:`loftq.numerics.quantize`.
    """
    weight = weight.detach().float().contiguous()
    earlier = earlier if fitted else None
    scales = first_scales(weight, spec) if earlier is None else dict(earlier.scales)
    codes = best_windows(weight, scales, spec, earlier and earlier.codes, search)
    return Quantized(codes, fitted_rows(weight, codes, scales, spec) if fitted else scales)


def first_scales(
    weight: Float[Tensor, "out in"], spec: QuantSpec, importance: Float[Tensor, " in"] | None = None
) -> dict[str, Tensor]:
    """Scales by formula, and the rates of columns if the spec has them.

    Args:
        importance: of each column's squared error; equal if not given.
    """
    scales = fit_scales(weight, spec)
    if spec.column_rates:
        energy = weight.double().square().mean(0)
        scales["weight_rate"] = column_rates(energy if importance is None else energy * importance, spec)
    return scales


def column_rates(energy: Float[Tensor, " in"], spec: QuantSpec) -> UInt8[Tensor, " in"]:
    """Rates of the least ``sum energy_i 4^(-p_i / 16)`` with the spec's rate as their mean: reverse water-filling.

    Gaussian columns at rate r leave ``4^-r`` of their energy at best (Shannon 1959). Rates go in steps of
    :data:`RATE_STEP`, each to the column where it takes most; the last one may be a part of a step. If no column can
    take that part, because each has all steps or none, all rates are equal.

    Args:
        energy: of every column, times what its error counts.
    """
    total, top = len(energy) * spec.rate, spec.codebook.widths[-1] * RATE_UNIT
    shares = 4.0 ** (-torch.arange(0, top + 1, RATE_STEP, dtype=torch.float64, device=energy.device) / RATE_UNIT)
    gains = energy.double()[:, None] * -shares.diff()  # convex: a column's steps come in order
    order = gains.flatten().argsort(descending=True, stable=True)
    steps = torch.zeros_like(gains, dtype=torch.long).flatten()
    steps[order[: total // RATE_STEP]] = 1
    rates = steps.view_as(gains).sum(1) * RATE_STEP
    part = total % RATE_STEP
    if part:
        between = ((rates > 0) & (rates <= top - part)).nonzero()
        if len(between):
            rates[between[0, 0]] += part
        else:
            rates.fill_(spec.rate)
    return rates.to(torch.uint8)


def fitted_rows(weight: Tensor, codes: Tensor, scales: dict[str, Tensor], spec: QuantSpec) -> dict[str, Tensor]:
    """Scales of the least squared error for given windows, as stored, in the rows where they are better."""
    level = levels_of(codes, scales, spec).double()
    return better_scales(
        (weight.double() * level).sum(1, keepdim=True), level.square().sum(1, keepdim=True), scales, spec
    )


def better_scales(
    cross: Float[Tensor, "out 1"], square: Float[Tensor, "out 1"], scales: dict[str, Tensor], spec: QuantSpec
) -> dict[str, Tensor]:
    """Scales by every row's ``<weight, level>`` and ``<level, level>``, in float64, where they lower its error."""
    before = scale_and_zero(scales)[0].double()
    stored = store_scales((cross / torch.where(square > 0, square, 1)).float(), spec)["weight_scale"]
    after = stored.double()
    better = after * (after * square - 2 * cross) < before * (before * square - 2 * cross)
    return {**scales, "weight_scale": torch.where(better, stored, scales["weight_scale"])}


def best_windows(
    weight: Float[Tensor, "out in"],
    scales: dict[str, Tensor],
    spec: QuantSpec,
    earlier: Tensor | None = None,
    search: Search | None = None,
) -> Int16[Tensor, "out in"]:
    """The best windows of every sequence under stored scales; the ``earlier`` ones where these are better."""
    rows, columns = weight.shape
    groups, length = trellis_groups(rows)
    unit, table = _unit(weight), levels(spec.code, spec.width).to(weight.device)
    target = _sequences(weight / unit, groups, length)
    scale = _sequences(scale_and_zero(scales)[0] / unit, groups, length)
    before = None if earlier is None else _sequences(earlier, groups, length).long()
    found = torch.zeros(groups, columns, length, dtype=torch.int16, device=weight.device)
    for rate, where in _by_rate(scales, spec, columns, weight.device):
        if not rate:
            continue
        walk = Walk(length, rate, spec.width)
        step = max(1, STATES[weight.device.type == "cpu"] // len(table) // groups)
        for part in where.split(step):
            x = target[:, part].flatten(0, 1)
            s = scale.expand(-1, len(part), -1).flatten(0, 1)
            path = (search or viterbi)(x, s, table, walk).long()
            if before is not None:
                old = before[:, part].flatten(0, 1)
                worse = _errors(x, s, table, path) >= _errors(x, s, table, old)
                path = torch.where(worse[:, None], old, path)
            found[:, part] = path.view(groups, len(part), length).to(torch.int16)
    return found.transpose(1, 2).reshape(groups * length, columns)[:rows].contiguous()


def viterbi(
    target: Float[Tensor, "sequences length"],
    scale: Float[Tensor, "sequences length"],
    table: Float[Tensor, " levels"],
    walk: Walk,
) -> Int[Tensor, "sequences length"]:
    """The windows of a circular path with a small ``sum (target - scale * level)^2``.

    The best path is found exactly among those through one seam: the bits that the last and the first window share.
    These are taken from the best open path over the last and first :data:`SEAM` weights.
    """
    near = min(SEAM, walk.length // 2)
    across = [*range(walk.length - near, walk.length), *range(near)]
    open_path = _best_path(target, scale, table, walk, across, None)
    seam = open_path[:, near] & (len(table) >> walk.shift(walk.length - 1)) - 1
    return _best_path(target, scale, table, walk, list(range(walk.length)), seam)


def _best_path(
    target: Tensor, scale: Tensor, table: Tensor, walk: Walk, steps: list[int], seam: Tensor | None
) -> Tensor:
    """Viterbi over the weights ``steps``, with free ends, or from the low bits ``seam`` round to the same bits.

    A window's low ``L - k`` bits are the high ones of the window before: the cost of a window is its own error and the
    minimum over the ``2^k`` windows that differ in the bits that have left.
    """
    cost, left = None, []
    shifts = [walk.shift(j) for j in steps]
    for j, came in zip(steps, [0, *shifts], strict=False):
        own = (target[:, j, None] - scale[:, j, None] * table).square_()
        if cost is None:
            cost = own
            if seam is not None:
                low = torch.arange(len(table), device=table.device) & (len(table) >> shifts[-1]) - 1
                cost = torch.where(low == seam[:, None], cost, torch.inf)
        elif came:
            least, which = cost.unflatten(1, (-1, 1 << came)).min(-1)
            left.append(which.to(torch.uint8))
            cost = (own.unflatten(1, (1 << came, -1)) + least[:, None]).flatten(1)
        else:
            left.append(None)
            cost += own
    assert cost is not None
    if seam is None:
        window = cost.argmin(1)
    else:
        high = cost.unflatten(1, (-1, 1 << shifts[-1]))
        ends = high.gather(1, seam[:, None, None].expand(-1, 1, high.shape[2]))[:, 0]
        window = seam << shifts[-1] | ends.argmin(1)
    path = [window]
    for which, k in zip(reversed(left), reversed(shifts[:-1]), strict=True):
        if which is not None:
            high = window & (len(table) >> k) - 1
            window = high << k | which.gather(1, high[:, None])[:, 0]
        path.append(window)
    return torch.stack(path[::-1], 1)


def _errors(target: Tensor, scale: Tensor, table: Tensor, path: Tensor) -> Float[Tensor, " sequences"]:
    return (target - scale * table[path]).double().square().sum(1)


def check_rates(stored: dict[str, Tensor], spec: QuantSpec) -> None:
    """InputError for rates of columns, read from a file, by which a decoder would look beyond the strings."""
    if "weight_rate" not in stored:
        return
    rates, length = stored["weight_rate"].long(), trellis_groups(len(stored["weight_scale"]))[1]
    short = (rates > 0) & (rates * length < spec.width * RATE_UNIT)
    if short.any() or rates.max() > spec.codebook.widths[-1] * RATE_UNIT or rates.sum() != len(rates) * spec.rate:
        raise InputError(
            f"weight_rate does not fit {spec.bits} bits a weight: the rates have the mean "
            f"{rates.double().mean() / RATE_UNIT:.4g}, {rates.min()} to {rates.max()} sixteenths; download it again"
        )


def dequantize(quantized: Quantized, spec: QuantSpec) -> Float[Tensor, "out in"]:
    """``levels[window] * scale`` in float32; zero in a column of rate 0."""
    values = dequantize_blocks(quantized, spec)
    if "weight_rate" in quantized.scales:
        values *= quantized.scales["weight_rate"] != 0
    return values


def encode(quantized: Quantized, spec: QuantSpec) -> dict[str, Tensor]:
    """The tensors of the file format, by suffix: the strings of all sequences, column after column, and the scales."""
    (rows, columns), device = quantized.codes.shape, quantized.codes.device
    groups, length = trellis_groups(rows)
    real = (torch.arange(groups * length, device=device) < rows).view(groups, length)
    starts = _starts(quantized.scales, spec, columns, length, device)
    by_rate = list(_by_rate(quantized.scales, spec, columns, device))
    size, packed = columns * spec.rate * length // RATE_UNIT, []  # bits of a group; column rates have the mean `rate`
    for codes, exists in zip(_sequences(quantized.codes, groups, length), real, strict=True):
        stream = torch.zeros(size, dtype=torch.uint8, device=device)
        for rate, where in by_rate:
            walk = Walk(length, rate, spec.width)
            places = starts[where, None] + torch.arange(walk.bits, device=device)
            stream[places.flatten()] = _bits(codes[where], exists, walk).flatten()
        packed.append(_packed_bits(stream))
    return {"weight": torch.stack(packed), **quantized.scales}


def decode(tensors: dict[str, Tensor], spec: QuantSpec, columns: int) -> Float[Tensor, "out in"]:
    """The float32 matrix that the tensors of the file format stand for; raises as :func:`check_rates`."""
    check_rates(tensors, spec)
    return dequantize(Quantized(windows(tensors, spec, columns), tensors), spec)


def windows(tensors: dict[str, Tensor], spec: QuantSpec, columns: int) -> Int16[Tensor, "out in"]:
    """The windows of all weights, from their stored bits: the inverse of :func:`encode`."""
    rows, device = len(tensors["weight_scale"]), tensors["weight"].device
    groups, length = trellis_groups(rows)
    places = torch.arange(8, dtype=torch.uint8, device=device)
    stream = (tensors["weight"].view(torch.uint8)[..., None] >> places & 1).flatten(1)
    starts = _starts(tensors, spec, columns, length, device)
    found = torch.zeros(groups, columns, length, dtype=torch.int16, device=device)
    for rate, where in _by_rate(tensors, spec, columns, device):
        walk = Walk(length, rate, spec.width)
        places = torch.arange(walk.bits, device=device)
        for part in where.split(max(1, CHUNK // (groups * length))) if rate else ():
            bits = stream[:, (starts[part, None] + places)].to(torch.int16)
            ahead = torch.zeros_like(bits)
            for k in range(walk.window):  # the window that begins at each bit
                ahead |= bits.roll(-k, -1) << k
            found[:, part] = ahead[..., walk.offsets(device)]
    return found.transpose(1, 2).reshape(groups * length, columns)[:rows].contiguous()


def _bits(codes: Int[Tensor, "n length"], real: Bool[Tensor, " length"], walk: Walk) -> Tensor:
    """The strings ``(n, bits)`` of sequences: each bit from the last window that begins at or before it.

    Rows that do not exist have no say; a bit that no window holds is zero.
    """
    places, offsets = torch.arange(walk.bits, device=codes.device), walk.offsets(codes.device)[real]
    owner = torch.bucketize(places, offsets, right=True) - 1
    ahead = places - offsets[owner]
    bits = codes[:, owner].int() >> ahead.clamp(max=walk.window).int() & 1
    return torch.where(ahead < walk.window, bits, 0).to(torch.uint8)


def _packed_bits(stream: Tensor) -> Tensor:
    """Bits as bytes, low bits first; the last byte is filled with zeros."""
    padded = torch.nn.functional.pad(stream, (0, -len(stream) % 8)).unflatten(0, (-1, 8))
    places = torch.arange(8, dtype=torch.uint8, device=stream.device)
    return (padded << places).sum(-1, dtype=torch.uint8).view(torch.int8)


def _sequences(matrix: Tensor, groups: int, length: int) -> Tensor:
    """``(out, n)`` as ``(groups, n, length)``; rows that do not exist are zero."""
    padded = torch.nn.functional.pad(matrix, (0, 0, 0, groups * length - len(matrix)))
    return padded.view(groups, length, -1).transpose(1, 2)


def levels_of(codes: Tensor, scales: dict[str, Tensor], spec: QuantSpec) -> Float[Tensor, "out in"]:
    """Values of all weights at a scale of one."""
    ones = torch.ones(len(codes), 1, device=codes.device)
    return dequantize(Quantized(codes, {**scales, "weight_scale": ones}), spec)


def _by_rate(
    scales: dict[str, Tensor], spec: QuantSpec, columns: int, device: torch.device
) -> Iterator[tuple[int, Tensor]]:
    """Every rate, and the columns that have it."""
    if "weight_rate" not in scales:
        yield spec.rate, torch.arange(columns, device=device)
        return
    rates = scales["weight_rate"]
    for rate in rates.unique().tolist():
        yield rate, (rates == rate).nonzero()[:, 0]


def _starts(scales: dict[str, Tensor], spec: QuantSpec, columns: int, length: int, device: torch.device) -> Tensor:
    """The first bit of every column in the string of its group."""
    if "weight_rate" not in scales:
        return torch.arange(columns, device=device) * (spec.rate * length // RATE_UNIT)
    return first_bits(scales["weight_rate"], length)


def first_bits(rates: Integer[Tensor, " in"], length: int) -> Int[Tensor, " in"]:
    """The first bit of every column in the string of a group of ``length`` rows, by the rates of the columns."""
    wide = rates.long()
    return (wide.cumsum(0) - wide) * (length // RATE_UNIT)


def _unit(weight: Tensor) -> float:
    """A power of two near the largest magnitude: what is divided by it is exact, and its squares fit float32."""
    largest = weight.abs().max().item() if weight.numel() else 0.0
    return 2.0 ** min(max(math.frexp(largest)[1], -100), 100) if largest else 1.0
