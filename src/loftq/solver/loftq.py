"""LoftQ, Algorithm 1 of arXiv 2310.08659, and its baselines, as one alternation.

    for t = 1 .. T:
        Q_t      = quantize(W - B_{t-1} A_{t-1})          B_0 A_0 = 0
        B_t, A_t = best rank-r factors of W - Q_t

T = 0 is QLoRA's initialization, T = 1 is one SVD of the quantization error. The paper returns step T. With absmax
scales the error is not monotone in t at 2 bits, so the step with the smallest error is returned instead, with the
errors of all steps.

With fitted scales the error is monotone: the scales of Q_{t-1} are among the candidates for Q_t, so neither half of a
step raises the error.

Later methods are the same alternation, in another metric (:class:`loftq.numerics.Metric`) and with another rounding
(:class:`loftq.solver.rounding.Rounding`).
"""

import functools
import hashlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from loftq.errors import NumericalError, UsageError, checks_names, option
from loftq.numerics import (
    Metric,
    Moments,
    Quantized,
    best_factors,
    dequantize,
    frobenius,
    product_square,
    truncated_svd,
)
from loftq.options import check_whole
from loftq.solver.rounding import Rounding
from loftq.spec import QuantSpec, SolveSpec, check_solver, why_not
from loftq.spelled import spell_error

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True, repr=False)
class Solution:
    """A quantized matrix Q and low-rank factors, without LoRA's scaling: ``W ≈ Q + B A``.

    :meth:`reconstruct` gives the sum of :meth:`dequantize` and :meth:`product`.

    Attributes:
        quantized: codes and scales of Q, as they are stored.
        quant: how Q is stored: bits, code, block size, dtype of the scales.
        b, a: the factors, ``(out, rank)`` and ``(rank, in)``.
        errors: ``||W - Q_t - B_t A_t||_F / ||W||_F`` for every step t; ``errors[0]`` is quantization alone, with the
            scales and the rounding of the preset.
        kept: the step that is returned: the one with the smallest error, or with moments, with the smallest output
            error. Without moments it is 0 only if ``steps`` is 0.
        output_errors: relative errors of the outputs, on the held-out tokens; empty without moments.
        output_norm: the weight's norm in that metric, to which ``output_errors`` are relative.
    """

    quantized: Quantized
    quant: QuantSpec
    b: Float[Tensor, "out rank"]
    a: Float[Tensor, "rank in"]
    errors: tuple[float, ...]
    kept: int
    output_errors: tuple[float, ...] = ()
    output_norm: float = 0.0

    @property
    def error(self) -> float:
        """``||W - Q - B A||_F / ||W||_F`` of the returned step: ``errors[kept]``."""
        return self.errors[self.kept]

    @property
    def output_error(self) -> float | None:
        """The relative error of the outputs, ``output_errors[kept]``; None without moments."""
        return self.output_errors[self.kept] if self.output_errors else None

    def dequantize(self) -> Float[Tensor, "out in"]:
        """Q in float32."""
        return dequantize(self.quantized, self.quant)

    def product(self) -> Float[Tensor, "out in"]:
        """``B @ A``, which the adapter adds to Q: ``s`` times the product of :meth:`factors`."""
        return self.b @ self.a

    def reconstruct(self) -> Float[Tensor, "out in"]:
        """``Q + B @ A`` in float32, the approximation of W."""
        return torch.addmm(self.dequantize(), self.b, self.a)

    def __repr__(self) -> str:
        rows, columns = self.quantized.codes.shape
        errors = f"error {spell_error(self.error)} (quantized alone {spell_error(self.errors[0])})"
        if self.output_errors:
            alone, left = (spell_error(self.output_errors[i]) for i in (0, self.kept))
            errors += f", of outputs {left} ({alone})"
        stored = f"{rows}x{columns}, {self.quant.bits} bits {self.quant.code}, rank {len(self.a)}"
        return f"Solution({stored}, {errors}, step {self.kept} of {len(self.errors) - 1})"

    def factors(self, s: float) -> tuple[Float[Tensor, "out rank"], Float[Tensor, "rank in"]]:
        """``B / sqrt(s)`` and ``A / sqrt(s)``: the factors of a LoRA layer, whose forward multiplies by ``s``.

        With a zero initialization (``B = 0``) A is not rescaled, and keeps LoRA's distribution.
        """
        root = math.sqrt(s) if self.kept else 1.0
        return self.b / root, self.a / root


