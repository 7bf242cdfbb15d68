"""The kernels over channels-first memory, (N, C, S): a whole call in one pass over blocks of channels.

Nothing crosses channels, so a task is a block of them: moments, what is between, and the passes that write,
while the block is still in a cache. So even full batch normalization reads memory once. The blocks depend on
the shape alone, and all sums of a channel are one task's: results do not depend on the threads.

A *segment* is one sample's maps of a block. Where maps are ``short`` it is one row, with the coefficients
spelled out for each of its elements; else each map is a row of its own. ``short`` is None or True.
"""

from __future__ import annotations

import numpy as np

from sbncore.cpu.channels import (
    finish_backward,
    finish_forward,
    finish_moments,
    shift_of,
    slopes_of,
    spots_of,
)
from sbncore.cpu.compiled import jit
from sbncore.cpu.elements import cast, zero
from sbncore.cpu.lanes import LANES, aligned, claim, fence, load_lanes, store_lanes
from sbncore.cpu.rows import add_row, normalize_row, repair_row, sum_of, sums_row, sums_vector

FLUSH = 64  # samples that are summed in float32
AHEAD = 128  # elements: how long before they are summed scattered runs are fetched
WORTH = 100  # elements of short maps that are read twice in the time that the repair of one run takes


@jit()
def sample_words(C, S):
    """How many words of a mask a sample has: maps share none."""
    return C * S // LANES + 2 * C * ((S % LANES + LANES - 1) // LANES)


@jit()
def words_at(n, c, C, S):
    """What w is in a mask's row that begins with channel c."""
    more = 2 * c if S % LANES else 0
    return n * sample_words(C, S) + more - (n * C * S >> 4)


@jit()
def spell(rows, k, values, c0, c1, S):
    """rows[k] = a block's values, each S times over."""
    for c in range(c0, c1):
        rows[k, (c - c0) * S : (c - c0 + 1) * S] = values[c]


@jit()
def rows_of(short, x, size):
    """Room for what is spelled out: 3 coefficients, the 2 slopes, 2 rows of sums, and p."""
    return np.full((8, 0 if short is None else size), zero(x))


@jit()
def forward(
    y, mask, x, residual, values, parameters, begin, length, weight, weigh, relu, short, stream, N, C, S,
    group, counter,
):  # fmt: skip
    """y = act(z), where a mask is given the bits of z > 0; the statistics in values and the running ones.

    The statistics are of the runs, whose weights sum to 1 / ``weigh``; without runs they are the prior's.
    Without a y nothing is normalized.
    """
    if y is not None:
        stream = stream and aligned(y)
    spelled = rows_of(short, x, group * S)
    while True:
        c0 = claim(counter) * group
        if c0 >= C:
            break
        c1 = min(C, c0 + group)
        values[:2, c0:c1] = 0
        if len(begin) > 0:
            draw_moments(values, spelled, x, begin, length, weight, weigh, short, C, S, c0, c1)
        finish_forward(values, x, parameters, c0, c1)
        if y is not None:
            if short is not None:
                for k in range(3):
                    spell(spelled, k, values[3 + k], c0, c1, S)
            for n in range(N):
                if short is not None:
                    o, m = (n * C + c0) * S, (c1 - c0) * S
                    normalize_row(
                        y, mask, x, residual, words_at(n, c0, C, S), o, o + m, spelled[0, :m],
                        spelled[1, :m], spelled[2, :m], relu, stream, C * S,
                    )  # fmt: skip
                else:
                    for c in range(c0, c1):
                        o = (n * C + c) * S
                        normalize_row(
                            y, mask, x, residual, words_at(n, c, C, S), o, o + S, cast(x, values[3, c]),
                            cast(x, values[4, c]), cast(x, values[5, c]), relu, stream, C * S,
                        )  # fmt: skip
    if stream:
        fence()


