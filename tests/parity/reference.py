"""LoftQ's Algorithm 1 (arXiv 2310.08659 v4) and the quantizers of its released code, from their formulas, in numpy.

Nothing of ``loftq`` is used here. The paper writes W ≈ Q + A Bᵀ; here, as in the package, W ≈ Q + B A.
"""

from collections.abc import Callable
from statistics import NormalDist

import numpy as np

Array = np.ndarray
BLOCK = 64


def normal_float_levels(bits: int) -> Array:
    """Quantiles of N(0, 1) from 0.9677083 to 1/2 on each side of zero, over the largest; one more is positive."""
    n = 2**bits
    outer = np.float32(0.9677083)

    def quantiles(count: int) -> list[float]:
        inner = np.linspace(outer, np.float32(0.5), count + 1, dtype=np.float32)[:-1]
        return [NormalDist().inv_cdf(float(p)) for p in inner]

    values = np.array(sorted([*quantiles(n // 2), 0.0, *(-q for q in quantiles(n // 2 - 1))]))
    return values / values.max()


def uniform_levels(bits: int) -> Array:
    return np.linspace(-1, 1, 2**bits)


def nearest(scaled: Array, levels: Array) -> Array:
    return np.abs(scaled[..., None] - levels).argmin(-1)


def block_quantizer(levels: Array, scale_of: Callable[[Array], Array]) -> Callable[[Array], Array]:
    """Blocks of 64 in row-major order, one scale a block, the nearest level."""

    def quantize(w: Array) -> Array:
        blocks = w.reshape(-1, BLOCK)
        scale = scale_of(blocks)[:, None]
        return (levels[nearest(blocks / scale, levels)] * scale).reshape(w.shape)

    return quantize


def normal_float(bits: int) -> Callable[[Array], Array]:
    return block_quantizer(normal_float_levels(bits), lambda blocks: np.abs(blocks).max(1))


def uniform(bits: int) -> Callable[[Array], Array]:
    """Scale: signed mean plus 2.5 sample standard deviations."""
    return block_quantizer(uniform_levels(bits), lambda blocks: blocks.mean(1) + 2.5 * blocks.std(1, ddof=1))


def uniform_tensor(bits: int) -> Callable[[Array], Array]:
    """Clip to mean ± 2 sigma of the tensor, then round on the min-max grid."""
    top = 2**bits - 1

    def quantize(w: Array) -> Array:
        mean, sigma = w.mean(), w.std(ddof=1)
        clipped = np.clip(w, mean - 2 * sigma, mean + 2 * sigma)
        low = clipped.min()
        width = clipped.max() - low + 1e-8
        return np.round((clipped - low) / width * top) / top * width + low

    return quantize


def low_rank(matrix: Array, rank: int) -> Array:
    u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    return (u[:, :rank] * np.sqrt(s[:rank])) @ (np.sqrt(s[:rank])[:, None] * vt[:rank])


def algorithm_1(w: Array, quantize: Callable[[Array], Array], rank: int, steps: int) -> list[tuple[Array, Array]]:
    """(Q_t, B_t A_t) of every step: quantize what the factors leave, then the best factors of what is left."""
    found, product = [], np.zeros_like(w)
    for _ in range(steps):
        backbone = quantize(w - product)
        product = low_rank(w - backbone, rank)
        found.append((backbone, product))
    return found
