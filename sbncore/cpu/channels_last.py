"""Kernels over channels-last memory, (N, S, C).

A call is up to four phases. Threads claim a phase's tasks by counting (`sbncore.cpu.tasks`), and wait
between phases until all of its tasks are done::

    phase              a task                  computes                              memory
    forward  sums      a group of runs         sums over the runs                    reads the sample
             channels  CHANNEL_BLOCK channels  moments, coefficients                 reads ``partial``
             write     ``span`` places         y, mask                               reads x, writes y
    backward sums      ``span`` places         sums over everything, dx = scale * g  reads dy, x, writes dx
                       or a group of runs      sums over the runs                    reads the sample
             channels  CHANNEL_BLOCK channels  dweight, dbias                        reads ``partial``
             write     ``span`` places         dx                                    reads dy, x, writes dx
             repair    a piece of the runs     dx in the runs                        reads, writes the sample

A place is all channels at one position. A residual is one more array read, dresidual one more written. A
backward has a write phase where the runs are everything, or where its sums are over the runs; a repair
phase where the runs are not everything. A row (`sbncore.cpu.rows`) is ``tile`` consecutive places, its
coefficients repeated as often, so that a few channels make a long row of whole vectors too.

Sums: float32 (float64 for float64) within a ``piece`` of places, then float64 in the task's row of
``partial``. Tasks follow from the shape alone, so results do not depend on the threads. A mask's bit e is
element e's.
"""

from __future__ import annotations

from sbncore.cpu.elements import array_at, cast, loop, zero
from sbncore.cpu.per_channel import (
    clear,
    collect,
    find_pilots,
    find_slopes,
    finish_backward,
    finish_forward,
    finish_moments,
    shift_of,
)
from sbncore.cpu.record import (
    CHANNEL_TASK,
    CHANNELS_DONE,
    COUNTERS,
    PRECOMPUTED,
    REPAIR_TASK,
    SAMPLE,
    SUM_TASK,
    SUMS_DONE,
    WRITE_TASK,
    WRITES_DONE,
)
from sbncore.cpu.rows import add_row, normalize_row, repair_row
from sbncore.cpu.runs import runs_in, split_runs
from sbncore.cpu.tasks import increment, thread_scratch, wait
from sbncore.cpu.tuning import CHANNEL_BLOCK, PILOTS, PREFETCH_DISTANCE
from sbncore.cpu.vectors import aligned, fence


