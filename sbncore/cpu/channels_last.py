"""The kernels over channels-last memory, (N, S, C): each one pass over runs of places.

A row is all channels of ``tile`` consecutive places, with coefficients repeated ``tile`` times, so that a few
channels still make a long row. A task is a block of the runs and writes places, or a row of the partial sums,
of its own; the blocks depend on the shape alone, so results do not depend on the threads. Sums are float32
(float64 for float64) within a run, float64 beyond. A mask's bit e is element e's; the rows that write it
begin at whole words.
"""

from __future__ import annotations

import numpy as np

from sbncore.cpu.compiled import jit
from sbncore.cpu.lanes import aligned, claim, fence
from sbncore.cpu.rows import add_row, normalize_row, repair_row


@jit()
def block(count, blocks, t):
    """The t-th of nearly equal blocks of 0 .. count-1."""
    return count * t // blocks, count * (t + 1) // blocks


@jit()
def sums(
    partial, dx, dresidual, dy, x, mask, shift, scale, offset, begin, length, weight, relu, stream, C, tile,
    tasks, counter,
):  # fmt: skip
    """partial[:, task] = weighted sums of g and g * (x - shift); dx = scale * g, dresidual = g where given.

    Reads dy and x, writes dx and dresidual (past the caches if ``stream``), once, in the given runs. As
    ``g = x - shift`` (no dy), the sums are the first two moments about shift.
    """
    writes = dx is not None or dresidual is not None
    stream = stream and aligned(dx) and aligned(dresidual)
    totals = np.zeros((2, tile * C), shift.dtype)
    both = totals[0], totals[1]
    while True:
        t = claim(counter)
        if t >= tasks:
            break
        r0, r1 = block(len(begin), tasks, t)
        for r in range(r0, r1):
            for p in range(0, length[r], tile):
                row = begin[r] + p
                o, m = row * C, min(tile, length[r] - p) * C
                add_row(both, dy, x, mask, 0, o, o + m, shift, scale, offset, relu, m)
                if writes:
                    repair_row(
                        dx, dresidual, dy, x, mask, 0, o, o + m, shift, scale, offset, None, None, None, relu,
                        stream, 0,
                    )  # fmt: skip
            for i in range(min(tile, length[r])):
                for c in range(C):
                    partial[0, t, c] += weight[r] * totals[0, i * C + c]
                    partial[1, t, c] += weight[r] * totals[1, i * C + c]
            totals[:] = 0
    if stream and writes:
        fence()


@jit()
def normalize(
    y, mask, x, residual, shift, scale, offset, begin, length, relu, stream, C, tile, tasks, counter
):  # fmt: skip
    """y = act(z) in the given runs, and where a mask is given the bits of z > 0.

    Reads x and residual, writes y, once.
    """
    stream = stream and aligned(y)
    while True:
        t = claim(counter)
        if t >= tasks:
            break
        r0, r1 = block(len(begin), tasks, t)
        for r in range(r0, r1):
            for p in range(0, length[r], tile):
                row = begin[r] + p
                o, m = row * C, min(tile, length[r] - p) * C
                normalize_row(y, mask, x, residual, 0, o, o + m, shift, scale, offset, relu, stream, m)
    if stream:
        fence()


@jit()
def repair(
    dx, dresidual, dy, x, mask, shift, scale, offset, k0, k1, begin, length, weight, relu, stream, C, tile,
    tasks, counter,
):  # fmt: skip
    """dx = scale * g - p * (k0 + k1 * (x - shift)) in the given runs; dresidual = g where given.

    Reads dy and x, writes dx and dresidual, once. k0 = scale * (dbias - (mean - shift) * rstd * dweight) and
    k1 = scale * rstd * dweight make the bracket of the exact gradient.
    """
    stream = stream and aligned(dx) and aligned(dresidual)
    while True:
        t = claim(counter)
        if t >= tasks:
            break
        r0, r1 = block(len(begin), tasks, t)
        for r in range(r0, r1):
            for p in range(0, length[r], tile):
                row = begin[r] + p
                o, m = row * C, min(tile, length[r] - p) * C
                repair_row(
                    dx, dresidual, dy, x, mask, 0, o, o + m, shift, scale, offset, k0, k1, weight[r], relu,
                    stream, m,
                )  # fmt: skip
    if stream:
        fence()
