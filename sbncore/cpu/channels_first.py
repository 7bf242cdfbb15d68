"""The kernels over channels-first memory, (N, C, S), of maps of 16 positions or more: a call in two phases.

Nothing crosses channels. Where most is drawn, a call is *at once*: its tasks are blocks of channels, moments
and then what is written, while the block is still in a cache; so full batch normalization reads memory once.
Else the pass over everything is a *sweep*: its tasks lie one behind the other in memory, which suits it best,
and the few places drawn are blocks' tasks, before a forward's sweep and behind a backward's. Between the
phases threads wait for each other. What a task is depends on the shape alone, and all sums of a channel are
added in one order: results do not depend on the threads.

What a pass will read ``ahead`` by so many elements is fetched meanwhile: a little further on in a sweep, else
in the next sample, since the CPU foresees no jumps.

Loops fill arrays element by element: slices would take seconds more to compile.
"""

from __future__ import annotations

import numpy as np

from sbncore.cpu.channels import (
    clear,
    collect,
    find_slopes,
    finish_backward,
    finish_forward,
    finish_moments,
    shift_of,
    spots_of,
)
from sbncore.cpu.compiled import jit, loop
from sbncore.cpu.counters import DONE, FINISHED, FIRST, SECOND, THIRD
from sbncore.cpu.elements import cast, sample_of, zero
from sbncore.cpu.lanes import LANES, aligned, fence, load_lanes, store_lanes, total
from sbncore.cpu.rows import CHUNK, NEAR, repair_few, repair_vector, sums_vector
from sbncore.cpu.segments import (
    coefficients_of,
    normalize_segment,
    repair_segment,
    slopes_at,
    sums_segment,
)
from sbncore.cpu.tasks import claim, wait

FLUSH = CHUNK // LANES  # values that a lane sums up in float32
WORTH = 100  # elements that are read twice in the time that the repair of one run takes
AHEAD = 512  # elements: how long before they are used scattered runs are fetched