@jit()
def draw_moments(values, spelled, x, begin, length, weight, weigh, short, C, S, c0, c1):
    """values[0], values[1] = mean and var of the runs' places, about a shift of the block's own."""
    shift, m = np.empty(c1 - c0), (c1 - c0) * S
    partial = np.zeros((2, 1, c1 - c0))
    spots = spots_of(begin, length, C, S, False)
    for c in range(c0, c1):
        shift[c - c0] = shift_of(x, spots, c * S)
    if short is not None:
        spell(spelled, 0, shift, 0, c1 - c0, S)
    totals, held = spelled[5:7], 0  # whole samples, that are not yet in partial
    for r in range(len(begin)):
        n = begin[r] // S
        p = weight[r] * weigh
        whole, ahead = length[r] == S, S * (1 + AHEAD // length[r])
        if short is not None and (whole or length[r] < LANES <= S):
            size = S if whole else LANES  # of a channel's totals
            if whole:
                o = (n * C + c0) * S
                add_row(
                    (totals[0], totals[1]), None, x, None, 0, o, o + m, spelled[0, :m], None, None, None,
                    C * S,
                )  # fmt: skip
            else:
                add_places(totals, x, begin[r] + (n * (C - 1) + c0) * S, length[r], shift, ahead, S)
            held += 1
            if held == FLUSH or r == len(begin) - 1 or weight[r + 1] != weight[r] or (
                length[r + 1] < S if whole else length[r + 1] >= LANES
            ):
                flush(partial, totals, p, c1 - c0, size)
                held = 0
            continue
        for c in range(c0, c1):
            o = begin[r] + (n * (C - 1) + c) * S
            a, b = sums_row(
                None, None, None, x, None, 0, o, o + length[r], cast(x, shift[c - c0]), zero(x), zero(x),
                None, False, ahead,
            )  # fmt: skip
            partial[0, 0, c - c0] += p * a
            partial[1, 0, c - c0] += p * b
    finish_moments(values[:, c0:c1], partial, shift)


@jit()
def add_places(totals, x, o, length, shift, ahead, S):
    """Add a few places of every channel to a vector of totals each: sums of each alone take twice as long."""
    first, second, keep = totals[0], totals[1], (0, length)
    for c in range(len(shift)):
        i = c * LANES
        g, product = sums_vector(
            None, None, None, x, None, o + c * S, 0, cast(x, shift[c]), None, None, None, False, ahead, keep
        )
        store_lanes(first, i, load_lanes(first, i, None) + g, None, None)
        store_lanes(second, i, load_lanes(second, i, None) + product, None, None)


@jit()
def backward(
    dx, dresidual, dy, x, mask, values, total, dweight, dbias, begin, length, weight, scale, full, repairs,
    relu, short, stream, N, C, S, group, counter,
):  # fmt: skip
    """dx = scale * g - p * (k0 + k1 * (x - shift)), where p is not 0 only in the runs; dresidual = g.

    The two sums, dbias and dweight, are over everything, or if ``scale`` is above 0 over the runs, times it.
    If it is below 0 they are given in ``total``, and nothing but dx in the runs is written. ``repairs``
    says whether a gradient flows through the statistics, ``full`` whether the runs are everything.
    """
    if dx is not None or dresidual is not None:
        stream = stream and aligned(dx) and aligned(dresidual)
    writes = (dx is not None or dresidual is not None) and scale >= 0
    # all is written in a second pass, which finds the block in a cache
    dense = repairs and writes and (full or (short is not None and N * S < WORTH * len(begin)))
    sums = np.zeros((2, 1, group))
    spelled = rows_of(short, x, group * S)
    totals = spelled[5:7]
    while True:
        c0 = claim(counter) * group
        if c0 >= C:
            break
        c1 = min(C, c0 + group)
        m = (c1 - c0) * S
        sums[:] = 0
        if short is not None:
            for k in range(3):
                spell(spelled, k, values[3 + k], c0, c1, S)
        if scale > 0:
            for r in range(len(begin)):
                add_segment(
                    sums, None, None, dy, x, mask, values, begin[r], length[r], c0, c1, scale * weight[r],
                    relu, short, False, C, S,
                )  # fmt: skip
        for n in range(N if scale == 0 or (writes and not dense) else 0):
            if scale == 0 and short is not None:
                o = (n * C + c0) * S
                add_row(
                    (totals[0], totals[1]), dy, x, mask, words_at(n, c0, C, S), o, o + m,
                    spelled[0, :m], spelled[1, :m], spelled[2, :m], relu, C * S,
                )  # fmt: skip
                if n == N - 1 or n % FLUSH == FLUSH - 1:
                    flush(sums, totals, 1.0, c1 - c0, S)
            if scale == 0 and short is None:
                if writes and not dense:
                    add_segment(
                        sums, dx, dresidual, dy, x, mask, values, n * S, S, c0, c1, 1.0, relu, short,
                        stream, C, S,
                    )  # fmt: skip
                else:
                    add_segment(
                        sums, None, None, dy, x, mask, values, n * S, S, c0, c1, 1.0, relu, short, False, C,
                        S,
                    )  # fmt: skip
            elif writes and not dense:
                write_segment(
                    dx, dresidual, dy, x, mask, values, spelled, n, c0, c1, None, None, relu, short, stream,
                    C, S,
                )  # fmt: skip
        if scale >= 0:
            finish_backward(total, sums, values, dweight, dbias, c0, c1)
        if repairs:
            slopes = slopes_of(total, values, c0, c1)
            if dense:
                r = 0
                if short is not None:
                    for k in range(2):
                        spell(spelled, 3 + k, slopes[k], 0, c1 - c0, S)
                    spelled[7, :m] = weight[0] if full else 0
                for n in range(N):
                    if short is not None and not full:
                        r = spell_weights(spelled[7, :m], begin, length, weight, r, n, c1 - c0, S)
                    write_segment(
                        dx, dresidual, dy, x, mask, values, spelled, n, c0, c1, slopes, cast(x, weight[0]),
                        relu, short, stream, C, S,
                    )  # fmt: skip
            else:
                for r in range(len(begin)):
                    n = begin[r] // S
                    for c in range(c0, c1):
                        o = begin[r] + (n * (C - 1) + c) * S
                        repair_row(
                            dx, None, dy, x, mask, words_at(n, c if short is None else c0, C, S), o,
                            o + length[r], cast(x, values[3, c]), cast(x, values[4, c]),
                            cast(x, values[5, c]), cast(x, slopes[0, c - c0]), cast(x, slopes[1, c - c0]),
                            cast(x, weight[r]), relu, False, 0,
                        )  # fmt: skip
    if stream and writes:
        fence()


@jit()
def add_segment(
    sums, dx, dresidual, dy, x, mask, values, place, length, c0, c1, p, relu, short, stream, C, S
):  # fmt: skip
    """Add p times what `sums_row` returns of a run to the sums of each channel."""
    n = place // S
    for c in range(c0, c1):
        o = place + (n * (C - 1) + c) * S
        a, b = sums_row(
            dx, dresidual, dy, x, mask, words_at(n, c if short is None else c0, C, S), o, o + length,
            cast(x, values[3, c]), cast(x, values[4, c]), cast(x, values[5, c]), relu, stream, C * S,
        )  # fmt: skip
        sums[0, 0, c - c0] += p * a
        sums[1, 0, c - c0] += p * b


@jit()
def flush(sums, totals, p, channels, S):
    """Add p times what the places of short maps were summed to, and begin anew."""
    for k in range(2):
        for c in range(channels):
            sums[k, 0, c] += p * sum_of(totals[k], c * S, (c + 1) * S)
    totals[:] = 0


@jit()
def spell_weights(row, begin, length, weight, r, n, channels, S):
    """row = p of sample n for every element of a segment, from run r on; return the next sample's first."""
    row[:] = 0
    while r < len(begin) and begin[r] < (n + 1) * S:
        first, p = begin[r] - n * S, cast(row, weight[r])
        for c in range(channels):
            for i in range(c * S + first, c * S + first + length[r]):
                row[i] = p
        r += 1
    return r


@jit()
def write_segment(
    dx, dresidual, dy, x, mask, values, spelled, n, c0, c1, slopes, p, relu, short, stream, C, S
):  # fmt: skip
    """`repair_row` over a segment, p spelled out where maps are short; without slopes all of it is 0."""
    if short is not None:
        o, m = (n * C + c0) * S, (c1 - c0) * S
        w = words_at(n, c0, C, S)
        shift, scale, offset = spelled[0, :m], spelled[1, :m], spelled[2, :m]
        if slopes is None:
            repair_row(
                dx, dresidual, dy, x, mask, w, o, o + m, shift, scale, offset, None, None, p, relu, stream,
                C * S,
            )  # fmt: skip
        else:
            repair_row(
                dx, dresidual, dy, x, mask, w, o, o + m, shift, scale, offset, spelled[3, :m],
                spelled[4, :m], spelled[7, :m], relu, stream, C * S,
            )  # fmt: skip
    else:
        for c in range(c0, c1):
            o, w = (n * C + c) * S, words_at(n, c, C, S)
            shift, scale, offset = cast(x, values[3, c]), cast(x, values[4, c]), cast(x, values[5, c])
            if slopes is None:
                repair_row(
                    dx, dresidual, dy, x, mask, w, o, o + S, shift, scale, offset, None, None, p, relu,
                    stream, C * S,
                )  # fmt: skip
            else:
                k0, k1 = cast(x, slopes[0, c - c0]), cast(x, slopes[1, c - c0])
                repair_row(
                    dx, dresidual, dy, x, mask, w, o, o + S, shift, scale, offset, k0, k1, p, relu, stream,
                    C * S,
                )  # fmt: skip