@checks_names
def solve(
    weight: Float[Tensor, "out in"],
    quant: QuantSpec,
    rank: int,
    spec: SolveSpec | None = None,
    name: str = "",
    moments: Moments | None = None,
) -> Solution:
    """Find the quantized matrix and the low-rank factors of one weight.

    Args:
        weight: the pretrained matrix, ``(out_features, in_features)``, any float dtype; solved in float32.
        quant: how the quantized matrix is stored.
        rank: at most ``min(out, in)``.
        spec: steps, order, SVD, scales, metric, rounding; the defaults are the paper's T = 5, quantization first,
            scales by formula.
        name: is mixed into the seed, so that the result does not depend on the order of work.
        moments: of the matrix's inputs. The held-out ones decide which step is best. Without moments the error of the
            weights is minimized, whatever ``spec`` says.

    Raises: UsageError for a rank or scales that do not fit; NumericalError for values that are not finite.
    """
    spec = spec or SolveSpec()
    check_solver(quant, spec)
    weight = checked(weight, rank)
    if why := why_not(quant, "linear", len(weight)):
        raise UsageError(why)
    generator = torch.Generator("cpu").manual_seed(tensor_seed(spec.seed, name))
    metric = fitting(choose_metric(spec.metric, moments), weight)
    measure = _Measure(weight, fitting(moments.held, weight) if moments else None)
    rounding = Rounding(weight, quant, spec, metric)
    quantized, residual = rounding.first(weight)
    measure.step(residual, None)
    best: tuple[Quantized, Tensor | None, Tensor | None] = (quantized, None, None)
    if spec.steps and residual.any():  # of nothing, both factors would be zero, and never train
        fit = functools.partial(best_factors, rank=rank, metric=metric, method=spec.svd, generator=generator)
        if spec.start == "preserved":
            b, a = preserved(weight, rank, metric, spec.svd, generator)
            quantized, residual = rounding.next(quantized, b, a, residual) if len(a) else (quantized, residual)
        if spec.order == "quantize-first":
            steps = _quantize_first(rounding, fit, quantized, residual, spec.steps)
        else:
            steps = _svd_first(rounding, fit, quantized, residual, spec.steps, weight)
        for candidate, residual, projected in steps:
            if measure.step(residual, candidate[1:], projected):
                best = candidate
    quantized, b, a = best
    if b is None or a is None:
        b, a = zero_start(weight, rank, generator)
    return Solution(
        quantized, quant, b, a, tuple(measure.errors), measure.kept, tuple(measure.output_errors), measure.output_norm
    )


def fitting(metric: Metric, weight: Tensor) -> Metric:
    """A metric on the weight's device; UsageError if its shape does not fit."""
    if not metric.fits(weight.shape):
        raise UsageError(f"the statistics do not fit a matrix of shape {tuple(weight.shape)}; calibrate on this model")
    return metric.to(weight.device)


class _Measure:
    """The errors of every step, and the step that is best: by the outputs where these can be measured."""

    def __init__(self, weight: Tensor, held: Metric | None) -> None:
        self.errors: list[float] = []
        self.output_errors: list[float] = []
        self.kept = 0
        self._norm = frobenius(weight)
        self._held = held
        self.output_norm = self._held.norm(weight) if self._held else 0.0

    def step(self, residual: Tensor, factors: tuple[Tensor, Tensor] | None, projected: bool = False) -> bool:
        """Measure a step; whether it is the best one yet. Without outputs, step 0 does not compete.

        Args:
            residual: ``W - Q``.
            projected: in the metric of the weights, ``B A`` is a projection of it.
        """
        if self._held is None and factors is not None and projected:
            distance = _left(residual, *factors)
        else:
            rest = residual if factors is None else _less(residual, *factors)
            distance = frobenius(rest)
            if self._held is not None:
                self.output_errors.append(_ratio(self._held.norm(rest), self.output_norm))
        self.errors.append(_ratio(distance, self._norm))
        trace, t = self.output_errors or self.errors, len(self.errors) - 1
        if not math.isfinite(trace[t]) or not math.isfinite(self.errors[t]):
            raise NumericalError(
                f"the errors of the steps are not finite: {trace}; the weights' range is too wide for float32"
            )
        better = trace[t] < trace[self.kept] or (t == 1 and self._held is None)
        self.kept = t if better else self.kept
        return better


Step = tuple[tuple[Quantized, Tensor, Tensor], Tensor, bool]  # (Q, B, A), W - Q, whether the SVD was of that
Fit = Callable[..., tuple[Tensor, Tensor]]  # the best B and A for an error; ``start``: an earlier A


def _quantize_first(rounding: Rounding, fit: Fit, quantized: Quantized, residual: Tensor, count: int) -> Iterator[Step]:
    a = None
    for t in range(1, count + 1):
        b, a = fit(residual, start=a)
        yield (quantized, b, a), residual, True
        if t < count:  # in the same memory at every step: fresh memory costs more than quantizing into it
            quantized, residual = rounding.next(quantized, b, a, residual)


def _svd_first(
    rounding: Rounding, fit: Fit, quantized: Quantized, memory: Tensor, count: int, weight: Tensor
) -> Iterator[Step]:
    """``memory`` takes the residual of every step; the first factors are those of the weight itself."""
    a, residual = None, weight
    for _ in range(count):
        b, a = fit(residual, start=a)
        quantized, residual = rounding.next(quantized, b, a, memory)
        yield (quantized, b, a), residual, False


