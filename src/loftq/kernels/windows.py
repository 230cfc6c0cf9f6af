"""Compiled decoder of the trellis code: windows into packed strings of bits, looked up in the table of levels.

A group's string holds its columns one after the other. One read of eight bytes serves a column for sixteen rows where
their windows lie within 57 bits, and for eight rows at any rate. Values, ``levels[window] * scale`` in float32, are
exact to the bit.

Helpers are inlined by Numba itself, not by LLVM: the latter counts references to every array that it hands on, which
takes longer than to decode a column. Indices are unsigned, because Numba looks whether a signed one is negative.
"""

import numpy as np
from numba import njit

compiled = njit(nogil=True, cache=True)
inlined = njit(nogil=True, inline="always")
reassociating = njit(nogil=True, cache=True, fastmath={"reassoc", "contract", "nsz", "arcp"})

UNIT = 16  # weights that take as many bits as their rate says
COLUMNS = (
    1024  # decoded at a time: what they are decoded from stays in fast caches, and rows are written in long pieces
)
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
def _words(packed, begin, rates, starts, first, size, row, read, group, window, words):
    """The bits of a group, whose string begins at ``begin``, from ``row`` on, in ``size`` columns from ``first`` on."""
    for i in range(size):
        rate, bit = rates[first + i], begin + starts[first + i]
        at, n = (row * rate) // UNIT, (group * rate) // UNIT
        word = _read(packed, bit + at)
        if ((row + read - 1) * rate) // UNIT + window > n:  # the string is a circle
            word = (word & U((1 << (n - at)) - 1)) | _read(packed, bit) << U(n - at)
        words[i] = word


@inlined
def _levels(words, rates, shifts, even, first, size, place, levels, mask, s, out, at, begin):
    """One row's levels times ``s``, into row ``at`` of ``out`` from ``begin`` on. Of ``even`` rates shifts are even."""
    if even:
        shift = U(shifts[place, 0])
        for i in range(size):
            out[at, begin + i] = levels[(words[i] >> shift) & mask] * s
    else:
        for i in range(size):
            out[at, begin + i] = levels[(words[i] >> U(shifts[place, first + i])) & mask] * s
        for i in range(size):
            if rates[first + i] == 0:
                out[at, begin + i] = 0


@compiled
def decode(packed, n_bytes, rates, starts, shifts, read, even, group, window, levels, scale, out, start, stop):
    """Dense rows in float32. See :class:`loftq.kernels.trellis_cpu.Strings`."""
    rows, columns = out.shape
    words, mask = np.empty(COLUMNS, np.uint64), U(len(levels) - 1)
    done, last = -(-start // read), -(-stop // read)
    while done < last:  # the rows of one group after the other's
        number = done * read // group
        end = min(last, (number + 1) * group // read)
        begin = number * n_bytes * 8
        for first in range(U(0), U(columns), U(COLUMNS)):
            size = min(U(COLUMNS), U(columns) - first)
            for block in range(done, end):
                top = block * read
                row = top - number * group
                _words(packed, begin, rates, starts, first, size, row, read, group, window, words)
                for r in range(U(min(read, rows - top))):
                    at, place = U(top) + r, U(row % UNIT) + r
                    _levels(words, rates, shifts, even, first, size, place, levels, mask, scale[at], out, at, first)
        done = end


@compiled
def decode_bfloat16(packed, n_bytes, rates, starts, shifts, read, even, group, window, levels, scale, out, start, stop):
    """:func:`decode` as the bits of bfloat16, rounded to nearest, ties to even."""
    rows, columns = out.shape
    words, mask = np.empty(COLUMNS, np.uint64), U(len(levels) - 1)
    wide, none = np.empty((1, COLUMNS), np.float32), U(0)
    bits = wide.view(np.uint32)
    done, last = -(-start // read), -(-stop // read)
    while done < last:
        number = done * read // group
        end = min(last, (number + 1) * group // read)
        begin = number * n_bytes * 8
        for first in range(U(0), U(columns), U(COLUMNS)):
            size = min(U(COLUMNS), U(columns) - first)
            for block in range(done, end):
                top = block * read
                row = top - number * group
                _words(packed, begin, rates, starts, first, size, row, read, group, window, words)
                for r in range(U(min(read, rows - top))):
                    at, place = U(top) + r, U(row % UNIT) + r
                    _levels(words, rates, shifts, even, first, size, place, levels, mask, scale[at], wide, none, none)
                    for i in range(size):
                        word = bits[0, i]
                        rounded = word + np.uint32(0x7FFF) + ((word >> np.uint32(16)) & np.uint32(1))
                        out[at, first + i] = rounded >> np.uint32(16)
        done = end


@reassociating
def product(packed, n_bytes, rates, starts, shifts, read, even, group, window, levels, scale, x, y, start, stop):
    """Some rows of ``y = W x``; ``x`` is (tokens, in), ``y`` (out, tokens)."""
    (tokens, columns), rows = x.shape, len(y)
    words, mask = np.empty(COLUMNS, np.uint64), U(len(levels) - 1)
    values, none = np.empty((1, COLUMNS), np.float32), U(0)
    done, last = -(-start // read), -(-stop // read)
    y[done * read : last * read] = 0
    while done < last:
        number = done * read // group
        end = min(last, (number + 1) * group // read)
        begin = number * n_bytes * 8
        for first in range(U(0), U(columns), U(COLUMNS)):
            size = min(U(COLUMNS), U(columns) - first)
            for block in range(done, end):
                top = block * read
                row = top - number * group
                _words(packed, begin, rates, starts, first, size, row, read, group, window, words)
                for r in range(U(min(read, rows - top))):
                    at, place = U(top) + r, U(row % UNIT) + r
                    _levels(words, rates, shifts, even, first, size, place, levels, mask, scale[at], values, none, none)
                    for t in range(U(tokens)):
                        total = np.float32(0)
                        for i in range(size):
                            total += values[0, i] * x[t, first + i]
                        y[at, t] += total
        done = end
