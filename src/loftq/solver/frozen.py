"""The initialization for a base that is quantized already: Q is given, and only B and A are solved for.

    B, A = best rank-r factors of E = W - Q, in the metric of the moments

It is one half-step of LoftQ, with the base that some other quantizer has left; in a metric of activations it is QERA's
and EoRA's initialization (arXiv 2410.06040, 2410.21271).
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from loftq.errors import NumericalError
from loftq.numerics import Metric, Moments, best_factors, frobenius, product_square
from loftq.solver.loftq import check_finite, checked, fitting, tensor_seed, zero_start

LARGEST_TERM = 1 + 1e-3  # of the error: with G = I the term is a projection of it, and no larger but for rounding


@dataclass(frozen=True)
class FrozenStart:
    """Scale-free factors for a given base: ``W ≈ Q + B @ A``.

    Attributes:
        errors: ``||W - Q||_F / ||W||_F`` and ``||W - Q - B A||_F / ||W||_F``.
        output_errors: the same two in the norm that decided: that of the held-out tokens, if there are moments.
        reason: why B is zero; empty if it is not.
        output_norm: the weight's norm in the metric that decided.
    """

    b: Float[Tensor, "out rank"]
    a: Float[Tensor, "rank in"]
    errors: tuple[float, float]
    output_errors: tuple[float, float]
    reason: str = ""
    output_norm: float = 0.0

    def factors(self, s: float) -> tuple[Float[Tensor, "out rank"], Float[Tensor, "rank in"]]:
        """``B / sqrt(s)``, ``A / sqrt(s)``: what an adapter stores whose forward multiplies by ``s``.

        A zero initialization has nothing to rescale, and keeps LoRA's distribution of A.
        """
        root = 1.0 if self.reason else math.sqrt(s)
        return self.b / root, self.a / root


def fit_adapter(
    weight: Float[Tensor, "out in"],
    base: Float[Tensor, "out in"],
    rank: int,
    *,
    moments: Moments | None = None,
    svd: str = "auto",
    seed: int = 0,
    name: str = "",
) -> FrozenStart:
    """The best low-rank term for ``weight - base``, or a zero one if no term lowers the error.

    Args:
        weight: the original matrix, ``(out_features, in_features)``, any float dtype; solved in float32.
        base: what the frozen layer multiplies with, on the same device.
        rank: at most ``min(out, in)``.
        moments: of the inputs. The term is fitted in the metric of one part of the tokens, and taken only if it
            lowers the error on the other part. None: the Frobenius norm.
        svd: as in :class:`loftq.spec.SolveSpec`.
        seed, name: seed the randomized SVD and the A of a zero initialization.

    Raises: UsageError for a rank that does not fit; NumericalError for values that are not finite.
    """
    weight, base = checked(weight, rank), base.detach().float()
    error = weight - base
    try:
        check_finite(error)
    except NumericalError as e:
        raise NumericalError(f"the base's values are not finite: {e}") from e
    generator = torch.Generator("cpu").manual_seed(tensor_seed(seed, name))
    fit, held = (fitting(m, weight) for m in ((moments.fit, moments.held) if moments else (Metric(), Metric())))
    before = frobenius(error)
    if not before:
        return _without(weight, error, rank, held, generator, "the base is the original")
    b, a = best_factors(error, rank, fit, method=svd, generator=generator)
    left = torch.addmm(error, b, a, alpha=-1)
    if fit.rows is None and product_square(b, a) > (LARGEST_TERM * before) ** 2:
        return _without(weight, error, rank, held, generator, "the term came out larger than the error")
    if not held.norm(left) < held.norm(error):
        return _without(weight, error, rank, held, generator, "no lower error on tokens held out")
    return FrozenStart(
        b,
        a,
        (_relative(error, weight, Metric()), _relative(left, weight, Metric())),
        (_relative(error, weight, held), _relative(left, weight, held)),
        output_norm=held.norm(weight),
    )


def _without(
    weight: Tensor, error: Tensor, rank: int, held: Metric, generator: torch.Generator, reason: str
) -> FrozenStart:
    b, a = zero_start(weight, rank, generator)
    plain, weighted = _relative(error, weight, Metric()), _relative(error, weight, held)
    return FrozenStart(b, a, (plain, plain), (weighted, weighted), reason, held.norm(weight))


def _relative(matrix: Tensor, weight: Tensor, metric: Metric) -> float:
    """The norm of ``matrix`` as a part of the weight's; 0 for a weight without norm."""
    norm = metric.norm(weight)
    return metric.norm(matrix) / norm if norm else 0.0
