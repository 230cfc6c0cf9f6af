"""Compiled CPU kernels of :mod:`loftq.numerics.rounding`: its arithmetic, operation for operation, to the same bits."""

import numpy as np

from loftq.kernels.fitting import ONE, ZERO, compiled


@compiled
def round_block(values, upper, scale, zero, gaps, levels, codes, fed, start, stop):
    """Codes of some rows of a block, each column's error fed back into the later ones."""
    size = values.shape[1]
    for i in range(start, stop):
        s, z = scale[i], zero[i]
        safe = ONE if s == 0 else s
        for j in range(size):
            code = np.searchsorted(gaps, values[i, j] / safe + z)
            error = (values[i, j] - (levels[code] - z) * s) / upper[j, j]
            codes[i, j], fed[i, j] = code, error
            for k in range(j + 1, size):
                values[i, k] -= error * upper[j, k]


@compiled
def descend_block(pull, codes, own, scale, zero, gaps, levels, moved, start, stop):
    """The best code of each column of some rows in turn, all others fixed."""
    size = pull.shape[1]
    for i in range(start, stop):
        s, z = scale[i], zero[i]
        safe = ONE if s == 0 else s
        for j in range(size):
            moved[i, j] = ZERO
            if own[j, j] <= 0:
                continue
            value = (levels[codes[i, j]] - z) * s
            code = np.searchsorted(gaps, (value + pull[i, j] / own[j, j]) / safe + z)
            if code != codes[i, j]:
                codes[i, j] = code
                moved[i, j] = (levels[code] - z) * s - value
                for k in range(size):
                    pull[i, k] -= moved[i, j] * own[j, k]