@loop()
def forward(r, y, mask, x, residual, relu):
    """As `sbncore.cpu.channels_first.forward`."""
    N, C, S, tile, span, tasks = r.N, r.C, r.S, r.tile, r.span, r.groups
    values, partial = array_at(r.values, (6, C), 0.0), array_at(r.partial, (2, tasks, C), 0.0)
    counters = array_at(r.counters, (COUNTERS,), 0)
    scratch = thread_scratch(r, counters)
    nontemporal = r.nontemporal != 0 and aligned(y)
    sums = array_at(scratch + r.sums, (2, CHANNEL_BLOCK), 0.0)
    rows = array_at(scratch + r.rows, (5, tile * C), zero(x))
    clear(rows)
    if tasks > 0:
        begin, length, _ = runs_in(r)
        shift, pilots = rows[0], array_at(scratch + r.pilots, (min(PILOTS, len(begin)),), 0)
        find_pilots(pilots, r, begin, length, True)
        for c in range(C):
            shift[c] = shift_of(x, pilots, c)
        repeat(shift, C)
        add_runs(r, scratch, partial, rows, None, x, None, shift, shift, shift, None, counters)
        wait(counters, SUMS_DONE, tasks)
    while True:
        c0 = increment(counters, CHANNEL_TASK) * CHANNEL_BLOCK
        if c0 >= C:
            break
        c1 = min(C, c0 + CHANNEL_BLOCK)
        clear(sums)
        collect(sums, partial, c0, c1)
        for c in range(c0, c1):
            values[3, c] = rows[0, c]
        finish_moments(values, sums, c0, c1)
        finish_forward(values, x, r, c0, c1)
        increment(counters, CHANNELS_DONE)
    wait(counters, CHANNELS_DONE, (C + CHANNEL_BLOCK - 1) // CHANNEL_BLOCK)
    if r.writes:
        shift, scale, offset = coefficient_rows(rows, values, C)
        distance = PREFETCH_DISTANCE if nontemporal else 0
        while True:
            p0 = increment(counters, WRITE_TASK) * span
            if p0 >= N * S:
                break
            end = min(N * S, p0 + span) * C
            for o in range(p0 * C, end, tile * C):
                normalize_row(
                    y, mask, x, residual, o, min(o + tile * C, end), shift, scale, offset, relu, nontemporal,
                    distance,
                )  # fmt: skip
    if nontemporal:
        fence()


@loop()
def repeat(row, C):
    """Fill a row with its first C elements, over and over."""
    for i in range(C, len(row)):
        row[i] = row[i - C]


@loop()
def coefficient_rows(rows, values, C):
    """Return the first three rows, filled with shift, scale and offset."""
    for k in range(3):
        for c in range(C):
            rows[k, c] = values[3 + k, c]
        repeat(rows[k], C)
    return rows[0], rows[1], rows[2]


@loop()
def add_runs(r, scratch, partial, rows, dy, x, mask, shift, scale, offset, relu, counters):
    """partial[:, task] = ``multiplier`` times the weighted sums of g and g * (x - shift) over its runs."""
    C, tile, piece, tasks = r.C, r.tile, r.piece, r.groups
    begin, length, weight = split_runs(r, scratch + r.pieces, *runs_in(r), piece)
    while True:
        t = increment(counters, SUM_TASK)
        if t >= tasks:
            break
        clear_task(partial, t)
        pending = 0
        first, end = len(begin) * t // tasks, len(begin) * (t + 1) // tasks
        for k in range(first, end):
            add_places(
                rows, None, None, dy, x, mask, shift, scale, offset, begin[k], begin[k] + length[k], relu,
                False, C, tile,
            )  # fmt: skip
            pending += length[k]
            if k == end - 1 or pending + length[k + 1] > piece or weight[k + 1] != weight[k]:
                flush_rows(partial, t, rows, weight[k] * r.multiplier, C, tile)
                pending = 0
        increment(counters, SUMS_DONE)


@loop()
def clear_task(partial, t):
    """Set the sums of task t to 0."""
    for k in range(2):
        for c in range(partial.shape[2]):
            partial[k, t, c] = 0


@loop()
def add_places(rows, dx, dresidual, dy, x, mask, shift, scale, offset, p0, p1, relu, nontemporal, C, tile):
    """Add g and g * (x - shift) of places to the last two rows; dx = scale * g, dresidual = g unless None."""
    for o in range(p0 * C, p1 * C, tile * C):
        add_row(
            (rows[3], rows[4]), dx, dresidual, dy, x, mask, o, min(o + tile * C, p1 * C), shift, scale,
            offset, relu, nontemporal, PREFETCH_DISTANCE,
        )  # fmt: skip


@loop()
def flush_rows(partial, t, rows, p, C, tile):
    """Add p times the last two rows to a task's partial sums, and clear the rows."""
    for k in range(2):
        for j in range(tile):
            for c in range(C):
                partial[k, t, c] += p * rows[3 + k, j * C + c]
                rows[3 + k, j * C + c] = 0


@loop()
def backward(r, dx, dresidual, dy, x, mask, relu):
    """As `sbncore.cpu.channels_first.backward`."""
    N, C, S, tile, piece, span, tasks = r.N, r.C, r.S, r.tile, r.piece, r.span, r.groups
    values, partial = array_at(r.values, (6, C), 0.0), array_at(r.partial, (2, tasks, C), 0.0)
    total, counters = array_at(r.total, (2, C), 0.0), array_at(r.counters, (COUNTERS,), 0)
    scratch = thread_scratch(r, counters)
    writes, sampled = r.writes != 0, r.sums_over == SAMPLE
    nontemporal = writes and r.nontemporal != 0 and aligned(dx) and aligned(dresidual)
    dense = writes and r.repairs != 0 and r.full != 0  # all of dx is written after the sums
    sums = array_at(scratch + r.sums, (2, CHANNEL_BLOCK), 0.0)
    rows = array_at(scratch + r.rows, (5, tile * C), zero(x))
    clear(rows)
    shift, scale, offset = coefficient_rows(rows, values, C)
    if r.sums_over != PRECOMPUTED:
        if sampled:
            add_runs(r, scratch, partial, rows, dy, x, mask, shift, scale, offset, relu, counters)
        else:
            while True:
                t = increment(counters, SUM_TASK)
                if t >= tasks:
                    break
                clear_task(partial, t)
                last = min(N * S, (t + 1) * span)
                for p in range(t * span, last, piece):
                    q = min(last, p + piece)
                    if dense or not writes:
                        add_places(
                            rows, None, None, dy, x, mask, shift, scale, offset, p, q, relu, False, C, tile
                        )
                    else:
                        add_places(
                            rows, dx, dresidual, dy, x, mask, shift, scale, offset, p, q, relu, nontemporal,
                            C, tile,
                        )  # fmt: skip
                    flush_rows(partial, t, rows, 1.0, C, tile)
                increment(counters, SUMS_DONE)
        wait(counters, SUMS_DONE, tasks)
        while True:
            c0 = increment(counters, CHANNEL_TASK) * CHANNEL_BLOCK
            if c0 >= C:
                break
            c1 = min(C, c0 + CHANNEL_BLOCK)
            clear(sums)
            collect(sums, partial, c0, c1)
            finish_backward(total, sums, values, x, r, c0, c1)
            increment(counters, CHANNELS_DONE)
        wait(counters, CHANNELS_DONE, (C + CHANNEL_BLOCK - 1) // CHANNEL_BLOCK)
    slopes = array_at(scratch + r.slopes, (2, C), 0.0)
    find_slopes(slopes, total, values, 1.0, 0, C)
    k0, k1 = rows[3], rows[4]
    for c in range(C):
        k0[c], k1[c] = slopes[0, c], slopes[1, c]
    repeat(k0, C)
    repeat(k1, C)
    begin, length, weight = runs_in(r)
    if dense or (sampled and writes):
        while True:
            p0 = increment(counters, WRITE_TASK) * span
            if p0 >= N * S:
                break
            p = weight[0] if dense else 0.0
            repair_places(
                dx, dresidual, dy, x, mask, shift, scale, offset, k0, k1, p, p0, min(N * S, p0 + span), relu,
                nontemporal, C, tile,
            )  # fmt: skip
            increment(counters, WRITES_DONE)
    if r.repairs and not dense:
        if sampled:
            wait(counters, WRITES_DONE, (N * S + span - 1) // span)
        begin, length, weight = split_runs(r, scratch + r.pieces, begin, length, weight, piece)
        while True:
            k = increment(counters, REPAIR_TASK)
            if k >= len(begin):
                break
            repair_places(
                dx, None, dy, x, mask, shift, scale, offset, k0, k1, weight[k], begin[k],
                begin[k] + length[k], relu, False, C, tile,
            )  # fmt: skip
    if nontemporal:
        fence()


@loop()
def repair_places(
    dx, dresidual, dy, x, mask, shift, scale, offset, k0, k1, p, p0, p1, relu, nontemporal, C, tile
):  # fmt: skip
    """dx = scale * g - p * (k0 + k1 * (x - shift)), dresidual = g, at places p0 .. p1-1."""
    p = cast(x, p)
    for o in range(p0 * C, p1 * C, tile * C):
        repair_row(
            dx, dresidual, dy, x, mask, o, min(o + tile * C, p1 * C), shift, scale, offset, k0, k1, p, relu,
            nontemporal, PREFETCH_DISTANCE,
        )  # fmt: skip
