"""Codes chosen for the output: with ``H = E[x xᵀ]`` of the inputs, the error that counts is ``Σ (t − q) H (t − q)ᵀ``.

Two ways to lower it, over the rows t of a matrix and their quantized values q:

* :func:`feedback`, GPTQ (arXiv 2210.17323): columns are rounded one after another, and what each leaves is made up for,
  as well as can be, by those that are still to be rounded.
* :func:`descend`, coordinate descent: scale by scale and code by code, the best value with all others fixed. No step
  raises the error.

Both go block by block. Within one, rows are worked on by a back end's own function, else by the plain ones here;
between blocks there are only products of matrices, a panel of columns at a time. Rows do not depend on one another, and
are worked on in chunks (:mod:`loftq.numerics.chunks`).
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from loftq.codes import levels
from loftq.errors import NumericalError
from loftq.numerics.blockwise import Quantized, dequantize, fit_scales, scale_and_zero, store_scales
from loftq.numerics.chunks import over_chunks
from loftq.numerics.codebooks import dynamic_8bit, halfway, midpoints
from loftq.numerics.fitting import fitted_scales
from loftq.numerics.metric import Downdate, cholesky
from loftq.spec import NESTED_BLOCK, QuantSpec

DAMPING = 0.01  # of the mean of H's diagonal, added to it before it is inverted, as GPTQ does
DEAD = 1e-8  # of that mean: a column of less energy keeps its codes
PANEL = 512  # columns, about, that one product makes up to date
WIDEST = 128  # of a block, where one scale serves whole rows

Scales: TypeAlias = dict[str, Tensor]
# Rows of a block, what they are rounded with, and what comes out of it: see the two plain functions below.
RoundBlock: TypeAlias = Callable[[Tensor, Tensor, Tensor, Tensor, QuantSpec], tuple[Tensor, Tensor]]
DescendBlock: TypeAlias = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, QuantSpec], tuple[Tensor, Tensor]]


def round_block(
    values: Float[Tensor, "out block"],
    upper: Float[Tensor, "block block"],
    scale: Tensor,
    zero: Tensor,
    spec: QuantSpec,
) -> tuple[Tensor, Float[Tensor, "out block"]]:
    """Codes of a block with feedback inside it, and the scaled errors ``d`` that are fed back.

    Args:
        values: what is rounded; changed by the feedback.
        upper: the block's part of the upper Cholesky factor of ``H⁻¹``.
        scale, zero: of every row.
    """
    table, gaps = (each(spec.code, spec.width).to(values.device) for each in (levels, midpoints))
    safe = torch.where(scale == 0, 1, scale)
    codes, fed = torch.empty_like(values, dtype=torch.uint8), torch.empty_like(values)
    for i in range(values.shape[1]):
        code = torch.bucketize(values[:, i] / safe + zero, gaps)
        codes[:, i] = code
        fed[:, i] = (values[:, i] - (table[code] - zero) * scale) / upper[i, i]
        values[:, i + 1 :] -= fed[:, i, None] * upper[i, i + 1 :]
    return codes, fed


def descend_block(
    pull: Float[Tensor, "out block"],
    codes: Tensor,
    own: Float[Tensor, "block block"],
    scale: Tensor,
    zero: Tensor,
    spec: QuantSpec,
) -> tuple[Tensor, Float[Tensor, "out block"]]:
    """Codes of a block after one round of descent, and how far the values moved.

    Args:
        pull: ``(T − Q) H`` in the block's columns; changed as Q moves, in the columns that are still to come.
        own: the block's part of H. A column whose diagonal is zero keeps its codes.
    """
    table, gaps = (each(spec.code, spec.width).to(pull.device) for each in (levels, midpoints))
    safe = torch.where(scale == 0, 1, scale)
    codes, moved = codes.clone(), torch.zeros_like(pull)
    for i, energy in enumerate(own.diagonal().tolist()):  # one look at a device, not one for each column
        if energy <= 0:
            continue
        value = (table[codes[:, i].int()] - zero) * scale
        code = torch.bucketize((value + pull[:, i] / own[i, i]) / safe + zero, gaps)
        codes[:, i] = code
        moved[:, i] = (table[code] - zero) * scale - value
        pull[:, i + 1 :] -= moved[:, i, None] * own[i, i + 1 :]
    return codes, moved


def feedback(
    target: Float[Tensor, "out in"],
    columns: Float[Tensor, "in in"],
    spec: QuantSpec,
    *,
    fitted: bool = False,
    fit: Callable[[Tensor, QuantSpec], Scales] = fitted_scales,
    round_block: RoundBlock = round_block,
) -> Quantized:
    """Quantize with error feedback. A block's scales are chosen when its turn comes, for the values it then has.

    Under double quantization, which couples the scales, those are found by a first pass, stored, and used by a second.

    Args:
        target: float32.
        columns: H; damped by :data:`DAMPING`.
        fitted: scales of the least squared error, by ``fit``, instead of those of the code's formula.
        fit, round_block: a back end's own.

    Raises: NumericalError for an H that is not positive but for rounding, and as :func:`loftq.numerics.quantize`.
    """
    choose = fit if fitted else fit_scales
    upper = inverse_factor(columns).float()
    if spec.codebook.per_tensor:
        return _one_pass(target, upper, spec, fit_scales(target, spec), choose, round_block)
    if spec.double_quant:
        single = replace(spec, double_quant=False, scale_dtype="float32")
        found = _one_pass(target, upper, single, None, choose, round_block).scales
        stored = {**found, **store_scales(found["weight_scale"], spec)}
        return _one_pass(target, upper, spec, stored, choose, round_block)
    return _one_pass(target, upper, spec, None, choose, round_block)


def descend(
    target: Float[Tensor, "out in"],
    quantized: Quantized,
    columns: Float[Tensor, "in in"] | Downdate,
    spec: QuantSpec,
    *,
    fitted: bool = False,
    residual: Float[Tensor, "out in"] | None = None,
    descend_block: DescendBlock = descend_block,
) -> Quantized:
    """One round of descent over all blocks, from a quantized matrix to one with no more error.

    Args:
        columns: H, not damped.
        fitted: move the scales too, within what their stored form can hold.
        residual: ``T − Q``, where it is known; it becomes that of the result.
        descend_block: a back end's own.
    """
    h, table = _alive(columns), levels(spec.code, spec.width).to(target.device)
    scale, zero = _each_row(quantized.scales, len(target))
    codes, grid = quantized.codes.clone(), _Grid(quantized.scales, spec)
    residual = target - dequantize(quantized, spec) if residual is None else residual

    def descend_rows(rows: slice) -> None:
        pull = _pull_of(residual[rows], h, spec)
        for index, block in _blocks(target.shape[1], spec):
            own, held = pull.own(block), pull.at(block)
            s, z, c = (part.contiguous() for part in (scale[rows, index], zero[rows, index], codes[rows, block]))
            moved = torch.zeros_like(held)
            if fitted and not spec.codebook.per_tensor:
                level = table[c.int()] - z[:, None]
                step = grid.step(rows, index, s, (level * held).sum(1), ((level @ own) * level).sum(1))
                moved = step[:, None] * level
                held -= moved @ own
                s = grid.put(rows, index, s + step)
            codes[rows, block], further = descend_block(held, c, own, s, z, spec)
            pull.move(block, moved + further)

    over_chunks(descend_rows, target)
    return Quantized(codes, grid.scales)


class _Panels:
    """A product of some rows with a square matrix, block after block, as the rows change.

    ``product`` makes a panel of columns; what changes within the panel is taken off its later columns.
    """

    def __init__(self, matrix: Tensor, spec: QuantSpec, product: Callable[[slice], Tensor]) -> None:
        step = _size(spec)
        self._matrix, self._width, self._product = matrix, step * max(1, PANEL // step), product
        self._first, self._panel = 0, matrix[:, :0]

    def own(self, block: slice) -> Tensor:
        """The block's part of the matrix."""
        return self._matrix[block, block].contiguous()

    def at(self, block: slice) -> Tensor:
        """The block's columns; a copy."""
        if block.start >= self._first + self._panel.shape[1]:
            self._first = block.start
            self._panel = self._product(slice(block.start, block.start + self._width))
        return self._panel[:, block.start - self._first : block.stop - self._first].clone()

    def move(self, block: slice, moved: Tensor) -> None:
        """Subtract a change of the block from the rows."""
        rest = self._panel[:, block.stop - self._first :]
        rest.addmm_(moved, self._matrix[block, block.stop : block.stop + rest.shape[1]], alpha=-1)


