"""The norm that an initialization minimizes, and the best low-rank term in that norm.

What a matrix does to its inputs matters more than its entries. With the second moments ``H = E[x xᵀ]`` of the inputs,
and of the gradients with respect to the outputs ``G = diag E[d²]``,

    ‖X‖ = ‖G^½ X H^½‖_F

is the root of the expected squared error of the output, weighted by what the output does to the loss. The Frobenius
norm, LoftQ's, is ``G = H = I``.

The best term of rank r for an error E has a closed form (QERA, arXiv 2410.06040; CALDERA, 2405.18886; CLoQ,
2501.18475). With ``T Tᵀ = H`` and U the first r left singular vectors of ``M = G^½ E T``, it is

    L = G^-½ U Uᵀ G^½ E

which has no inverse of H in it: a rank-deficient H, from few tokens or dead channels, does no harm.
"""

import math
import threading
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from loftq.errors import NumericalError, UsageError, option
from loftq.numerics.lowrank import NotConverged, truncated_svd
from loftq.numerics.norms import frobenius

JITTER = (1e-9, 1e-7, 1e-5, 1e-4)  # parts of H's diagonal and its mean, added to it until it has a Cholesky factor
ROUNDED = 1e-3  # of H's largest entry: its two halves differ by no more, added up in any precision and order
ENOUGH = 4  # tokens per input feature that outweigh the shrinkage of whole second moments
LEAST_ROW = 1e-6  # of G's mean: a row without gradient still counts this much, or its factor would be infinite


