"""Compiled decoder of the trellis code: windows into packed strings of bits, looked up in the table of levels.

A group's string holds its columns one after the other. One read of eight bytes serves a column for sixteen rows where
their windows lie within 57 bits, and for eight rows at any rate. Values, ``levels[window] * scale`` in float32, are
exact to the bit.

Helpers are inlined by Numba itself, not by LLVM: the latter counts references to every array that it hands on, which
takes longer than to decode a column. Indices are unsigned, because Numba looks whether a signed one is negative.
"""

import functools
from collections.abc import Callable

import numpy as np
from numba import njit

from loftq.kernels.vectors import (
    LANES,
    add_products,
    add_scaled,
    add_totals,
    bits_at,
    multiply,
    spread,
    store,
    take,
    zeros,
)

compiled = njit(nogil=True, cache=True)
inlined = njit(nogil=True, inline="always")

UNIT = 16  # weights that take as many bits as their rate says
COLUMNS = 2048  # decoded at a time: their words stay in fast caches, and rows are written in long pieces
READ, LEAST = 57, 8  # bits that one read has for certain; bytes that there must be to read from
U = np.uint64


@inlined
def _read(packed, bit):
    """:data:`READ` bits or more, from any bit on; zeros behind the end of the memory, which has
    :data:`LEAST` bytes or more."""
    at = min(bit >> U(3), U(packed.size - LEAST))
    return bits_at(packed, at) >> (bit - (at << U(3)))


@inlined
def _words(packed, begin, rates, starts, even, first, size, row, read, group, window, words):
    """The bits of a group, whose string begins at ``begin``, from ``row`` on, in ``size`` columns from ``first`` on."""
    same = U(rates[0])
    for i in range(size):
        rate, bit = same if even else U(rates[first + i]), U(begin) + U(starts[first + i])
        at, n = (U(row) * rate) >> U(4), (U(group) * rate) >> U(4)
        word = _read(packed, bit + at)
        if ((U(row + read - 1) * rate) >> U(4)) + U(window) > n:  # the string is a circle
            word = (word & ((U(1) << (n - at)) - U(1))) | _read(packed, bit) << (n - at)
        words[i] = word


@inlined
def _indices(words, shifts, absent, even, first, size, place, mask, indices):
    """One row's windows, as places in the table. Of ``even`` rates shifts are even."""
    if even:
        shift = U(shifts[place, 0])
        for i in range(size):
            indices[i] = np.uint16((words[i] >> shift) & mask)
    else:
        for i in range(size):
            indices[i] = np.uint16((words[i] >> U(shifts[place, first + i])) & mask) | absent[first + i]


@functools.cache
def kernel(few: int) -> Callable:
    """Some rows of the dense weight in float32 or as the bits of bfloat16, or of its products with ``few`` tokens."""

    @compiled
    def decode(
        packed, n_bytes, rates, starts, shifts, absent, read, even, group, window, table, scale, x, out, start, stop
    ):
        """With ``x``, (few, in), ``out`` is (few, out). The rest is in :class:`loftq.kernels.trellis_cpu.Strings`."""
        rows, columns, mask = U(len(scale)), U(len(rates)), U((1 << window) - 1)
        words, indices = np.empty(COLUMNS, np.uint64), np.empty(COLUMNS, np.uint16)
        done, last = -(-start // read), -(-stop // read)
        if x is not None:
            out[:, done * read : last * read] = 0
        while done < last:  # the rows of one group after the other's
            number = done * read // group
            end = min(last, (number + 1) * group // read)
            begin = number * n_bytes * 8
            for first in range(U(0), columns, U(COLUMNS)):
                size = min(U(COLUMNS), columns - first)
                whole = size // U(LANES) * U(LANES)
                for block in range(done, end):
                    row = block * read - number * group
                    _words(packed, begin, rates, starts, even, first, size, row, read, group, window, words)
                    for r in range(U(min(read, len(scale) - block * read))):
                        at, place = U(block * read) + r, U(row % UNIT) + r
                        _indices(words, shifts, absent, even, first, size, place, mask, indices)
                        s = scale[at]
                        if x is None:
                            for i in range(U(0), whole, U(LANES)):
                                values = multiply(take(table, indices, i), spread(s))
                                store(out, at * columns + first + i, values)
                            for i in range(whole, size):
                                store(out, at * columns + first + i, table[indices[i]] * s)
                        else:
                            sums = zeros(few)
                            for i in range(U(0), whole, U(LANES)):
                                sums = add_products(sums, take(table, indices, i), x, first + i, columns)
                            add_totals(out, at, rows, add_scaled(zeros(few), sums, spread(s)))
                            for i in range(whole, size):
                                for t in range(few):
                                    out[t, at] += table[indices[i]] * s * x[t, first + i]
            done = end

    return decode
