"""Compiled Viterbi search for the trellis code: the path of least squared error through each circular sequence.

A sequence is one column of a group of rows. Its windows ``w[j]`` of L bits overlap: from row ``j`` to ``j + 1`` the
lowest ``k[j]`` bits leave and as many new ones come in at the top. Going from the last row to the first, the least
error of all rows from ``j`` on depends on ``L - k[j - 1]`` bits only::

    least[j][low] = min over new of (x[j] - scale[j] levels[w])² + least[j + 1][w >> k[j]]
    w = new 2^(L - k[j - 1]) + low

All of them are kept, and the way forward computes its few choices once more, which is cheaper than to keep them. In
:func:`_step` the minimum over ``new`` is unrolled, because its length is a constant where it is compiled, and windows
that are neighbours in memory are worked on at once: ten times as fast as a plain loop.
"""

import numpy as np
from numba import njit

from loftq.numerics.trellis import SEAM

FAST = {"contract", "nsz", "nnan", "reassoc"}  # not ninf: a state that cannot be reached costs infinity
compiled = njit(nogil=True, cache=True, fastmath=FAST)
inlined = njit(nogil=True, cache=True, fastmath=FAST, forceinline=True)
exact = njit(nogil=True, cache=True)

INFINITE = np.float32(np.inf)
TINY = np.finfo(np.float32).tiny
U = np.uint64  # for a signed index Numba looks whether it is negative, and then loops are not vectorised