@dataclass(frozen=True)
class Metric:
    """``‖X‖ = ‖G^½ X H^½‖_F`` for matrices ``X (out, in)``.

    Attributes:
        columns: H, its diagonal ``(in,)`` or the whole ``(in, in)``; None for the identity.
        rows: the diagonal of G, ``(out,)``; None for the identity.
    """

    columns: Tensor | None = None
    rows: Tensor | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False, repr=False, compare=False)
    _root: list[Tensor] = field(default_factory=list, init=False, repr=False, compare=False)

    def to(self, device: torch.device) -> "Metric":
        """The same on another device; itself if it is there, with the root that all who use it share."""
        parts = [part for part in (self.columns, self.rows) if part is not None]
        if all(part.device == device for part in parts):
            return self
        return Metric(*(None if part is None else part.to(device) for part in (self.columns, self.rows)))

    def fits(self, shape: torch.Size) -> bool:
        """Whether it fits matrices of this shape."""
        pairs = ((self.rows, shape[0]), (self.columns, shape[1]))
        return all(part is None or len(part) == size for part, size in pairs)

    @property
    def kind(self) -> str:
        """``fisher``, ``full``, ``diagonal`` or ``weights``."""
        if self.rows is not None:
            return "fisher"
        if self.columns is None:
            return "weights"
        return "full" if self.columns.ndim == 2 else "diagonal"

    @property
    def plain(self) -> bool:
        """Whether this is the Frobenius norm."""
        return self.columns is None and self.rows is None

    @property
    def root(self) -> Tensor | None:
        """T with ``T Tᵀ = H``, float32: a vector for a diagonal H, a lower triangle for a whole one.

        Computed once, also where several threads ask at the same time.
        """
        if self.columns is None:
            return None
        with self._lock:
            if not self._root:
                h = self.columns.double()
                self._root.append((h.clamp(min=0).sqrt() if h.ndim == 1 else cholesky(h)).float())
            return self._root[0]

    @property
    def row_root(self) -> Tensor | None:
        """The diagonal of ``G^½``, float32."""
        if self.rows is None:
            return None
        g = self.rows.double()
        return g.clamp(min=max(LEAST_ROW * g.mean().item(), torch.finfo(torch.float32).tiny)).sqrt().float()

    def whiten(self, matrix: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
        """``G^½ X T``, whose Frobenius norm is the norm of X."""
        if self.row_root is not None:
            matrix = matrix * self.row_root[:, None]
        return self.from_right(matrix)

    def from_right(self, matrix: Float[Tensor, "any in"]) -> Float[Tensor, "any in"]:
        """``X T``."""
        if self.root is None:
            return matrix
        return matrix * self.root if self.root.ndim == 1 else matrix @ self.root

    def norm(self, matrix: Float[Tensor, "out in"]) -> float:
        """The norm of X; a full H needs no root for it: ``‖X‖² = tr(G X H Xᵀ)``."""
        if self.columns is None or self.columns.ndim == 1:
            return frobenius(self.whiten(matrix))
        scaled = matrix if self.row_root is None else matrix * self.row_root[:, None]
        square = torch.linalg.vecdot(scaled @ self.columns.to(scaled.dtype), scaled).double().sum()
        return square.clamp(min=0).sqrt().item()


@dataclass(frozen=True)
class Moments:
    """Second moments of the inputs of one matrix, from a calibration.

    Attributes:
        fit: the metric that the initialization minimizes; shrunk towards its diagonal if there were few tokens.
        held: the metric of the held-out tokens, which judges the steps; not shrunk.
        tokens: number of tokens behind ``fit``; 0 if it is not known.
    """

    fit: Metric
    held: Metric
    tokens: int

    @classmethod
    def of(cls, h: Tensor) -> "Moments":
        """Moments from your own ``H = E[x xᵀ]``, of shape ``(in, in)``, or any multiple of it.

        H is used unchanged, and no tokens are held out. If it is of few tokens, shrink it: ``(1 - a) H + a diag(H)``.

        Raises: UsageError unless H is a square matrix of real numbers that is finite, symmetric and positive
            semidefinite up to rounding.
        """
        metric = Metric(_second_moments(h))
        try:
            metric.root  # noqa: B018 - computed here, where the caller can be told
        except NumericalError as e:
            raise UsageError("moments: H = E[x xᵀ] is positive semidefinite, and this matrix is far from it") from e
        return cls(metric, metric, 0)


def _second_moments(h: Tensor) -> Tensor:
    """H in float32, its two halves made equal, if it can be one."""
    if h.ndim != 2 or h.shape[0] != h.shape[1] or not h.numel():
        raise UsageError(f"moments: wanted the second moments (in, in) of the inputs, got shape {tuple(h.shape)}")
    if not h.is_floating_point() or h.layout != torch.strided or h.is_meta:
        got = f"{h.dtype}, {h.layout}, on {h.device.type}".replace("torch.", "")
        raise UsageError(f"moments: wanted floating-point numbers, dense and in memory, got {got}")
    h = h.detach().float()
    if not h.isfinite().all():
        raise UsageError("moments: not all finite; in float16, sums over many tokens overflow: add up in float32")
    most = h.abs().max().item()
    if (h - h.T).abs().max().item() > ROUNDED * most:
        raise UsageError("moments: H = E[x xᵀ] is symmetric, and this matrix is not")
    if h.diagonal().min() < 0 or h.diagonal().max().item() < (1 - ROUNDED) * most:
        raise UsageError("moments: H = E[x xᵀ] has squares on its diagonal, none negative, the largest of all entries")
    return (h + h.T) / 2


def towards_diagonal(h: Float[Tensor, "in in"], tokens: int) -> Float[Tensor, "in in"]:
    """Second moments of so few tokens with less of what they say of pairs: ``(1 - a) H + a diag(H)``,
    ``a = in / (4 in + tokens)``.
    """
    smaller = (1 - len(h) / (ENOUGH * len(h) + tokens)) * h
    smaller.diagonal().copy_(h.diagonal())
    return smaller


def best_factors(
    error: Float[Tensor, "out in"],
    rank: int,
    metric: Metric,
    *,
    method: str = "auto",
    generator: torch.Generator | None = None,
    start: Float[Tensor, "rank in"] | None = None,
) -> tuple[Float[Tensor, "out rank"], Float[Tensor, "rank in"]]:
    """Factors ``B``, ``A`` with ``B @ A`` closest to ``error`` in the metric, their singular values split evenly.

    Args:
        method, generator: as :func:`loftq.numerics.truncated_svd` takes them.
        start: an earlier ``A``, from which a randomized SVD starts.

    Raises: NumericalError for what is not finite.
    """
    if metric.plain:
        return truncated_svd(error, rank, method=method, generator=generator, start=start)
    if start is not None:
        start = metric.from_right(start)
    left, _ = truncated_svd(metric.whiten(error), rank, method=method, generator=generator, start=start)
    basis = left / torch.linalg.vector_norm(left, dim=0).clamp(min=torch.finfo(torch.float32).tiny)
    scaled = error if metric.row_root is None else error * metric.row_root[:, None]
    right = basis.T @ scaled
    if metric.row_root is not None:
        basis = basis / metric.row_root[:, None]
    return balanced(basis, right)


@dataclass(frozen=True)
class Downdate:
    """``D − P Pᵀ``, for a diagonal D, without a matrix ``(in, in)``.

    Attributes:
        diagonal: of D, float64.
        part: P, float64.
    """

    diagonal: Float[Tensor, " in"]
    part: Float[Tensor, "in rank"]

    def dense(self) -> Float[Tensor, "in in"]:
        return torch.diag(self.diagonal).addmm_(self.part, self.part.T, alpha=-1)


def deflated(
    a: Float[Tensor, "rank in"], columns: Float[Tensor, "in in"] | Float[Tensor, " in"]
) -> Float[Tensor, "in in"] | Downdate:
    """H deflated by an adapter, without the part of the inputs that it sees: ``H − H Aᵀ (A H Aᵀ)⁻¹ A H``.

    In this metric, ``W − Q`` is as long as the best ``W − Q − B A`` is in H, over all B. So a Q that is better in it is
    better together with its adapter. From ProjQ (arXiv 2606.00494), which projects cached inputs; H is enough for it.

    Args:
        columns: H, or its diagonal where it is one.
    """
    h, a = columns.to(torch.float64, copy=True), a.double()
    seen = h @ a.T if h.ndim == 2 else h[:, None] * a.T
    squares, directions = torch.linalg.eigh(a @ seen)
    kept = squares > 1e-12 * squares[-1].clamp(min=torch.finfo(torch.float64).tiny)
    part = seen @ (directions[:, kept] / squares[kept].sqrt())
    return h.addmm_(part, part.T, alpha=-1) if h.ndim == 2 else Downdate(h, part)


def balanced(b: Float[Tensor, "out rank"], a: Float[Tensor, "rank in"]) -> tuple[Tensor, Tensor]:
    """The same product, ``B = U S^½`` and ``A = S^½ Vᵀ``: neither factor is large where the other is small."""
    left, upper = torch.linalg.qr(b.double())
    right, other = torch.linalg.qr(a.double().T)
    try:
        u, s, vh = torch.linalg.svd(upper @ other.T)
    except NotConverged as e:
        raise NumericalError("the low-rank term is not finite") from e
    root = s.sqrt()
    return ((left @ u) * root).float(), (root[:, None] * (vh @ right.T)).float()


def cholesky(h: Float[Tensor, "in in"]) -> Float[Tensor, "in in"]:
    """The lower Cholesky factor, in float64, of a symmetric matrix that is positive up to rounding.

    Raises: NumericalError for one that is not.
    """
    diagonal = h.diagonal().clone()
    mean = diagonal.mean().item()
    if mean == 0:
        return torch.zeros_like(h)
    if math.isfinite(mean):
        damped = h.clone()
        for jitter in JITTER:
            damped.diagonal().copy_(diagonal + jitter * (diagonal + mean))
            factor, failed = torch.linalg.cholesky_ex(damped)
            if not failed:
                return factor
    raise NumericalError(
        "the second moments of the inputs are not finite, or far from positive semidefinite; calibrate on more texts, "
        f"or with {option('kind', 'diagonal')}"
    )