class _Pull(_Panels):
    """``(T − Q) H`` of some rows, as Q moves."""

    def __init__(self, error: Tensor, h: Tensor, spec: QuantSpec) -> None:
        super().__init__(h, spec, lambda panel: error @ h[:, panel])
        self._error = error

    def move(self, block: slice, moved: Tensor) -> None:
        self._error[:, block] -= moved
        super().move(block, moved)


class _DowndatePull:
    """The same for ``H = D − L Rᵀ``, of which no matrix ``(in, in)`` is made: ``(T − Q) L`` is kept up to date."""

    def __init__(self, error: Tensor, h: tuple[Tensor, Tensor, Tensor]) -> None:
        self._error, (self._diagonal, self._left, self._right) = error, h
        self._seen = error @ self._left

    def own(self, block: slice) -> Tensor:
        return torch.diag(self._diagonal[block]).addmm_(self._left[block], self._right[block].T, alpha=-1)

    def at(self, block: slice) -> Tensor:
        return (self._error[:, block] * self._diagonal[block]).addmm_(self._seen, self._right[block].T, alpha=-1)

    def move(self, block: slice, moved: Tensor) -> None:
        self._error[:, block] -= moved
        self._seen.addmm_(moved, self._left[block], alpha=-1)


def _pull_of(error: Tensor, h: Tensor | tuple[Tensor, Tensor, Tensor], spec: QuantSpec) -> _Pull | _DowndatePull:
    return _Pull(error, h, spec) if isinstance(h, Tensor) else _DowndatePull(error, h)


