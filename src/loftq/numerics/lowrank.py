"""Best low-rank factors of a matrix: exact, or from a randomized block Krylov space.

Musco and Musco, "Randomized block Krylov methods for stronger and faster approximate singular value decomposition"
(NeurIPS 2015), with full reorthogonalisation. A quantization error has a flat spectrum, the worst case for such a
method: what is lost is a part of the little that a low-rank term can take away. Keeping the whole Krylov space gets
from the same products with the matrix what plain power iteration needs about twice as many for; the measured loss is
in docs/experiments.md.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from loftq.errors import NumericalError

NotConverged = torch.linalg.LinAlgError  # type: ignore[attr-defined]  # public, but not to pyright
OVERSAMPLE = 8
COLD, WARM = 8, 2  # blocks of the Krylov space from a random start, and from the factors of the previous step
NOT_FINITE = "the SVD did not converge to finite factors, in float32 and in float64"
ROUNDING = 1e-6  # relative size of what float32 leaves where exact arithmetic leaves nothing
WORTH_IT = 0.75  # share of all directions from which a Krylov space takes as long as all of them
EXACT_BELOW = 512**3  # "auto": matrices with out · in · min(out, in) up to this are decomposed exactly


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
        method = "exact" if matrix.numel() * short <= EXACT_BELOW else "randomized"
    blocks = COLD if start is None else WARM
    if method == "exact" or blocks * (rank + OVERSAMPLE) >= short * WORTH_IT:
        u, s, vh = _svd(matrix)
    else:
        u, s, vh = _krylov(matrix, rank, blocks, generator, start)
    root = s[:rank].sqrt()
    return u[:, :rank] * root, root[:, None] * vh[:rank]


def _svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    for dtype in (torch.float32, torch.float64):
        try:
            u, s, vh = (part.float() for part in torch.linalg.svd(matrix.to(dtype), full_matrices=False))
        except NotConverged:
            continue
        if s.isfinite().all() and u.isfinite().all() and vh.isfinite().all():
            return u, s, vh
    raise NumericalError(NOT_FINITE)


def _krylov(
    matrix: Tensor, rank: int, blocks: int, generator: torch.Generator | None, start: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Leading ``rank`` singular triplets from the span of ``R x, (R Rᵀ) R x, …`` for a block of columns x."""
    fresh = OVERSAMPLE if start is not None else rank + OVERSAMPLE
    probe = torch.randn(matrix.shape[1], fresh, generator=generator, device="cpu", dtype=torch.float32)
    probe = probe.to(matrix.device)
    if start is not None:
        probe = torch.cat([torch.nn.functional.normalize(start, dim=1).T, probe], 1)
    left: list[Tensor] = []  # orthonormal blocks, and what the transposed matrix makes of each
    right: list[Tensor] = []
    for _ in range(blocks):
        block = _orthonormal(matrix @ _basis(probe), left)
        if not block.shape[1]:  # the matrix has no more rank
            break
        left.append(block)
        probe = (block.T @ matrix).T
        right.append(probe)
    basis = torch.cat(left, 1) if left else matrix.new_zeros(len(matrix), 0)
    image = torch.cat(right, 1) if right else matrix.new_zeros(matrix.shape[1], 0)
    squares, directions = (part[..., -rank:].flip(-1) for part in _gram_eigh(image))
    s = squares.clamp(min=0).sqrt()
    v = image @ (directions / torch.where(s > 0, s, torch.inf)).float()  # u @ s @ v.T is the matrix projected on u
    pad, short = torch.nn.functional.pad, rank - len(s)  # what the matrix lacks in rank is zero
    return pad(basis @ directions.float(), (0, short)), pad(s.float(), (0, short)), pad(v.T, (0, 0, 0, short))


def _orthonormal(block: Tensor, earlier: list[Tensor]) -> Tensor:
    """An orthonormal basis of what ``block`` adds to the earlier blocks.

    Two rounds of projection are enough (Kahan and Parlett). A direction of which the first leaves nearly nothing, or
    that loses much of its length in the second, is rounding noise of one that is there already, and is dropped.
    """
    if not earlier:
        return _basis(block)
    others, length = torch.cat(earlier, 1), torch.linalg.vector_norm(block, dtype=torch.float64).item()
    for least in (ROUNDING * length, 0.5):
        block = _basis(block - others @ (others.T @ block), least)
    return block


def _basis(block: Tensor, least: float | None = None) -> Tensor:
    """An orthonormal basis of the columns, without directions shorter than ``least``, or lost in the longest one.

    By the eigenvectors of the Gram matrix (SVQB, Stathopoulos and Wu, SIAM J. Sci. Comput. 23, 2002), in float64, which
    holds the squares of float32 without loss: products of matrices, many times as fast as Householder's QR.
    """
    if not block.shape[1]:
        return block
    squares, directions = _gram_eigh(block)
    kept = squares > (least**2 if least else ROUNDING**2 * squares[-1])
    return (block.double() @ (directions[:, kept] / squares[kept].sqrt())).float()


def _gram_eigh(block: Tensor) -> tuple[Tensor, Tensor]:
    """Squares of the singular values of a tall block, ascending, and its right singular vectors, in float64."""
    wide = block.double()
    try:
        return torch.linalg.eigh(wide.T @ wide)
    except NotConverged as e:
        raise NumericalError(NOT_FINITE) from e