@loop()
def mask_bytes(C, S):
    """How many bytes of a mask a sample has."""
    return 2 * ((C * S + LANES - 1) // LANES)


@jit()
def forward(
    y, mask, x, residual, values, parameters, partial, begin, length, weight, weigh, full, relu, stream, N, C,
    S, block, sweep, spread, cached, counters,
):  # fmt: skip
    """y = act(z), where a mask is given the bits of z > 0; the statistics in values and the running ones.

    The statistics are of the runs, whose weights sum to 1 / ``weigh``, ``full`` where they are everything;
    without runs they are the prior's. Without a y nothing is normalized.
    """
    if y is not None:
        stream = stream and aligned(y)
    at_once = not cached and lines(length) * 2 > N * S
    swept = full and not at_once
    size = max(block, sweep)
    sums, lanes = np.empty((2, size)), np.full((2, size * LANES), zero(x))
    spots = spots_of(begin, length, C, S, False)
    across = -(-C // sweep)
    tasks = across * -(-N // spread)
    if swept:
        while True:
            t = claim(counters, FIRST)
            if t >= tasks:
                break
            g, c0 = t // across, t % across * sweep
            n0, n1, c1 = g * spread, min(N, (g + 1) * spread), min(C, c0 + sweep)
            for c in range(c0, c1):  # the same in all tasks
                values[3, c] = shift_of(x, spots, c * S)
            clear(sums)
            add(sums, lanes, None, None, None, x, None, values, n0, n1, c0, c1, None, False, NEAR, C, S)
            keep(partial, g, sums, weight[0] * weigh, c0, c1)
            claim(counters, DONE)
        wait(counters, DONE, tasks)
    while True:
        t = claim(counters, SECOND)
        c0, c1 = t * block, min(C, (t + 1) * block)
        if c0 >= C:
            break
        clear(sums)
        if swept:
            collect(sums, partial, c0, c1)
        elif len(begin) > 0:
            for c in range(c0, c1):
                values[3, c] = shift_of(x, spots, c * S)
            add_runs(sums, lanes, None, x, None, values, begin, length, weight, weigh, None, c0, c1, C, S)
        finish_moments(values, sums, c0, c1)
        finish_forward(values, x, parameters, c0, c1)
        if y is not None and at_once:
            normalize(y, mask, x, residual, values, 0, N, c0, c1, relu, stream, C * S, C, S)
        claim(counters, FINISHED)
    if y is not None and not at_once:
        wait(counters, FINISHED, -(-C // block))
        while True:
            t = claim(counters, THIRD)
            if t >= tasks:
                break
            n0, c0 = t // across * spread, t % across * sweep
            n1, c1 = min(N, n0 + spread), min(C, c0 + sweep)
            near = NEAR if stream else 0
            normalize(y, mask, x, residual, values, n0, n1, c0, c1, relu, stream, near, C, S)
    if stream:
        fence()


@loop()
def keep(partial, g, sums, p, c0, c1):
    """Put a sweep's sums, times p, where `collect` finds them."""
    for k in range(2):
        for c in range(c0, c1):
            partial[k, g, c] = p * sums[k, c - c0]


@loop()
def lines(length):
    """Elements in the cache lines of runs, about."""
    elements = 0
    for r in range(len(length)):
        elements += length[r] + LANES
    return elements


@loop()
def normalize(y, mask, x, residual, values, n0, n1, c0, c1, relu, stream, ahead, C, S):
    """The pass that writes, over segments of samples n0 .. n1-1."""
    for n in range(n0, n1):
        normalize_segment(
            sample_of(y, n, C * S), sample_of(mask, n, mask_bytes(C, S)), sample_of(x, n, C * S),
            sample_of(residual, n, C * S), values, c0, c1, S, relu, stream, ahead,
        )  # fmt: skip


@loop()
def add_runs(sums, lanes, dy, x, mask, values, begin, length, weight, scale, relu, c0, c1, C, S):
    """Add the sums of g and g * (x - shift) over the runs, each times its weight and ``scale``."""
    held = 0  # what each lane has summed up
    for r in range(len(begin)):
        n, p, whole = begin[r] // S, weight[r] * scale, length[r] == S
        source, upper = sample_of(x, n, C * S), sample_of(dy, n, C * S)
        bits = sample_of(mask, n, mask_bytes(C, S))
        held += (length[r] + LANES - 1) // LANES
        last = held >= FLUSH or r == len(begin) - 1 or weight[r + 1] != weight[r]
        if whole:
            sums_segment(
                sums, lanes, p, last, None, None, upper, source, bits, values, c0, c1, S, relu, False, C * S
            )
        else:
            first = begin[r] - n * S
            for o in range(0, length[r], CHUNK):
                size = min(CHUNK, length[r] - o)
                add_run(lanes, upper, source, bits, values, first + o, size, c0, c1, relu, S)
                if last or o + size < length[r]:
                    flush(sums, lanes, p, c1 - c0)
        held = 0 if last else held


@loop()
def add_run(lanes, dy, x, mask, values, first, length, c0, c1, relu, S):
    """Add a run of every channel to its lanes: sums of each alone take twice as long."""
    ahead, whole = S * (1 + AHEAD // length), length & -LANES
    for c in range(c0, c1):
        o, i = c * S + first, (c - c0) * LANES
        shift, scale, offset = coefficients_of(x, values, c)
        a, b = load_lanes(lanes[0], i, None), load_lanes(lanes[1], i, None)
        for v in range(o, o + whole, LANES):
            g, product = sums_vector(
                None, None, dy, x, mask, v, shift, scale, offset, relu, False, ahead, None
            )
            a = a + g
            b = b + product
        if whole < length:
            keep = 0, length - whole
            g, product = sums_vector(
                None, None, dy, x, mask, o + whole, shift, scale, offset, relu, False, ahead, keep
            )
            a = a + g
            b = b + product
        store_lanes(lanes[0], i, a, None, None)
        store_lanes(lanes[1], i, b, None, None)


@loop()
def flush(sums, lanes, p, channels):
    """Add p times what every channel's lanes hold to its sums, and begin anew."""
    for k in range(2):
        for c in range(channels):
            sums[k, c] += p * total(load_lanes(lanes[k], c * LANES, None))
            for i in range(c * LANES, (c + 1) * LANES):
                lanes[k, i] = 0


@jit()
def backward(
    dx, dresidual, dy, x, mask, values, total, partial, dweight, dbias, begin, length, weight, scale, full,
    repairs, relu, sampled, stream, N, C, S, block, sweep, spread, cached, counters,
):  # fmt: skip
    """dx = scale * g - p * (k0 + k1 * (x - shift)), where p is not 0 only in the runs; dresidual = g.

    The two sums, dbias and dweight, are over everything, or if ``sampled`` over the runs, times ``scale``. If
    that is below 0 they are given in ``total``, and dx, which is scale * g, is made right. ``repairs`` says
    whether a gradient flows through the statistics, ``full`` whether the runs are everything. ``partial`` is
    room for the sums of a sweep's tasks.
    """
    writes = dx is not None or dresidual is not None
    if writes:
        stream = stream and aligned(dx) and aligned(dresidual)
    # sums, then all of it is written
    dense = writes and repairs and (full or N * S < WORTH * len(begin))
    at_once = dense and not cached
    turn = 0 if full else 1
    weights = np.full(LANES + turn * (S + LANES), cast(x, weight[0] if full else 0.0))
    size = max(block, sweep)
    sums, slopes, lanes = np.empty((2, size)), np.empty((2, size)), np.full((2, size * LANES), zero(x))
    across = -(-C // sweep)
    tasks = across * -(-N // spread)
    if not at_once and scale >= 0 and (sampled is None or not dense):
        while True:
            t = claim(counters, FIRST)
            if t >= tasks:
                break
            g, c0 = t // across, t % across * sweep
            n0, n1, c1 = g * spread, min(N, (g + 1) * spread), min(C, c0 + sweep)
            if sampled is not None:
                for n in range(n0, n1):
                    write(
                        dx, dresidual, dy, x, mask, values, None, weights, turn, n, c0, c1, relu, stream,
                        NEAR, C, S,
                    )  # fmt: skip
            else:
                clear(sums)
                if dense:
                    add(sums, lanes, None, None, dy, x, mask, values, n0, n1, c0, c1, relu, False, NEAR, C, S)
                else:
                    add(
                        sums, lanes, dx, dresidual, dy, x, mask, values, n0, n1, c0, c1, relu, stream, NEAR,
                        C, S,
                    )  # fmt: skip
                keep(partial, g, sums, 1.0, c0, c1)
            claim(counters, DONE)
        wait(counters, DONE, tasks)
    while True:
        t = claim(counters, SECOND)
        c0, c1 = t * block, min(C, (t + 1) * block)
        if c0 >= C:
            break
        clear(sums)
        if sampled is not None:
            add_runs(sums, lanes, dy, x, mask, values, begin, length, weight, scale, relu, c0, c1, C, S)
        elif at_once and scale >= 0:
            add(sums, lanes, None, None, dy, x, mask, values, 0, N, c0, c1, relu, False, C * S, C, S)
        elif scale >= 0:
            collect(sums, partial, c0, c1)
        if scale >= 0:
            finish_backward(total, sums, values, dweight, dbias, c0, c1)
        if at_once:
            write_all(
                dx, dresidual, dy, x, mask, values, total, slopes, weights, turn, begin, length, weight, 0, N,
                c0, c1, relu, stream, C * S, C, S,
            )  # fmt: skip
        elif dx is not None and repairs and not dense:
            for r in range(len(begin)):
                if r == 0 or weight[r] != weight[r - 1]:
                    find_slopes(slopes, total, values, weight[r], c0, c1)
                repair_run(dx, dy, x, mask, values, slopes, begin[r], length[r], c0, c1, relu, C, S)
        claim(counters, FINISHED)
    if dense and not at_once:
        wait(counters, FINISHED, -(-C // block))
        while True:
            t = claim(counters, THIRD)
            if t >= tasks:
                break
            n0, c0 = t // across * spread, t % across * sweep
            n1, c1 = min(N, n0 + spread), min(C, c0 + sweep)
            write_all(
                dx, dresidual, dy, x, mask, values, total, slopes, weights, turn, begin, length, weight, n0,
                n1, c0, c1, relu, stream, NEAR, C, S,
            )  # fmt: skip
    if stream and writes:
        fence()


@loop()
def write_all(
    dx, dresidual, dy, x, mask, values, total, slopes, weights, turn, begin, length, weight, n0, n1, c0, c1,
    relu, stream, ahead, C, S,
):  # fmt: skip
    """dx and dresidual of samples n0 .. n1-1, from the sums in total."""
    find_slopes(slopes, total, values, 1.0, c0, c1)
    r = 0
    while r < len(begin) and begin[r] < n0 * S:
        r += 1
    for n in range(n0, n1):
        if turn > 0:
            r = spell_weights(weights, begin, length, weight, r, n, S)
        write(
            dx, dresidual, dy, x, mask, values, slopes, weights, turn, n, c0, c1, relu, stream, ahead, C, S
        )


@loop()
def add(sums, lanes, dx, dresidual, dy, x, mask, values, n0, n1, c0, c1, relu, stream, ahead, C, S):
    """Add the sums over samples n0 .. n1-1; dx = scale * g, dresidual = g where given."""
    often = max(1, CHUNK // S)
    for n in range(n0, n1):
        last = n == n1 - 1 or (n - n0) % often == often - 1
        sums_segment(
            sums, lanes, 1.0, last, sample_of(dx, n, C * S), sample_of(dresidual, n, C * S),
            sample_of(dy, n, C * S), sample_of(x, n, C * S), sample_of(mask, n, mask_bytes(C, S)), values, c0,
            c1, S, relu, stream, ahead,
        )  # fmt: skip


@loop()
def write(
    dx, dresidual, dy, x, mask, values, slopes, p, turn, n, c0, c1, relu, stream, ahead, C, S
):  # fmt: skip
    """dx and dresidual of a sample's segment; without slopes p is 0."""
    if dx is not None or dresidual is not None:
        repair_segment(
            sample_of(dx, n, C * S), sample_of(dresidual, n, C * S), sample_of(dy, n, C * S),
            sample_of(x, n, C * S), sample_of(mask, n, mask_bytes(C, S)), values, slopes, p, turn, c0, c1, S,
            relu, stream, ahead,
        )  # fmt: skip


@loop()
def spell_weights(row, begin, length, weight, r, n, S):
    """p of sample n as `repair_segment` takes it, from run r on; return the next sample's first run."""
    for i in range(len(row)):
        row[i] = 0
    while r < len(begin) and begin[r] < (n + 1) * S:
        first = LANES + begin[r] - n * S
        for i in range(first, first + length[r]):
            row[i] = weight[r]
        r += 1
    for i in range(LANES):  # round the map
        row[i], row[LANES + S + i] = row[S + i], row[LANES + i]
    return r


@loop()
def repair_run(dx, dy, x, mask, values, slopes, place, length, c0, c1, relu, C, S):
    """Write dx in a run of every channel, with p in the slopes.

    Vectors overlap, since what they write does not depend on what they find; but where a run is shorter than
    one, its vector lies within the block's memory, and its other elements stay.
    """
    n = place // S
    target, bits = sample_of(dx, n, C * S), sample_of(mask, n, mask_bytes(C, S))
    source, upper = sample_of(x, n, C * S), sample_of(dy, n, C * S)
    ahead, first = S * (1 + AHEAD // length), place - n * S
    for c in range(c0, c1):
        shift, scale, offset = coefficients_of(x, values, c)
        k0, k1 = slopes_at(x, slopes, c - c0)
        o = first + c * S
        if length < LANES:
            v = min(o, c1 * S - LANES)
            repair_few(
                target, upper, source, bits, v, o - v, o - v + length, shift, scale, offset, k0, k1, relu,
                ahead,
            )  # fmt: skip
            continue
        for v in range(o, o + length, LANES):
            repair_vector(
                target, None, upper, source, bits, min(v, o + length - LANES), 0, shift, scale, offset, k0,
                k1, None, relu, False, ahead, None,
            )  # fmt: skip
