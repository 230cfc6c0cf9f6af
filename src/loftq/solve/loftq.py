"""LoftQ, Algorithm 1 of arXiv 2310.08659, and its baselines, as one alternation.

    for t = 1 .. T:
        Q_t      = quantize(W - B_{t-1} A_{t-1})          B_0 A_0 = 0
        B_t, A_t = best rank-r factors of W - Q_t

T = 0 is QLoRA's start, T = 1 one SVD of the quantization error. The paper returns step T; with absmax scales the error
is not monotone in t at 2 bits, so the step with the smallest error is returned instead, with the whole trace.

With fitted scales it is monotone: the scales of Q_{t-1} are among those that Q_t chooses from, so that neither half of
a step leaves more of W than the other half did.
"""

import functools
import hashlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from loftq.errors import NumericalError, UsageError
from loftq.kernels import backend
from loftq.numerics import Quantized, frobenius, product_square, truncated_svd
from loftq.spec import QuantSpec, SolveSpec, check_scales


@dataclass(frozen=True)
class Solution:
    """A quantized backbone and scale-free factors: ``W ≈ dequantize(quantized) + B @ A``.

    Attributes:
        errors: ``||W - Q_t - B_t A_t||_F / ||W||_F``; ``errors[0]`` is quantization alone (QLoRA).
        kept: the step that is returned; 0 only when ``steps`` is 0.
    """

    quantized: Quantized
    b: Float[Tensor, "out rank"]
    a: Float[Tensor, "rank in"]
    errors: tuple[float, ...]
    kept: int

    def factors(self, s: float) -> tuple[Float[Tensor, "out rank"], Float[Tensor, "rank in"]]:
        """``B / sqrt(s)``, ``A / sqrt(s)``: what an adapter stores whose forward multiplies by ``s``.

        A zero start has nothing to rescale, and keeps LoRA's distribution of A.
        """
        root = math.sqrt(s) if self.kept else 1.0
        return self.b / root, self.a / root


def solve(
    weight: Float[Tensor, "out in"],
    quant: QuantSpec,
    rank: int,
    spec: SolveSpec | None = None,
    name: str = "",
) -> Solution:
    """Quantized backbone and low-rank factors of one matrix.

    Args:
        weight: the pretrained matrix, ``(out_features, in_features)``, any float dtype; solved in float32.
        quant: how the backbone is stored.
        rank: at most ``min(out, in)``.
        spec: steps, order, SVD, scales; the defaults are the paper's T = 5, quantization first, scales by formula.
        name: goes into the seed, so that a matrix has the same result in any order of work.

    Raises: UsageError for a rank or scales that do not fit; NumericalError for values that are not finite.
    """
    spec = spec or SolveSpec()
    check_scales(quant, spec.scales)
    weight = weight.detach().float()
    check_matrix(weight, rank)
    norm = frobenius(weight)
    generator = torch.Generator("cpu").manual_seed(tensor_seed(spec.seed, name))
    quantize = functools.partial(
        backend(weight.device).quantize_residual, weight=weight, spec=quant, fitted=spec.scales == "fitted"
    )
    quantized, residual = quantize(weight)
    errors = [_ratio(frobenius(residual), norm)]
    if spec.steps == 0:
        b, a = _zero_start(weight, rank, generator)
        return Solution(quantized, b, a, (errors[0],), 0)

    alternate = _quantize_first if spec.order == "quantize-first" else _svd_first
    best: tuple[float, int, tuple[Quantized, Tensor, Tensor]] | None = None
    steps = alternate(quantize, weight, quantized, residual, rank, spec, generator)
    for t, (candidate, distance) in enumerate(steps, start=1):
        errors.append(_ratio(distance, norm))
        if best is None or errors[t] < best[0]:
            best = (errors[t], t, candidate)
    assert best is not None
    _, kept, (quantized, b, a) = best
    if not all(map(math.isfinite, errors)):
        raise NumericalError(f"the error trace is not finite: {errors}; the weights' range is too wide for float32")
    return Solution(quantized, b, a, tuple(errors), kept)


Step = tuple[tuple[Quantized, Tensor, Tensor], float]  # (Q, B, A) and ||W - Q - B A||


def _quantize_first(quantize: Callable, weight, quantized, residual, rank, spec, generator) -> Iterator[Step]:
    a = None
    for t in range(1, spec.steps + 1):
        b, a = truncated_svd(residual, rank, method=spec.svd, generator=generator, start=a)
        yield (quantized, b, a), _left(residual, b, a)
        if t < spec.steps:  # in the same memory at every step: fresh memory costs more than quantizing into it
            target = _less(weight, b, a, residual)
            quantized, residual = quantize(target, out=target, earlier=quantized)


def _svd_first(quantize: Callable, weight, quantized, residual, rank, spec, generator) -> Iterator[Step]:
    a, memory, residual = None, residual, weight
    for _ in range(spec.steps):
        b, a = truncated_svd(residual, rank, method=spec.svd, generator=generator, start=a)
        quantized, residual = quantize(_less(weight, b, a, memory), out=memory, earlier=quantized)
        yield (quantized, b, a), frobenius(_less(residual, b, a))


def check_matrix(weight: Tensor, rank: int) -> None:
    """Refuse what cannot be solved: a rank that does not fit, values that are not finite."""
    if not 1 <= rank <= min(weight.shape):
        raise UsageError(
            f"rank {rank} does not fit a matrix of shape {tuple(weight.shape)}; "
            f"give --rank {min(weight.shape)} or less, or --rank-policy clamp"
        )
    check_finite(weight)


def check_finite(tensor: Tensor) -> None:
    """NumericalError, with count and first place, for NaN or infinity."""
    if tensor.ndim > 1 and math.isfinite(frobenius(tensor.flatten(1))):
        return  # an infinity or NaN anywhere would show in the norm; reading it once is quick
    finite = tensor.isfinite()
    if not finite.all():
        bad = (~finite).nonzero()
        raise NumericalError(
            f"{len(bad)} of {tensor.numel()} values are NaN or infinite, the first at {bad[0].tolist()}; "
            "repair the checkpoint"
        )


def tensor_seed(seed: int, name: str) -> int:
    """A seed of 63 bits from the run's seed and the tensor's name."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8], "little") >> 1


def _zero_start(weight: Tensor, rank: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """LoRA's own start: B = 0 and A uniform within 1/sqrt(in), as PEFT draws it."""
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
