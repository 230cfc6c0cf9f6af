"""Compiled CPU kernels of :mod:`loftq.numerics.rounding`: its arithmetic, operation for operation, to the same bits.

A row's columns depend on one another, rows do not: so some rows at a time are worked on, column by column, and every
inner loop goes over the rows, in vectors.
"""

import numpy as np

from loftq.kernels.fitting import COUNTED, ONE, ZERO, compiled, inlined

LANES = 32  # rows at a time: a block of 64 columns takes 8 KiB


@compiled
def round_block(values, upper, scale, zero, gaps, levels, codes, fed, start, stop):
    """Codes of some rows of a block, each column's error fed back into the later ones."""
    size = values.shape[1]
    v = np.zeros((size, LANES), np.float32)
    s, z, safe = _three()
    x, c = np.zeros(LANES, np.float32), np.zeros(LANES, np.uint8)
    for first in range(start, stop, LANES):
        count = min(LANES, stop - first)
        _gather(values, scale, zero, first, count, v, s, z, safe)
        for j in range(size):
            for i in range(LANES):
                x[i] = v[j, i] / safe[i] + z[i]
            _nearest(x, gaps, c)
            for i in range(LANES):
                x[i] = (v[j, i] - (levels[c[i]] - z[i]) * s[i]) / upper[j, j]
            for i in range(count):
                codes[first + i, j], fed[first + i, j] = c[i], x[i]
            for k in range(j + 1, size):
                u = upper[j, k]
                for i in range(LANES):
                    v[k, i] -= x[i] * u


@compiled
def descend_block(pull, codes, own, scale, zero, gaps, levels, moved, start, stop):
    """The best code of each column of some rows in turn, all others fixed."""
    size = pull.shape[1]
    p = np.zeros((size, LANES), np.float32)
    s, z, safe = _three()
    x, c, value = np.zeros(LANES, np.float32), np.zeros(LANES, np.uint8), np.zeros(LANES, np.float32)
    for first in range(start, stop, LANES):
        count = min(LANES, stop - first)
        _gather(pull, scale, zero, first, count, p, s, z, safe)
        for j in range(size):
            d = own[j, j]
            if d <= 0:
                for i in range(count):
                    moved[first + i, j] = ZERO
                continue
            for i in range(count):
                value[i] = (levels[codes[first + i, j]] - z[i]) * s[i]
            for i in range(LANES):
                x[i] = (value[i] + p[j, i] / d) / safe[i] + z[i]
            _nearest(x, gaps, c)
            still = True
            for i in range(LANES):
                x[i] = (levels[c[i]] - z[i]) * s[i] - value[i]
            for i in range(count):
                codes[first + i, j], moved[first + i, j] = c[i], x[i]
                still &= x[i] == 0
            if still:
                continue
            for k in range(j + 1, size):
                h = own[j, k]
                for i in range(LANES):
                    p[k, i] -= x[i] * h


@inlined
def _three():
    return np.zeros(LANES, np.float32), np.zeros(LANES, np.float32), np.zeros(LANES, np.float32)


@inlined
def _gather(rows, scale, zero, first, count, columns, s, z, safe):
    """Some rows, column by column, with their scales, zero points and what to divide by; other lanes have no scale."""
    for i in range(count):
        for j in range(rows.shape[1]):
            columns[j, i] = rows[first + i, j]
    for i in range(LANES):
        s[i], z[i] = ZERO, ZERO
        if i < count:
            s[i], z[i] = scale[first + i], zero[first + i]
        safe[i] = ONE if s[i] == 0 else s[i]


@inlined
def _nearest(x, gaps, c):
    """The code of the nearest level of every scaled value."""
    if len(gaps) <= COUNTED:
        for i in range(LANES):
            c[i] = 0
        for k in range(len(gaps)):
            gap = gaps[k]
            for i in range(LANES):
                c[i] += np.uint8(gap < x[i])
    else:
        for i in range(LANES):
            c[i] = np.searchsorted(gaps, x[i])
