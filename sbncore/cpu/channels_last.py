"""The kernels over channels-last memory, (N, S, C): a call in three phases, between which threads wait.

The passes over places, the sums of blocks of channels with what is computed of them, and the pass over places
that follows from that. A row is all channels of ``tile`` consecutive places, with coefficients repeated
``tile`` times, so that a few channels still make a long row, of whole vectors. A task writes places, or a row
of the partial sums, of its own; what a task is depends on the shape alone, so results do not depend on the
threads. Sums are float32 (float64 for float64) within a piece, float64 beyond. A mask's bit e is element e's.
"""

from __future__ import annotations

import numpy as np

from sbncore.cpu.channels import (
    clear,
    collect,
    cut,
    find_slopes,
    finish_backward,
    finish_forward,
    finish_moments,
    shift_of,
    spots_of,
)
from sbncore.cpu.compiled import inner, jit, loop
from sbncore.cpu.counters import DONE, FINISHED, FIRST, LAST, SECOND, THIRD, WRITTEN
from sbncore.cpu.elements import cast, zero
from sbncore.cpu.rows import NEAR, add_row, normalize_row, repair_row
from sbncore.cpu.stores import aligned, fence
from sbncore.cpu.tasks import claim, wait

BLOCK = 128  # channels whose sums are a task


