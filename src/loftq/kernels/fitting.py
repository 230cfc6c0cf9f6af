"""Compiled CPU kernels of :mod:`loftq.numerics.fitting`: its arithmetic, operation for operation, to the same bits."""

import numpy as np
from numba import njit

compiled = njit(nogil=True, cache=True, error_model="numpy")  # a division by zero is infinite, as it is for torch
inlined = njit(nogil=True, cache=True, error_model="numpy", forceinline=True)

ZERO, ONE = np.float32(0), np.float32(1)
TINY = np.finfo(np.float32).tiny
MAGNITUDE, EXPONENT = np.uint32(0x7FFFFFFF), np.uint32(0x7F800000)  # in the bits of a float32
COUNTED = 15  # gaps up to which comparing with all of them, vectorised, beats a search


@compiled
def search(weight, near, factors, rounds, gaps, levels, affine, block, result, start, stop):
    """Scale and zero point, ``result[0]`` and ``result[1]``, of every block of some rows.

    ``near`` has the form of the result, or no elements; ``factors`` multiply its scales, or else the scale that reaches
    all weights.
    """
    w, x, c = np.empty(block, np.float32), np.empty(block, np.float32), np.empty(block, np.float32)
    p, q = np.empty(block, np.float32), np.empty(block, np.float32)
    bits, columns = weight.view(np.uint32), weight.shape[1]
    for i in range(start, stop):
        for b in range(result.shape[2]):
            first = b * block
            size = min(block, columns - first)
            unit = _unit(bits, i, first, size)
            for j in range(size):
                w[j] = weight[i, first + j] / unit
                x[j] = w[j]
            total, count = _sum(x, size), np.float32(size)
            if near.size:
                reach, zero = near[0, i, b] / unit, near[1, i, b]
            else:
                reach, zero = _reach(w, size, levels, affine)
            best_scale, best_zero, best = reach * factors[0], zero, -ONE
            for n in range(len(factors) + rounds):
                s, z = best_scale, best_zero
                if n < len(factors):
                    s, z = reach * factors[n], zero
                inverse = ONE / (ONE if s == 0 else s)
                for j in range(size):
                    x[j] = w[j] * inverse + z
                _nearest(x, size, gaps, levels, c)
                for j in range(size):
                    p[j], q[j] = w[j] * c[j], c[j] * c[j]
                both, square = _sums(p, q, size)
                if affine:
                    level = _sum(c, size)
                    mean = level / count
                    slope = (both - total * mean) / (square - level * mean)
                    place = np.rint(mean - total / count / slope)
                    if place >= 0 and place <= levels[-1]:
                        z = place
                    both = both - z * total
                    square = square - z * (level + level - z * count)
                s = both / (ONE if square == 0 else square)
                if both * s > best:
                    best_scale, best_zero, best = s, z, both * s
                elif n >= len(factors):
                    break  # what has not helped will not
            result[0, i, b], result[1, i, b] = best_scale * unit, best_zero


@compiled
def block_errors(weight, scale, zero, gaps, levels, least, block, errors, start, stop):
    """Squared error of every block of some rows, in units of its power of two, which is not below ``least``."""
    x, c = np.empty(block, np.float32), np.empty(block, np.float32)
    bits, columns = weight.view(np.uint32), weight.shape[1]
    for i in range(start, stop):
        for b in range(scale.shape[1]):
            first = b * block
            size = min(block, columns - first)
            unit = max(_unit(bits, i, first, size), least)
            s, z = scale[i, b], zero[i, b]
            divisor = ONE if s == 0 else s
            for j in range(size):
                x[j] = weight[i, first + j] / divisor + z
            _nearest(x, size, gaps, levels, c)
            for j in range(size):
                part = (weight[i, first + j] - (c[j] - z) * s) / unit
                x[j] = part * part
            errors[i, b] = _sum(x, size)


@inlined
def _unit(bits, i, first, size):
    """The power of two below the largest magnitude; magnitudes are in the order of their bits."""
    largest = np.zeros(1, np.uint32)
    for j in range(first, first + size):
        largest[0] = max(largest[0], bits[i, j] & MAGNITUDE)
    largest[0] &= EXPONENT
    return max(largest.view(np.float32)[0], TINY)


@inlined
def _reach(w, size, levels, affine):
    """The scale that reaches all weights, and the zero point that goes with it."""
    low, high = ZERO, ZERO
    for j in range(size):
        low, high = min(low, w[j]), max(high, w[j])
    if affine:
        reach = (high - low) / levels[-1]
        return reach, np.rint(-low / (ONE if reach == 0 else reach))
    return max(high, -low) / max(levels[-1], -levels[0]), ZERO


@inlined
def _nearest(x, size, gaps, levels, c):
    """The nearest level of every scaled weight."""
    if len(gaps) <= COUNTED:
        for j in range(size):
            c[j] = levels[0]
        for k in range(len(gaps)):
            gap, level = gaps[k], levels[k + 1]
            for j in range(size):
                c[j] = level if gap < x[j] else c[j]
    else:
        for j in range(size):
            c[j] = levels[np.searchsorted(gaps, x[j])]


@inlined
def _sum(x, size):
    """The second half onto the first until one is left; ``x`` is lost."""
    while size > 1:
        half = (size + 1) // 2
        for j in range(size - half):
            x[j] += x[j + half]
        size = half
    return x[0]


@inlined
def _sums(x, y, size):
    """Both sums in one go, which is quicker."""
    while size > 1:
        half = (size + 1) // 2
        for j in range(size - half):
            x[j] += x[j + half]
            y[j] += y[j + half]
        size = half
    return x[0], y[0]
