"""Compiled decoder of the trellis code: windows into packed strings of bits, looked up in the table of levels.

A group's string holds its columns one after the other. A tile of :data:`ROWS` rows and up to :data:`COLUMNS` columns is
decoded at a time: eight windows lie within 57 bits at any rate, so one read of eight bytes serves a column of a tile.
Values are exact to the bit, ``levels[window] * scale`` in float32.

Helpers are inlined by Numba itself, not by LLVM: the latter counts references to every array that it hands on, which
takes longer than to decode a column. Indices are unsigned, because Numba looks whether a signed one is negative.
"""

import numpy as np
from numba import njit

compiled = njit(nogil=True, cache=True)
inlined = njit(nogil=True, inline="always")
reassociating = njit(nogil=True, cache=True, fastmath={"reassoc", "contract", "nsz", "arcp"})

UNIT = 16  # weights that take as many bits as their rate says
ROWS, COLUMNS = 8, 256  # of a tile: 8 KiB, beside as much of the packed weight and the table of levels in a fast cache
READ, LEAST = 57, 8  # bits that one read has for certain; bytes that there must be to read from
U = np.uint64


@inlined
def _read(packed, bit):
    """:data:`READ` bits or more, from any bit on; zeros behind the end of the memory, which has
    :data:`LEAST` bytes or more."""
    at = min(U(bit) >> U(3), U(packed.size - 8))
    low = U(packed[at]) | U(packed[at + U(1)]) << U(8) | U(packed[at + U(2)]) << U(16) | U(packed[at + U(3)]) << U(24)
    at += U(4)
    high = U(packed[at]) | U(packed[at + U(1)]) << U(8) | U(packed[at + U(2)]) << U(16) | U(packed[at + U(3)]) << U(24)
    return (low | high << U(32)) >> (U(bit) - ((at - U(4)) << U(3)))


@inlined
def _tile(packed, begin, rates, starts, shifts, even, first, size, row, group, mask, levels, words, tile):
    """Levels of eight rows of a group, from ``row`` on, and ``size`` columns, from ``first`` on, into ``tile``.

    The group's string begins at the bit ``begin``. Where all rates are ``even``, so are the shifts.
    """
    gaps = False
    for i in range(size):
        rate, bit = rates[first + i], begin + starts[first + i]
        at = (row * rate) // UNIT
        left = (group * rate) // UNIT - at
        word = _read(packed, bit + at)
        if left < READ:  # the string is a circle
            word = (word & U((1 << left) - 1)) | _read(packed, bit) << U(left)
        words[i] = word
        gaps |= rate == 0
    for r in range(U(ROWS)):
        place = U(row % UNIT) + r
        if even:
            shift = U(shifts[place, 0])
            for i in range(size):
                tile[r, i] = levels[(words[i] >> shift) & mask]
        else:
            for i in range(size):
                tile[r, i] = levels[(words[i] >> U(shifts[place, first + i])) & mask]
    if gaps:
        for r in range(U(ROWS)):
            for i in range(size):
                if rates[first + i] == 0:
                    tile[r, i] = 0


@compiled
def decode(packed, n_bytes, rates, starts, shifts, even, group, levels, scale, bfloat16, out, start, stop):
    """Dense rows; bfloat16 as bits, rounded to nearest, even. See :class:`loftq.kernels.trellis_cpu.Strings`."""
    rows, columns = out.shape
    words, tile = np.empty(COLUMNS, np.uint64), np.empty((ROWS, COLUMNS), np.float32)
    bits, mask = tile.view(np.uint32), U(len(levels) - 1)
    done, last = -(-start // ROWS), -(-stop // ROWS)
    while done < last:  # the rows of one group after the other's
        number = done * ROWS // group
        end = min(last, (number + 1) * group // ROWS)
        begin = number * n_bytes * 8
        for first in range(U(0), U(columns), U(COLUMNS)):
            size = min(U(COLUMNS), U(columns) - first)
            for block in range(done, end):
                top = block * ROWS
                row = top - number * group
                _tile(packed, begin, rates, starts, shifts, even, first, size, row, group, mask, levels, words, tile)
                for r in range(U(min(ROWS, rows - top))):
                    at = U(top) + r
                    s = scale[at]
                    if bfloat16:
                        for i in range(size):
                            tile[r, i] *= s
                        for i in range(size):
                            word = bits[r, i]
                            rounded = word + np.uint32(0x7FFF) + ((word >> np.uint32(16)) & np.uint32(1))
                            out[at, first + i] = rounded >> np.uint32(16)
                    else:
                        for i in range(size):
                            out[at, first + i] = tile[r, i] * s
        done = end


@reassociating
def product(packed, n_bytes, rates, starts, shifts, even, group, levels, scale, x, y, start, stop):
    """Some rows of ``y = W x``; ``x`` is (tokens, in), ``y`` (out, tokens)."""
    (tokens, columns), rows = x.shape, len(y)
    words, tile = np.empty(COLUMNS, np.uint64), np.empty((ROWS, COLUMNS), np.float32)
    mask = U(len(levels) - 1)
    done, last = -(-start // ROWS), -(-stop // ROWS)
    y[done * ROWS : last * ROWS] = 0
    while done < last:
        number = done * ROWS // group
        end = min(last, (number + 1) * group // ROWS)
        begin = number * n_bytes * 8
        for first in range(U(0), U(columns), U(COLUMNS)):
            size = min(U(COLUMNS), U(columns) - first)
            for block in range(done, end):
                top = block * ROWS
                row = top - number * group
                _tile(packed, begin, rates, starts, shifts, even, first, size, row, group, mask, levels, words, tile)
                for r in range(U(min(ROWS, rows - top))):
                    at = U(top) + r
                    for t in range(U(tokens)):
                        total = np.float32(0)
                        for i in range(size):
                            total += tile[r, i] * x[t, first + i]
                        y[at, t] += total * scale[at]
        done = end