@jit()
def forward(
    y, mask, x, residual, values, parameters, partial, begin, length, weight, weigh, full, relu, stream, N, C,
    S, tile, piece, span, counters,
):  # fmt: skip
    """As `sbncore.cpu.channels_first.forward`; ``partial`` is room for the sums of as many groups of runs."""
    if y is not None:
        stream = stream and aligned(y)
    sums, rows = np.empty((2, BLOCK)), np.full((5, tile * C), zero(x))
    tasks = partial.shape[1]
    if tasks > 0:
        shift, spots = rows[0], spots_of(begin, length, C, S, True)
        for c in range(C):
            shift[c] = shift_of(x, spots, c)
        repeat(shift, C)
        add_runs(
            partial, rows, None, x, None, shift, shift, shift, begin, length, weight, weigh, None, C, tile,
            piece, counters,
        )  # fmt: skip
        wait(counters, DONE, tasks)
    while True:
        c0 = claim(counters, SECOND) * BLOCK
        if c0 >= C:
            break
        c1 = min(C, c0 + BLOCK)
        clear(sums)
        collect(sums, partial, c0, c1)
        for c in range(c0, c1):
            values[3, c] = rows[0, c]
        finish_moments(values, sums, c0, c1)
        finish_forward(values, x, parameters, c0, c1)
        claim(counters, FINISHED)
    wait(counters, FINISHED, (C + BLOCK - 1) // BLOCK)
    if y is not None:
        shift, scale, offset = coefficients_in(rows, values, C)
        near = NEAR if stream else 0
        while True:
            p0 = claim(counters, THIRD) * span
            if p0 >= N * S:
                break
            end = min(N * S, p0 + span) * C
            for o in range(p0 * C, end, tile * C):
                normalize_row(
                    y, mask, x, residual, o, min(o + tile * C, end), shift, scale, offset, relu, stream,
                    near,
                )  # fmt: skip
    if stream:
        fence()


@loop()
def repeat(row, C):
    """Fill a row with its first C elements, over and over."""
    for i in range(C, len(row)):
        row[i] = row[i - C]


@inner()
def coefficients_in(rows, values, C):
    """The first three rows, filled with shift, scale and offset."""
    for k in range(3):
        for c in range(C):
            rows[k, c] = values[3 + k, c]
        repeat(rows[k], C)
    return rows[0], rows[1], rows[2]


@inner()
def add_runs(
    partial, rows, dy, x, mask, shift, scale, offset, begin, length, weight, times, relu, C, tile, piece,
    counters,
):  # fmt: skip
    """partial[:, task] = the weighted sums of g and g * (x - shift) over the runs, times ``times``."""
    tasks = partial.shape[1]
    begin, length, weight = cut(begin, length, weight, piece)
    while True:
        t = claim(counters, FIRST)
        if t >= tasks:
            break
        clear_task(partial, t)
        held = 0
        r0, r1 = len(begin) * t // tasks, len(begin) * (t + 1) // tasks
        for r in range(r0, r1):
            add_places(
                rows, None, None, dy, x, mask, shift, scale, offset, begin[r], begin[r] + length[r], relu,
                False, C, tile,
            )  # fmt: skip
            held += length[r]
            if r == r1 - 1 or held + length[r + 1] > piece or weight[r + 1] != weight[r]:
                flush(partial, t, rows, weight[r] * times, C, tile)
                held = 0
        claim(counters, DONE)


@loop()
def clear_task(partial, t):
    for k in range(2):
        for c in range(partial.shape[2]):
            partial[k, t, c] = 0


@loop()
def add_places(rows, dx, dresidual, dy, x, mask, shift, scale, offset, p0, p1, relu, stream, C, tile):
    """Add g and g * (x - shift) of places to the last two rows; dx = scale * g, dresidual = g where given."""
    for o in range(p0 * C, p1 * C, tile * C):
        add_row(
            (rows[3], rows[4]), dx, dresidual, dy, x, mask, o, min(o + tile * C, p1 * C), shift, scale,
            offset, relu, stream, NEAR,
        )  # fmt: skip


@loop()
def flush(partial, t, rows, p, C, tile):
    """Add p times the last two rows to a task's partial sums, and begin anew."""
    for k in range(2):
        for j in range(tile):
            for c in range(C):
                partial[k, t, c] += p * rows[3 + k, j * C + c]
                rows[3 + k, j * C + c] = 0


@jit()
def backward(
    dx, dresidual, dy, x, mask, values, total, partial, dweight, dbias, begin, length, weight, scale, full,
    repairs, relu, sampled, stream, N, C, S, tile, piece, span, counters,
):  # fmt: skip
    """As `sbncore.cpu.channels_first.backward`; ``partial`` is for sums of tasks, or of groups of runs."""
    writes = dx is not None or dresidual is not None
    if writes:
        stream = stream and aligned(dx) and aligned(dresidual)
    dense = writes and repairs and full  # all is written behind the sums
    sums, rows = np.empty((2, BLOCK)), np.full((5, tile * C), zero(x))
    shift, times, offset = coefficients_in(rows, values, C)
    if scale >= 0:
        tasks = partial.shape[1]
        if sampled is not None:
            add_runs(
                partial, rows, dy, x, mask, shift, times, offset, begin, length, weight, scale, relu, C, tile,
                piece, counters,
            )  # fmt: skip
        else:
            while True:
                t = claim(counters, FIRST)
                if t >= tasks:
                    break
                clear_task(partial, t)
                last = min(N * S, (t + 1) * span)
                for p in range(t * span, last, piece):
                    q = min(last, p + piece)
                    if dense:
                        add_places(
                            rows, None, None, dy, x, mask, shift, times, offset, p, q, relu, False, C, tile
                        )
                    else:
                        add_places(
                            rows, dx, dresidual, dy, x, mask, shift, times, offset, p, q, relu, stream, C,
                            tile,
                        )  # fmt: skip
                    flush(partial, t, rows, 1.0, C, tile)
                claim(counters, DONE)
        wait(counters, DONE, tasks)
        while True:
            c0 = claim(counters, SECOND) * BLOCK
            if c0 >= C:
                break
            c1 = min(C, c0 + BLOCK)
            clear(sums)
            collect(sums, partial, c0, c1)
            finish_backward(total, sums, values, dweight, dbias, c0, c1)
            claim(counters, FINISHED)
        wait(counters, FINISHED, (C + BLOCK - 1) // BLOCK)
    slopes = np.empty((2, C))
    find_slopes(slopes, total, values, 1.0, 0, C)
    k0, k1 = rows[3], rows[4]
    for c in range(C):
        k0[c], k1[c] = slopes[0, c], slopes[1, c]
    repeat(k0, C)
    repeat(k1, C)
    if dense or (sampled is not None and writes):
        while True:
            p0 = claim(counters, THIRD) * span
            if p0 >= N * S:
                break
            p = weight[0] if dense else 0.0
            write(
                dx, dresidual, dy, x, mask, shift, times, offset, k0, k1, p, p0, min(N * S, p0 + span), relu,
                stream, C, tile,
            )  # fmt: skip
            claim(counters, WRITTEN)
    if dx is not None and repairs and not dense:
        if sampled is not None:
            wait(counters, WRITTEN, (N * S + span - 1) // span)
        begin, length, weight = cut(begin, length, weight, piece)
        while True:
            r = claim(counters, LAST)
            if r >= len(begin):
                break
            write(
                dx, None, dy, x, mask, shift, times, offset, k0, k1, weight[r], begin[r],
                begin[r] + length[r], relu, False, C, tile,
            )  # fmt: skip
    if stream and writes:
        fence()


@loop()
def write(dx, dresidual, dy, x, mask, shift, scale, offset, k0, k1, p, p0, p1, relu, stream, C, tile):
    """dx = scale * g - p * (k0 + k1 * (x - shift)), dresidual = g, of some places."""
    p = cast(x, p)
    for o in range(p0 * C, p1 * C, tile * C):
        repair_row(
            dx, dresidual, dy, x, mask, o, min(o + tile * C, p1 * C), shift, scale, offset, k0, k1, p,
            relu, stream, NEAR,
        )  # fmt: skip
