"""Windows chosen for the output: with ``H = E[x xᵀ]`` of the inputs, the error that counts is ``Σ (t − q) H (t − q)ᵀ``.

The sequences of a trellis run down the columns. So both ways of :mod:`loftq.numerics.rounding` hold for it with a whole
column in the place of a single code, and Viterbi's search in the place of rounding to the nearest level.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from loftq.numerics.blockwise import Quantized, scale_and_zero, store_scales
from loftq.numerics.metric import Downdate
from loftq.numerics.rounding import alive, inverse_factor
from loftq.numerics.trellis import best_windows, dequantize, first_scales, levels_of
from loftq.spec import QuantSpec

# Of a matrix, its scales as stored, and windows that are kept where they are better: the best windows.
BestWindows = Callable[[Tensor, dict[str, Tensor], QuantSpec, Tensor | None], Tensor]
BLOCK = 128  # columns after which what is fed back reaches all others, by one product


def feedback(
    target: Float[Tensor, "out in"],
    columns: Float[Tensor, "in in"],
    spec: QuantSpec,
    *,
    fitted: bool = False,
    best_windows: BestWindows = best_windows,
) -> Quantized:
    """Quantize column after column; what each leaves is made up for, as well as can be, by those that follow.

    A row's scale is its root mean square; the rates of columns, where the spec has them, are those of
    :func:`loftq.numerics.trellis.column_rates` for ``1 / U_ii²`` of ``Uᵀ U = H⁻¹``: what of a column's error no other
    column can make up for.

    Args:
        target: float32.
        columns: H; damped as for codes in blocks.
        fitted: a scale of the least error for the windows that were found.
        best_windows: a back end's own.

    Raises: NumericalError as :func:`loftq.numerics.rounding.feedback`.
    """
    upper = inverse_factor(columns).float()
    scales = first_scales(target, spec, upper.diagonal().double() ** -2)
    values, codes = target.clone(), torch.empty_like(target, dtype=torch.int16)
    for first in range(0, target.shape[1], BLOCK):
        block = slice(first, min(first + BLOCK, target.shape[1]))
        left = torch.empty_like(values[:, block])
        for i in range(block.start, block.stop):
            own = _column(scales, i)
            codes[:, i] = best_windows(values[:, i : i + 1].contiguous(), own, spec, None)[:, 0]
            q = dequantize(Quantized(codes[:, i : i + 1], own), spec)
            fed = (values[:, i] - q[:, 0]) / upper[i, i]
            values[:, i + 1 : block.stop].addr_(fed, upper[i, i + 1 : block.stop], alpha=-1)
            left[:, i - first] = fed
        values[:, block.stop :].addmm_(left, upper[block, block.stop :], alpha=-1)
    found = Quantized(codes, scales)
    if not fitted:
        return found
    h = alive(columns)
    return Quantized(codes, _moved(found, (target - dequantize(found, spec)) @ h, h, spec)[0])


def descend(
    target: Float[Tensor, "out in"],
    quantized: Quantized,
    columns: Float[Tensor, "in in"] | Downdate,
    spec: QuantSpec,
    *,
    fitted: bool = False,
    residual: Float[Tensor, "out in"] | None = None,
    best_windows: BestWindows = best_windows,
) -> Quantized:
    """One round of descent: the scale of every row, then the windows of every column, the best with all others fixed.

    With ``P = (T − Q) H``, the error that is left of column i is ``H_ii ‖q_i + P_i / H_ii − q‖²``: its best windows are
    those nearest to ``q_i + P_i / H_ii``, and no others are taken if they are worse than its own. So no step raises the
    error.

    Args:
        target: float32.
        columns: H, not damped. A column without energy keeps its windows.
        fitted: move the scales too.
        residual: ``T − Q``, where it is known; it becomes that of the result.
        best_windows: a back end's own.
    """
    h = alive(columns if isinstance(columns, Tensor) else columns.dense())
    pull = (target - dequantize(quantized, spec) if residual is None else residual) @ h
    scales = quantized.scales
    if fitted:
        scales, pull = _moved(quantized, pull, h, spec)
    codes, q = quantized.codes.clone(), dequantize(Quantized(quantized.codes, scales), spec)
    energies = h.diagonal().tolist()  # one look at a device, not one for each column
    for first in range(0, target.shape[1], BLOCK):
        block = slice(first, min(first + BLOCK, target.shape[1]))
        near, moved = pull[:, block].contiguous(), torch.zeros_like(pull[:, block])
        for i in range(block.start, block.stop):
            if energies[i] <= 0:
                continue
            own, j = _column(scales, i), i - first
            wanted = q[:, i : i + 1] + near[:, j : j + 1] / h[i, i]
            codes[:, i : i + 1] = best_windows(wanted, own, spec, codes[:, i : i + 1].contiguous())
            moved[:, j] = dequantize(Quantized(codes[:, i : i + 1], own), spec)[:, 0] - q[:, i]
            near.addr_(moved[:, j], h[i, block], alpha=-1)
        pull.addmm_(moved, h[block], alpha=-1)
    found = Quantized(codes, scales)
    if residual is not None:
        torch.sub(target, dequantize(found, spec), out=residual)
    return found


def _moved(quantized: Quantized, pull: Tensor, h: Tensor, spec: QuantSpec) -> tuple[dict[str, Tensor], Tensor]:
    """Scales of the least error for the windows as they are, in the rows where their stored form is better; the pull.

    A step of a row's scale lowers the error by ``2 step ⟨level, pull⟩ − step² ⟨level, level H⟩``.
    """
    scale, level = scale_and_zero(quantized.scales)[0], levels_of(quantized.codes, quantized.scales, spec)
    bent = level @ h
    slope = (level * pull).sum(1, keepdim=True, dtype=torch.float64)
    curvature = (level * bent).sum(1, keepdim=True, dtype=torch.float64)
    wanted = scale + (slope / torch.where(curvature > 0, curvature, torch.inf)).float()
    stored = store_scales(wanted, spec)["weight_scale"]
    step = stored.float() - scale
    better = 2 * step * slope - step.double().square() * curvature > 0
    scales = {**quantized.scales, "weight_scale": torch.where(better, stored, quantized.scales["weight_scale"])}
    return scales, pull - torch.where(better, step, 0) * bent


def _column(scales: dict[str, Tensor], i: int) -> dict[str, Tensor]:
    """The scales as those of column ``i`` alone."""
    return {**scales, "weight_rate": scales["weight_rate"][i : i + 1]} if "weight_rate" in scales else scales