def choose_metric(kind: str, moments: Moments | None) -> Metric:
    """The metric that a spec names, from the moments of a matrix; full moments also give the diagonal."""
    if kind == "weights" or moments is None:
        return Metric()
    fit = moments.fit
    if kind == "diagonal" and fit.columns is not None and fit.columns.ndim == 2:
        return Metric(fit.columns.diagonal().contiguous())
    return fit if kind == "fisher" else Metric(fit.columns)


def preserved(
    weight: Tensor, rank: int, metric: Metric, svd: str, generator: torch.Generator
) -> tuple[Float[Tensor, "out k"], Float[Tensor, "k in"]]:
    """SRR's initialization: the k best directions of W, k chosen so that the r - k left are best spent on the error.

    ``k = argmin_k rho_k(W) rho_{r-k}(E)`` in the metric (arXiv 2602.02001, section 4): rho_p is the share of the energy
    that is left after rank p, and the uniform noise E stands for the quantization error.
    """
    noise = torch.rand(weight.shape, generator=generator, device="cpu").to(weight.device) * 2 - 1
    left = []
    for matrix in (weight, noise):
        whitened = metric.whiten(matrix)
        b, _ = truncated_svd(whitened, rank, method=svd, generator=generator)
        squares = torch.linalg.vector_norm(b, dim=0).cpu().double() ** 4  # b carries the roots of the singular values
        energy = frobenius(whitened) ** 2 or 1.0
        left.append(1 - torch.cat([squares.new_zeros(1), squares.cumsum(0)]) / energy)
    k = int((left[0] * left[1].flip(0)).argmin())
    if not k:
        return weight.new_zeros(len(weight), 0), weight.new_zeros(0, weight.shape[1])
    return best_factors(weight, k, metric, method=svd, generator=generator)


def checked(weight: Any, rank: Any) -> Tensor:
    """A matrix in float32, without its graph.

    Raises: UsageError for what is no matrix of real numbers in memory, or a rank that does not fit it; NumericalError
        for values that are not finite.
    """
    wanted = "wanted a matrix (out, in) of floating-point numbers"
    if not isinstance(weight, Tensor):
        raise UsageError(f"{wanted}, got {type(weight).__name__}")
    if weight.layout != torch.strided or weight.is_nested:
        got = "nested" if weight.is_nested else str(weight.layout).removeprefix("torch.")
        raise UsageError(f"{wanted} in dense form, got a {got} tensor; call to_dense() on it")
    if weight.dtype not in FLOATS:
        raise UsageError(f"{wanted}, got {str(weight.dtype).removeprefix('torch.')}; start from full-precision weights")
    if weight.ndim != 2 or not weight.numel():
        cure = "; a convolution's is made one by weight.flatten(1)" if weight.ndim > 2 else ""
        raise UsageError(f"{wanted}, got shape {tuple(weight.shape)}{cure}")
    if weight.is_meta:
        raise UsageError(f"{wanted} in memory, got one on the meta device, which has no values")
    check_whole("rank", rank, 1)
    if rank > min(weight.shape):
        raise UsageError(
            f"rank {rank} does not fit a matrix of shape {tuple(weight.shape)}; "
            f"give {option('rank', min(weight.shape))} or less"
        )
    weight = weight.detach().float()
    check_finite(weight)
    return weight


def check_finite(tensor: Tensor) -> None:
    """NumericalError, with count and first place, for NaN or infinity."""
    if tensor.ndim > 1 and math.isfinite(frobenius(tensor.flatten(1))):
        return  # an infinity or NaN anywhere would show in the norm; reading it once is quick
    finite = tensor.isfinite()
    if not finite.all():
        bad = (~finite).nonzero()
        raise NumericalError(
            f"{len(bad)} of {tensor.numel()} values are NaN or infinite, the first at {bad[0].tolist()}; "
            "repair the weights"
        )


def tensor_seed(seed: int, name: str) -> int:
    """A seed of 63 bits from the run's seed and the tensor's name."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8], "little") >> 1


def zero_start(weight: Tensor, rank: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """LoRA's own initialization: B = 0 and A uniform within 1/sqrt(in), as PEFT draws it."""
    rows, columns = weight.shape
    a = torch.empty(rank, columns, device="cpu", dtype=torch.float32).uniform_(-1, 1, generator=generator)
    return weight.new_zeros(rows, rank), (a / math.sqrt(columns)).to(weight.device)


def _less(matrix: Tensor, b: Tensor, a: Tensor, out: Tensor | None = None) -> Tensor:
    """``matrix - b @ a`` in one pass."""
    return torch.addmm(matrix, b, a, alpha=-1, out=out)


def _left(residual: Tensor, b: Tensor, a: Tensor) -> float:
    """``||residual - B A||``, by Pythagoras where that is exact enough: ``B A`` is a projection of the residual.

    It is not where little is left, nor where the residual's values are near the end of float32.
    """
    norm = frobenius(residual)
    square = norm**2 - product_square(b, a)
    exact = square > 0.01 * norm**2 and norm > 1e-30
    return math.sqrt(square) if exact else frobenius(_less(residual, b, a))


def _ratio(distance: float, norm: float) -> float:
    return distance / norm if norm else 0.0
