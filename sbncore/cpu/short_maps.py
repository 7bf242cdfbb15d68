"""The kernels over channels-first memory of maps of fewer than 16 positions: a call is at once, by blocks.

A sample's maps of a block are one row, with the coefficients spelled out for each of its elements.
"""

from __future__ import annotations

import numpy as np

from sbncore.cpu.channels import (
    clear,
    find_slopes,
    finish_backward,
    finish_forward,
    finish_moments,
    shift_of,
    spots_of,
)
from sbncore.cpu.compiled import jit, loop
from sbncore.cpu.counters import FIRST
from sbncore.cpu.elements import cast, sample_of, zero
from sbncore.cpu.lanes import LANES
from sbncore.cpu.passes import add_run, flush, mask_bytes
from sbncore.cpu.rows import add_row, normalize_row, repair_row, sum_of
from sbncore.cpu.stores import aligned, fence
from sbncore.cpu.tasks import claim

FLUSH = 256  # values that are summed in float32


@jit()
def forward(
    y, mask, x, residual, values, parameters, partial, begin, length, weight, weigh, full, relu, stream, N, C,
    S, block, sweep, spread, cached, counters,
):  # fmt: skip
    """As `sbncore.cpu.channels_first.forward`, of blocks alone."""
    if y is not None:
        stream = stream and aligned(y)
    sums, lanes = np.empty((2, block)), np.full((2, block * LANES), zero(x))
    rows = np.full((3, block * S), zero(x))
    shift, scale, offset = rows[0], rows[1], rows[2]
    spots = spots_of(begin, length, C, S, False)
    while True:
        c0 = claim(counters, FIRST) * block
        if c0 >= C:
            break
        c1 = min(C, c0 + block)
        clear(sums)
        if len(begin) > 0:
            for c in range(c0, c1):
                values[3, c] = shift_of(x, spots, c * S)
            spell(shift, values[3], c0, c1, S)
            add_runs(
                sums, lanes, None, x, None, values, shift, None, None, begin, length, weight, weigh, None, c0,
                c1, C, S,
            )  # fmt: skip
        finish_moments(values, sums, c0, c1)
        finish_forward(values, x, parameters, c0, c1)
        if y is not None:
            for k in range(3):
                spell(rows[k], values[3 + k], c0, c1, S)
            for n in range(N):
                normalize_row(
                    sample_of(y, n, C * S), sample_of(mask, n, mask_bytes(C, S)), sample_of(x, n, C * S),
                    sample_of(residual, n, C * S), c0 * S, c1 * S, shift, scale, offset, relu, stream,
                    C * S,
                )  # fmt: skip
    if stream:
        fence()


@loop()
def spell(row, values, c0, c1, S):
    """row = a block's values, each S times over."""
    for c in range(c0, c1):
        for i in range((c - c0) * S, (c - c0 + 1) * S):
            row[i] = values[c]


@loop()
def add_runs(
    sums, lanes, dy, x, mask, values, shift, scale, offset, begin, length, weight, times, relu, c0, c1, C, S
):  # fmt: skip
    """Add the sums of g and g * (x - shift) over the runs, each times its weight and ``times``."""
    held = 0  # runs not yet in sums
    for r in range(len(begin)):
        n, p, whole = begin[r] // S, weight[r] * times, length[r] == S
        source, upper = sample_of(x, n, C * S), sample_of(dy, n, C * S)
        bits = sample_of(mask, n, mask_bytes(C, S))
        held += 1
        last = held == FLUSH or r == len(begin) - 1
        last = last or weight[r + 1] != weight[r] or length[r + 1] != length[r]
        if whole:
            add_row(
                (lanes[0], lanes[1]), None, None, upper, source, bits, c0 * S, c1 * S, shift, scale, offset,
                relu, False, C * S,
            )  # fmt: skip
        else:
            add_run(lanes, upper, source, bits, values, begin[r] - n * S, length[r], c0, c1, relu, S)
        if last:
            held = 0
            if whole:
                flush_rows(sums, lanes, p, c1 - c0, S)
            else:
                flush(sums, lanes, p, c1 - c0)


@loop()
def flush_rows(sums, totals, p, channels, S):
    """Add p times the totals of every channel's S elements to its sums, and begin anew."""
    for k in range(2):
        for c in range(channels):
            sums[k, c] += p * sum_of(totals[k], c * S, (c + 1) * S)
            for i in range(c * S, (c + 1) * S):
                totals[k, i] = 0


@jit()
def backward(
    dx, dresidual, dy, x, mask, values, total, partial, dweight, dbias, begin, length, weight, scale, full,
    repairs, relu, sampled, stream, N, C, S, block, sweep, spread, cached, counters,
):  # fmt: skip
    """As `sbncore.cpu.channels_first.backward`; sums given in ``total``, all of dx is written anew."""
    writes = dx is not None or dresidual is not None
    if writes:
        stream = stream and aligned(dx) and aligned(dresidual)
    sums, slopes, lanes = np.empty((2, block)), np.empty((2, block)), np.full((2, block * LANES), zero(x))
    rows = np.full((6, block * S), zero(x))
    shift, times, offset, k0, k1, p = rows[0], rows[1], rows[2], rows[3], rows[4], rows[5]
    while True:
        c0 = claim(counters, FIRST) * block
        if c0 >= C:
            break
        c1 = min(C, c0 + block)
        clear(sums)
        for k in range(3):
            spell(rows[k], values[3 + k], c0, c1, S)
        if sampled is not None:
            add_runs(
                sums, lanes, dy, x, mask, values, shift, times, offset, begin, length, weight, scale, relu,
                c0, c1, C, S,
            )  # fmt: skip
        elif scale >= 0:
            for n in range(N):
                add_row(
                    (lanes[0], lanes[1]), None, None, sample_of(dy, n, C * S), sample_of(x, n, C * S),
                    sample_of(mask, n, mask_bytes(C, S)), c0 * S, c1 * S, shift, times, offset, relu, False,
                    C * S,
                )  # fmt: skip
                if n == N - 1 or n % FLUSH == FLUSH - 1:
                    flush_rows(sums, lanes, 1.0, c1 - c0, S)
        if scale >= 0:
            finish_backward(total, sums, values, dweight, dbias, c0, c1)
        if not writes:
            continue
        find_slopes(slopes, total, values, 1.0, c0, c1)
        spell(k0, slopes[0], 0, c1 - c0, S)
        spell(k1, slopes[1], 0, c1 - c0, S)
        r = 0
        for n in range(N):
            r = spell_weights(p, begin, length, weight, r if repairs else len(begin), n, c1 - c0, S)
            repair_row(
                sample_of(dx, n, C * S), sample_of(dresidual, n, C * S), sample_of(dy, n, C * S),
                sample_of(x, n, C * S), sample_of(mask, n, mask_bytes(C, S)), c0 * S, c1 * S, shift, times,
                offset, k0, k1, p, relu, stream, C * S,
            )  # fmt: skip
    if stream and writes:
        fence()


@loop()
def spell_weights(row, begin, length, weight, r, n, channels, S):
    """row = p of sample n for every element of a segment, from run r on; return the next sample's first."""
    for i in range(len(row)):
        row[i] = 0
    while r < len(begin) and begin[r] < (n + 1) * S:
        p = cast(row, weight[r])
        for c in range(channels):
            first = c * S + begin[r] - n * S
            for i in range(first, first + length[r]):
                row[i] = p
        r += 1
    return r
