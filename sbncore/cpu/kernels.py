"""The three kernels, each one pass over runs of places: sums, normalize, repair.

All arrays are flat; channels-first memory is (N, C, S), channels-last (N, S, C). A *row* is what the inner
loops run over: a run of one channel's map with that channel's coefficients as scalars, or all channels of
``tile`` consecutive places with the coefficients as arrays (each repeated ``tile`` times, so that a few
channels still make a long row). One source serves both; ``last`` and every array that may be missing are
None or not at compile time, which prunes the branches.

A row is ``m`` elements from ``o`` in all the arrays, its mask's bits from ``bit``; element i of it is
``load(x, o + i)``, which LLVM vectorizes, and costs no slice for each array and row.

Coefficients, in the type of the arithmetic: ``z = (x - shift) * scale + offset (+ residual)``. Here shift is
the mean rounded to that type and offset makes up for the rounding: at |mean|/std of 1e6 the folded form
``x * scale + offset`` loses 5 %.

Parallel: a task is a block of runs times a block of channels; every task writes places, or a row of the
partial sums, of its own. The blocks depend on the shape alone, so results do not depend on the threads.
Sums are float32 (float64 for float64) within a chunk of a row, float64 beyond.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
from numba import njit

from sbncore.cpu.elements import accumulate, at, load, peek, reload, room, signs, spread, store, zero


def jit(**options: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Compile lazily, without the GIL, cached where the cache can be written."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        try:
            return njit(cache=True, nogil=True, **options)(function)
        except RuntimeError:  # numba found no writable place
            warnings.warn("sbncore: no writable Numba cache, kernels compile anew", stacklevel=2)
            return njit(nogil=True, **options)(function)

    return decorate


# Sums may be reordered to fill vectors; everything else keeps its order, so that the backward's sign of z
# is the forward's, bit for bit.
REORDER = {"reassoc", "nsz"}
CHUNK = 2048  # elements that are summed in float32


@jit()
def preactivation(x, residual, o, i, shift, scale, offset):
    z = (load(x, o + i) - at(shift, i)) * at(scale, i) + at(offset, i)
    if residual is not None:
        z = z + load(residual, o + i)
    return z


@jit()
def open_gate(gate, mask, bit, count):
    """gate[i] is not 0 where the mask's bit is 1: a byte each, which the loops over elements vectorize."""
    whole = count // 8 if bit & 7 == 0 else 0
    for k in range(whole):
        spread(gate, 8 * k, mask[(bit >> 3) + k])
    for i in range(8 * whole, count):
        gate[i] = (mask[(bit + i) >> 3] >> ((bit + i) & 7)) & 1


@jit()
def gradient(dy, x, gate, k, o, i, shift, scale, offset, relu):
    """dy behind the activation; without a dy the deviation x - shift, whose sums are the moments."""
    if dy is None:
        return load(x, o + i) - at(shift, i)
    g = load(dy, o + i)
    if gate is not None:
        if peek(gate, k) == 0:
            g = zero(x)
    elif relu is not None:
        if preactivation(x, None, o, i, shift, scale, offset) <= 0:
            g = zero(x)
    return g


@jit(fastmath=REORDER)
def sums_row(totals, dx, dresidual, dy, x, mask, gate, bit, o, m, shift, scale, offset, relu):
    """Sums of g and g * (x - shift): returned, or added to totals where channels run along the row."""
    first, second = 0.0, 0.0
    for chunk in range(0, m, CHUNK):
        a, b = zero(x), zero(x)
        if mask is not None:
            open_gate(gate, mask, bit + chunk, min(CHUNK, m - chunk))
        for i in range(chunk, min(chunk + CHUNK, m)):
            g = gradient(dy, x, gate, i - chunk, o, i, shift, scale, offset, relu)
            product = g * (load(x, o + i) - at(shift, i))
            if dx is not None:
                store(dx, o + i, g * at(scale, i))
            if dresidual is not None:
                store(dresidual, o + i, g)
            if totals is None:
                a += g
                b += product
            else:
                accumulate(totals[0], i, g)
                accumulate(totals[1], i, product)
        first += a
        second += b
    return first, second


@jit()
def normalize_row(y, mask, x, residual, bit, o, m, shift, scale, offset, relu):
    for i in range(m):
        z = preactivation(x, residual, o, i, shift, scale, offset)
        if relu is not None:
            if z <= 0:  # not of a NaN, which passes
                z = zero(x)
        store(y, o + i, z)
    if mask is not None:
        for first in range(0, m - 7, 8):
            mask[(bit + first) >> 3] = signs(y, o + first)
        if m & 7:
            bits = np.uint8(0)
            for i in range(m & ~7, m):
                bits |= np.uint8(not reload(y, o + i) <= 0) << np.uint8(i & 7)
            mask[(bit + m) >> 3] = bits


@jit()
def repair_row(dx, dresidual, dy, x, mask, gate, bit, o, m, shift, scale, offset, k0, k1, p, relu):
    if mask is None:
        repair_chunk(dx, dresidual, dy, x, gate, 0, o, m, shift, scale, offset, k0, k1, p, relu)
    else:
        for chunk in range(0, m, CHUNK):
            end = min(chunk + CHUNK, m)
            open_gate(gate, mask, bit + chunk, end - chunk)
            repair_chunk(dx, dresidual, dy, x, gate, chunk, o, end, shift, scale, offset, k0, k1, p, relu)