def alive(columns: Float[Tensor, "in in"]) -> Float[Tensor, "in in"]:
    """H in float32, without the columns of next to no energy: no pull on them, and no move of them."""
    h = columns.float()
    return torch.where(h.diagonal() > DEAD * h.diagonal().mean(), h, 0)


def _alive(columns: Tensor | Downdate) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """:func:`alive`, or D, L and R of a :class:`_DowndatePull`."""
    if isinstance(columns, Tensor):
        return alive(columns)
    whole, left = columns.diagonal, columns.part.float()
    own = whole - columns.part.square().sum(1)
    kept = own > DEAD * own.mean()
    return torch.where(kept, whole, 0).float(), left, torch.where(kept[:, None], left, 0)


class _Grid:
    """Scales in their stored form, changed block by block to other values that this form can hold."""

    def __init__(self, scales: Scales, spec: QuantSpec) -> None:
        self.scales = {name: tensor.clone() for name, tensor in scales.items()}
        self._nested = spec.double_quant
        if self._nested:
            rows, blocks = scales["weight_scale"].shape
            self._places = torch.arange(rows * blocks, device=scales["weight_scale"].device).view(rows, blocks)

    def step(self, rows: slice, index: int, scale: Tensor, slope: Tensor, curvature: Tensor) -> Tensor:
        """How far to move a block's scales: to the stored value nearest to the minimum, if that is any better.

        The error falls by ``2 step slope − step² curvature``.
        """
        wanted = scale + slope / torch.where(curvature > 0, curvature, torch.inf)
        step = self._nearest(rows, index, wanted)[0] - scale
        return torch.where(2 * step * slope - step.square() * curvature > 0, step, 0)

    def put(self, rows: slice, index: int, scale: Tensor) -> Tensor:
        """Store a block's scales; what a reader gets."""
        value, stored = self._nearest(rows, index, scale)
        self.scales["weight_scale"][rows, index] = stored
        return value

    def _nearest(self, rows: slice, index: int, scale: Tensor) -> tuple[Tensor, Tensor]:
        """The nearest value that can be stored, and its stored form."""
        if not self._nested:
            stored = scale.to(self.scales["weight_scale"].dtype)
            return stored.float(), stored
        absmax = self.scales["weight_scale_absmax"][self._places[rows, index] // NESTED_BLOCK]
        mean, book = self.scales["weight_scale_mean"], dynamic_8bit().to(scale.device)
        code = torch.bucketize((scale - mean) / torch.where(absmax == 0, 1, absmax), halfway(book))
        return book[code] * absmax + mean, code.to(torch.uint8)


def _one_pass(
    target: Tensor,
    upper: Tensor,
    spec: QuantSpec,
    scales: Scales | None,
    choose: Callable[[Tensor, QuantSpec], Scales],
    round_block: RoundBlock,
) -> Quantized:
    """Round block by block, with the given scales, or with scales chosen on the way."""
    codes, fed = torch.empty_like(target, dtype=torch.uint8), torch.empty_like(target)
    given = None if scales is None else _each_row(scales, len(target))
    chosen: dict[tuple[int, int], Scales] = {}  # by the first row, and the block

    def round_rows(rows: slice) -> None:
        t, d = target[rows], fed[rows]
        values = _Panels(upper, spec, lambda p: torch.addmm(t[:, p], d[:, : p.start], upper[: p.start, p], alpha=-1))
        for index, block in _blocks(target.shape[1], spec):
            part = values.at(block)
            if given is None:
                chosen[rows.start, index] = choose(part, spec)
                s, z = (each[:, 0] for each in _each_row(chosen[rows.start, index], len(part)))
            else:
                s, z = (each[rows, index].contiguous() for each in given)
            codes[rows, block], left = round_block(part, values.own(block), s, z, spec)
            values.move(block, left)
            d[:, block] = left

    over_chunks(round_rows, target)
    return Quantized(codes, scales or _joined(chosen))


def _joined(chosen: dict[tuple[int, int], Scales]) -> Scales:
    """The scales of all rows and blocks."""
    starts, indices = (sorted({key[i] for key in chosen}) for i in (0, 1))
    names = next(iter(chosen.values()))
    return {n: torch.cat([torch.cat([chosen[r, i][n] for i in indices], 1) for r in starts]) for n in names}


def _each_row(scales: Scales, rows: int) -> tuple[Tensor, Tensor]:
    """Scales and zero points as float32 ``(out, blocks)``, one of the whole matrix for every row."""
    scale, zero = scale_and_zero(scales)
    scale = scale.expand(rows, -1).clone()
    return scale, torch.zeros_like(scale) if zero is None else zero.expand(rows, -1).clone()


def _blocks(columns: int, spec: QuantSpec) -> Iterator[tuple[int, slice]]:
    """Blocks, with the place of their scale."""
    size = _size(spec)
    for index, first in enumerate(range(0, columns, size)):
        yield 0 if spec.codebook.per_tensor else index, slice(first, min(first + size, columns))


def _size(spec: QuantSpec) -> int:
    """Columns of a block; any number where one scale serves them all."""
    return WIDEST if spec.codebook.per_tensor else spec.block_size


def inverse_factor(columns: Tensor) -> Tensor:
    """U, upper triangular, with ``Uᵀ U = (H + damping)⁻¹``, in float64."""
    h = columns.to(torch.float64, copy=True)
    mean = h.diagonal().mean().item()
    if mean == 0:
        return torch.eye(len(h), dtype=h.dtype, device=h.device)
    h.diagonal().add_(DAMPING * mean)
    upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(cholesky(h)), upper=True)
    if failed or not upper.isfinite().all():
        raise NumericalError("the second moments of the inputs cannot be inverted, even damped")
    return upper
