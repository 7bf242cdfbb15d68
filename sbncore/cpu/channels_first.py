"""The kernels over channels-first memory, (N, C, S), of maps of 16 positions or more: a call in phases.

Nothing crosses channels. The pass over everything is a *sweep*: its tasks lie one behind the other in memory,
which suits it best; what is drawn, and what is computed of each channel, are tasks of blocks of channels,
before a forward's sweep and behind a backward's. Where most is drawn, a small array takes two sweeps, and a
large one is done *at once*: a block's sums and then what is written, while it is still in a cache; so full
batch normalization reads memory once. Between the phases threads wait for each other. What a task is depends
on the shape alone, and all sums of a channel are added in one order: results do not depend on the threads.

What a pass (`sbncore.cpu.passes`) will read ``ahead`` by so many elements is fetched meanwhile: a little
further on in a sweep, else in the next sample, since the CPU foresees no jumps.

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
from sbncore.cpu.compiled import jit
from sbncore.cpu.counters import DONE, FINISHED, FIRST, SECOND, THIRD
from sbncore.cpu.elements import cast, zero
from sbncore.cpu.lanes import LANES
from sbncore.cpu.passes import (
    add,
    add_runs,
    keep,
    lines,
    normalize,
    part_of,
    repair_run,
    write,
    write_all,
)
from sbncore.cpu.rows import NEAR
from sbncore.cpu.stores import aligned, fence
from sbncore.cpu.tasks import claim, wait

WORTH = 100  # elements that are read twice in the time that the repair of one run takes


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
    tasks = -(-C // sweep) * -(-N // spread)
    if swept:
        while True:
            t = claim(counters, FIRST)
            if t >= tasks:
                break
            g, n0, n1, c0, c1 = part_of(t, N, C, sweep, spread)
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
        near = NEAR if stream else 0
        while True:
            t = claim(counters, THIRD)
            if t >= tasks:
                break
            _, n0, n1, c0, c1 = part_of(t, N, C, sweep, spread)
            normalize(y, mask, x, residual, values, n0, n1, c0, c1, relu, stream, near, C, S)
    if stream:
        fence()


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
    tasks = -(-C // sweep) * -(-N // spread)
    if not at_once and scale >= 0 and (sampled is None or not dense):
        while True:
            t = claim(counters, FIRST)
            if t >= tasks:
                break
            g, n0, n1, c0, c1 = part_of(t, N, C, sweep, spread)
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
            _, n0, n1, c0, c1 = part_of(t, N, C, sweep, spread)
            write_all(
                dx, dresidual, dy, x, mask, values, total, slopes, weights, turn, begin, length, weight, n0,
                n1, c0, c1, relu, stream, NEAR, C, S,
            )  # fmt: skip
    if stream and writes:
        fence()
