"""Best low-rank factors of a matrix: exact, or by randomized block power iteration.

Halko, Martinsson and Tropp, "Finding structure with randomness" (SIAM Review 53, 2011), algorithms 4.4 and 5.1.
A quantization error has a flat spectrum, the worst case for such a method: what is lost is a part of the little
that a low-rank term can take away. The measured loss, per number of iterations, is in docs/experiments.md.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from loftq.errors import NumericalError

OVERSAMPLE = 16
COLD, WARM = 4, 2  # power iterations from a random start, and from the factors of the previous step
EXACT_BELOW = 512  # "auto": matrices whose shorter side is at most this are decomposed exactly


def truncated_svd(
    matrix: Float[Tensor, "out in"],
    rank: int,
    *,
    method: str = "auto",
    generator: torch.Generator | None = None,
    start: Float[Tensor, "rank in"] | None = None,
) -> tuple[Float[Tensor, "out rank"], Float[Tensor, "rank in"]]:
    """Factors ``B (out, rank)``, ``A (rank, in)`` with ``B @ A`` closest to ``matrix`` in the Frobenius norm.

    The singular values are split evenly: both factors carry their square roots (LoftQ, equation 9).

    Args:
        matrix: float32, finite.
        rank: at most ``min(out, in)``.
        method: ``exact``, ``randomized`` or ``auto``.
        generator: source of the randomized method's start; None takes torch's global one.
        start: an earlier ``A``; its rows, a good guess of the right singular vectors, start the iteration.

    Raises: NumericalError if LAPACK does not converge, in float32 and in float64.
    """
    short = min(matrix.shape)
    if method == "auto":
        method = "exact" if short <= EXACT_BELOW or rank + OVERSAMPLE > short // 2 else "randomized"
    if method == "exact":
        u, s, vh = _svd(matrix)
    else:
        u, s, vh = _randomized(matrix, rank, generator, start)
    root = s[:rank].sqrt()
    return u[:, :rank] * root, root[:, None] * vh[:rank]


def _svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    for dtype in (torch.float32, torch.float64):
        try:
            u, s, vh = torch.linalg.svd(matrix.to(dtype), full_matrices=False)
        except torch.linalg.LinAlgError:
            continue
        if s.isfinite().all() and u.isfinite().all() and vh.isfinite().all():
            return u.float(), s.float(), vh.float()
    raise NumericalError("the SVD did not converge to finite factors, in float32 and in float64")


def _randomized(
    matrix: Tensor, rank: int, generator: torch.Generator | None, start: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    width = min(rank + OVERSAMPLE, *matrix.shape)
    fresh = width if start is None else width - rank
    probe = torch.randn(matrix.shape[1], fresh, generator=generator).to(matrix.device)
    if start is not None:
        probe = torch.cat([start.T, probe], 1)
    for _ in range(COLD if start is None else WARM):
        basis = torch.linalg.qr(matrix @ probe).Q
        probe = torch.linalg.qr(matrix.T @ basis).Q
    basis = torch.linalg.qr(matrix @ probe).Q
    u, s, vh = _svd(basis.T @ matrix)
    return basis @ u, s, vh