@compiled
def encode(target, scale, rates, levels, window, group, earlier, codes, start, stop):
    """Windows of the sequences ``start`` to ``stop``; all of a group's columns come before the next group's.

    Args:
        target: float32 (out, in).
        scale: float32 (out,).
        rates: uint8 (in,), sixteenths of a bit a weight. A column of rate 0 gets the window 0.
        levels: float32 (2^window,).
        group: rows of a group; the last group may have fewer in ``target``.
        earlier: int16 (out, in), windows that are kept where they are better than those found; or no elements.
        codes: int16 (out, in), takes the windows. It may be ``earlier``.
    """
    rows, columns = target.shape
    x, s = np.zeros(group, np.float32), np.zeros(group, np.float32)
    shifts, path = np.empty(group, np.int64), np.empty(group, np.int64)
    slowest = np.uint8(255)
    for rate in rates:
        slowest = min(slowest, rate) if rate else slowest
    least = np.empty((group + 1, 1 << max(0, window - slowest // 16)), np.float32)
    for q in range(start, stop):
        first, i = q // columns * group, q % columns
        count = min(group, rows - first)
        if rates[i] == 0:
            for j in range(count):
                codes[first + j, i] = 0
            continue
        largest = np.float32(TINY)
        for j in range(group):
            s[j] = scale[first + j] if j < count else 0
            largest = max(largest, abs(s[j]))
        for j in range(group):
            x[j] = target[first + j, i] / largest if j < count else 0
            s[j] /= largest
        _shifts(np.int64(rates[i]), shifts)
        seam = _seam(x, s, shifts, levels, window, least, path)
        least[group, :] = INFINITE
        least[group, seam] = 0
        _backward(x, s, shifts, levels, window, group - 1, group, least)
        _forward(x, s, shifts, levels, window, 0, group, least, seam, path)
        if earlier.size:
            found, before = 0.0, 0.0
            for j in range(count):
                a, b = target[first + j, i], np.float64(scale[first + j])
                found += (a - b * levels[path[j]]) ** 2
                before += (a - b * levels[earlier[first + j, i]]) ** 2
            if before <= found:
                for j in range(count):
                    path[j] = earlier[first + j, i]
        for j in range(count):
            codes[first + j, i] = path[j]


@compiled
def _shifts(rate, shifts):
    """How many bits further the next row's window begins; the last row's next is the first."""
    for j in range(len(shifts)):
        at, after = j % 16 * rate // 16, (j % 16 + 1) * rate // 16
        shifts[j] = after - at


@compiled
def _seam(x, s, shifts, levels, window, least, path):
    """The bits that the last row's window shares with the first's, by a search around them with free ends."""
    near = min(SEAM, len(x) // 2)
    least[2 * near, :] = 0
    _backward(x, s, shifts, levels, window, near - 1, 2 * near, least)
    first = len(x) - near
    states = least[0, : 1 << (window - shifts[first - 1])]
    return _forward(x, s, shifts, levels, window, first, near, least, np.argmin(states), path)


@compiled
def _backward(x, s, shifts, levels, window, last, steps, least):
    """Fill ``least[steps - 1]`` to ``least[0]`` from ``least[steps]``, for the rows that end with ``last``."""
    for t in range(steps - 1, -1, -1):
        j = (last - (steps - 1 - t)) % len(x)
        k, new = shifts[j], shifts[j - 1]
        room, after, before = U(1) << U(window - new - k), least[t + 1], least[t]
        if k == 0:
            if new == 0:
                _step(after, levels, x[j], s[j], before, room, 1, 0)
            else:
                _step(after, levels, x[j], s[j], before, room, 1, 1)
        elif k == 1:
            if new == 0:
                _step(after, levels, x[j], s[j], before, room, 2, 0)
            elif new == 1:
                _step(after, levels, x[j], s[j], before, room, 2, 1)
            else:
                _step(after, levels, x[j], s[j], before, room, 2, 2)
        elif k == 2:
            if new == 1:
                _step(after, levels, x[j], s[j], before, room, U(4), 1)
            elif new == 2:
                _step(after, levels, x[j], s[j], before, room, U(4), 2)
            else:
                _step(after, levels, x[j], s[j], before, room, U(4), 3)
        elif k == 3:
            if new == 2:
                _step(after, levels, x[j], s[j], before, room, U(8), 2)
            elif new == 3:
                _step(after, levels, x[j], s[j], before, room, U(8), 3)
            else:
                _step(after, levels, x[j], s[j], before, room, U(8), 4)
        elif new == 3:
            _step(after, levels, x[j], s[j], before, room, U(16), 3)
        else:
            _step(after, levels, x[j], s[j], before, room, U(16), 4)


@inlined
def _step(after, levels, x, s, least, room, wide, new):
    """One row's minima. The window is ``(choice, place, low)``; the states after it are ``(choice, place)``.

    ``wide``, the number of ``low``, and ``new`` are constants where this is inlined. LLVM vectorises along ``place``
    for one or two, and along ``low`` for more, where it sees their number as unsigned.
    """
    for place in range(room):
        for low in range(U(wide)):
            best = INFINITE
            for choice in range(U(1) << U(new)):
                state = choice * room + place
                difference = x - s * levels[state * U(wide) + low]
                best = min(best, difference * difference + after[state])
            least[place * U(wide) + low] = best


@compiled
def _forward(x, s, shifts, levels, window, first, steps, least, state, path):
    """The best way on from ``state`` before row ``first``, and the state behind it. The lowest of equal choices."""
    for t in range(steps):
        j = first + t
        k, new = shifts[j], shifts[j - 1]
        best, chosen = INFINITE, state
        for choice in range(1 << new):
            w = (choice << (window - new)) | state
            difference = x[j] - s[j] * levels[w]
            cost = difference * difference + least[t + 1, w >> k]
            if cost < best:
                best, chosen = cost, w
        path[j], state = chosen, chosen >> k
    return state


@compiled
def sums(target, codes, rates, levels, out, start, stop):
    """``<target, level>`` and ``<level, level>`` of some rows, in float64, into ``out[0]`` and ``out[1]``."""
    for i in range(start, stop):
        cross, square = 0.0, 0.0
        for j in range(target.shape[1]):
            if rates[j]:
                level = np.float64(levels[codes[i, j]])
                cross += target[i, j] * level
                square += level * level
        out[0, i, 0], out[1, i, 0] = cross, square


@exact
def residual(weight, codes, rates, levels, scale, out, start, stop):
    """``weight - level * scale`` of some rows, each rounded to float32 in turn."""
    for i in range(start, stop):
        for j in range(weight.shape[1]):
            value = levels[codes[i, j]] * scale[i] if rates[j] else np.float32(0)
            out[i, j] = weight[i, j] - value