@jit()
def repair_chunk(dx, dresidual, dy, x, gate, chunk, o, end, shift, scale, offset, k0, k1, p, relu):
    for i in range(chunk, end):
        g = gradient(dy, x, gate, i - chunk, o, i, shift, scale, offset, relu)
        through = at(k0, i) + (load(x, o + i) - at(shift, i)) * at(k1, i)
        store(dx, o + i, g * at(scale, i) - p * through)
        if dresidual is not None:
            store(dresidual, o + i, g)


@jit()
def block(count, blocks, t):
    """The t-th of nearly equal blocks of 0 .. count-1."""
    return count * t // blocks, count * (t + 1) // blocks


@jit()
def sums(
    partial, dx, dresidual, dy, x, mask, shift, scale, offset, begin, length, weight, relu,
    last, C, S, tile, blocks, channel_blocks, first_task, end_task,
):  # fmt: skip
    """partial[:, block] = weighted sums of g and g * (x - shift); dx = scale * g, dresidual = g where given.

    Reads dy and x, writes dx and dresidual, once, in the given runs. As ``g = x - shift`` (no dy), the sums
    are the first two moments about shift.
    """
    row_bits = 8 * ((C + 7) // 8 if last is not None else (S + 7) // 8)
    totals = np.zeros((2, tile * C), shift.dtype)
    gate = room(mask, CHUNK)
    for t in range(first_task, end_task):
        k = t // channel_blocks
        r0, r1 = block(len(begin), blocks, k)
        c0, c1 = block(C, channel_blocks, t % channel_blocks)
        for r in range(r0, r1):
            if last is None:
                n = begin[r] // S
                s = begin[r] - n * S
                for c in range(c0, c1):
                    row = n * C + c
                    a, b = sums_row(
                        None, dx, dresidual, dy, x, mask, gate, row * row_bits + s, row * S + s, length[r],
                        shift[c], scale[c], offset[c], relu,
                    )  # fmt: skip
                    partial[0, k, c] += weight[r] * a
                    partial[1, k, c] += weight[r] * b
            else:
                for p in range(0, length[r], tile):
                    row = begin[r] + p
                    sums_row(
                        (totals[0], totals[1]), dx, dresidual, dy, x, mask, gate, row * row_bits, row * C,
                        min(tile, length[r] - p) * C, shift, scale, offset, relu,
                    )  # fmt: skip
                for i in range(min(tile, length[r])):
                    for c in range(C):
                        partial[0, k, c] += weight[r] * totals[0, i * C + c]
                        partial[1, k, c] += weight[r] * totals[1, i * C + c]
                totals[:] = 0


@jit()
def normalize(
    y, mask, x, residual, shift, scale, offset, begin, length, relu,
    last, C, S, tile, blocks, channel_blocks, first_task, end_task,
):  # fmt: skip
    """y = act(z) in the given runs, and where a mask is given the bit of z > 0 (a row begins with a byte).

    Reads x and residual, writes y, once.
    """
    row_bits = 8 * ((C + 7) // 8 if last is not None else (S + 7) // 8)
    for t in range(first_task, end_task):
        r0, r1 = block(len(begin), blocks, t // channel_blocks)
        c0, c1 = block(C, channel_blocks, t % channel_blocks)
        for r in range(r0, r1):
            if last is None:
                n = begin[r] // S
                s = begin[r] - n * S
                for c in range(c0, c1):
                    row = n * C + c
                    normalize_row(
                        y, mask, x, residual, row * row_bits + s, row * S + s, length[r],
                        shift[c], scale[c], offset[c], relu,
                    )  # fmt: skip
            else:
                for p in range(0, length[r], tile):
                    row = begin[r] + p
                    normalize_row(
                        y, mask, x, residual, row * row_bits, row * C, min(tile, length[r] - p) * C,
                        shift, scale, offset, relu,
                    )  # fmt: skip


@jit()
def repair(
    dx, dresidual, dy, x, mask, shift, scale, offset, k0, k1, begin, length, weight, relu,
    last, C, S, tile, blocks, channel_blocks, first_task, end_task,
):  # fmt: skip
    """dx = scale * g - p * (k0 + k1 * (x - shift)) in the given runs; dresidual = g where given.

    Reads dy and x, writes dx and dresidual, once. k0 = scale * (dbias - (mean - shift) * rstd * dweight) and
    k1 = scale * rstd * dweight make the bracket of the exact gradient.
    """
    row_bits = 8 * ((C + 7) // 8 if last is not None else (S + 7) // 8)
    gate = room(mask, CHUNK)
    for t in range(first_task, end_task):
        r0, r1 = block(len(begin), blocks, t // channel_blocks)
        c0, c1 = block(C, channel_blocks, t % channel_blocks)
        for r in range(r0, r1):
            if last is None:
                n = begin[r] // S
                s = begin[r] - n * S
                for c in range(c0, c1):
                    row = n * C + c
                    repair_row(
                        dx, dresidual, dy, x, mask, gate, row * row_bits + s, row * S + s, length[r],
                        shift[c], scale[c], offset[c], k0[c], k1[c], weight[r], relu,
                    )  # fmt: skip
            else:
                for p in range(0, length[r], tile):
                    row = begin[r] + p
                    repair_row(
                        dx, dresidual, dy, x, mask, gate, row * row_bits, row * C,
                        min(tile, length[r] - p) * C, shift, scale, offset, k0, k1, weight[r], relu,
                    )  # fmt: skip
