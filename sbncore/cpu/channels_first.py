"""Kernels over channels-first memory, (N, C, S), of maps of 16 positions or more.

No channel depends on another. A call is one to three phases. Threads claim a phase's tasks by counting
(`sbncore.cpu.tasks`), and wait between phases until all of its tasks are done::

    phase              a task                computes                              memory
    forward  sums      samples and channels  sums over everything                  reads x
             channels  a block of channels   sums over the runs, moments, ...      reads the sample
             write     samples and channels  y, mask                               reads x, writes y
    backward sums      samples and channels  sums over everything, dx = scale * g  reads dy, x, writes dx
             channels  a block of channels   dweight, dbias, dx in the runs        reads, writes the sample
             write     samples and channels  dx                                    reads dy, x, writes dx

A residual is one more array read, dresidual one more written. The phases that go over everything are
*sweeps*: their tasks, ``sweep`` channels of ``spread`` samples, follow each other in memory, which suits it
best. A forward sweeps for its sums where the runs are everything. A backward writes dx with its sums and
repairs it in the runs, or, where these are most elements, writes all of dx in the last phase. Where most
elements are drawn and the array is larger than a cache, a call is *blockwise*: the channels phase does all,
so that a block that was read for its sums is still in a cache when it is written. So even full batch
normalization reads memory once.

Sums: float32 (float64 for float64) in 16 lanes a channel, for LANE_TERMS terms a lane; float64 beyond, and
in ``partial`` from one phase to the next. Tasks follow from the shape alone and the sums of a channel are
added in one order, so results do not depend on the threads. Passes prefetch at a ``distance`` in elements:
a little further on in a sweep, else in the next sample, since the CPU foresees no jumps.

Loops fill arrays element by element: slices would take seconds more to compile.
"""

from __future__ import annotations

from sbncore.cpu.elements import array_at, cast, loop, sample_of, zero
from sbncore.cpu.per_channel import (
    clear,
    collect,
    fill,
    find_pilots,
    find_slopes,
    finish_backward,
    finish_forward,
    finish_moments,
    shift_of,
    store_partial,
)
from sbncore.cpu.record import (
    CHANNEL_TASK,
    CHANNELS_DONE,
    COUNTERS,
    LANES,
    PRECOMPUTED,
    SAMPLE,
    SUM_TASK,
    SUMS_DONE,
    WRITE_TASK,
)
from sbncore.cpu.runs import runs_in, touched_elements
from sbncore.cpu.segments import (
    CHUNK,
    add_runs,
    mask_bytes,
    normalize_segment,
    repair_run,
    repair_segment,
    sums_segment,
)
from sbncore.cpu.tasks import increment, sweep_task, thread_scratch, wait
from sbncore.cpu.tuning import PILOTS, PREFETCH_DISTANCE, RUN_REPAIR_ELEMENTS
from sbncore.cpu.vectors import aligned, fence


@loop()
def forward(r, y, mask, x, residual, relu):
    """Compute the statistics and the coefficients, move the running statistics, write y and the mask.

    The statistics are of the runs, whose weights sum to 1 / ``multiplier``; ``full`` says that they are
    everything. Without runs the statistics are the prior's. Only a call that ``writes`` has a y.
    """
    N, C, S, block, sweep, spread = r.N, r.C, r.S, r.block, r.sweep, r.spread
    begin, length, weight = runs_in(r)
    values, partial = array_at(r.values, (6, C), 0.0), array_at(r.partial, (2, r.groups, C), 0.0)
    counters = array_at(r.counters, (COUNTERS,), 0)
    scratch = thread_scratch(r, counters)
    nontemporal = r.nontemporal != 0 and aligned(y)
    blockwise = r.cached == 0 and touched_elements(length) * 2 > N * S
    swept = r.full != 0 and not blockwise
    size = max(block, sweep)
    sums = array_at(scratch + r.sums, (2, size), 0.0)
    lane_sums = array_at(scratch + r.lane_sums, (2, size * LANES), zero(x))
    clear(lane_sums)
    pilots = array_at(scratch + r.pilots, (min(PILOTS, len(begin)),), 0)
    find_pilots(pilots, r, begin, length, False)
    tasks = -(-C // sweep) * -(-N // spread)
    if swept:
        while True:
            t = increment(counters, SUM_TASK)
            if t >= tasks:
                break
            g, n0, n1, c0, c1 = sweep_task(t, N, C, sweep, spread)
            for c in range(c0, c1):  # the same in all tasks
                values[3, c] = shift_of(x, pilots, c * S)
            clear(sums)
            add_samples(
                sums, lane_sums, None, None, None, x, None, values, n0, n1, c0, c1, None, False,
                PREFETCH_DISTANCE, C, S,
            )  # fmt: skip
            store_partial(partial, g, sums, weight[0] * r.multiplier, c0, c1)
            increment(counters, SUMS_DONE)
        wait(counters, SUMS_DONE, tasks)
    while True:
        t = increment(counters, CHANNEL_TASK)
        c0, c1 = t * block, min(C, (t + 1) * block)
        if c0 >= C:
            break
        clear(sums)
        if swept:
            collect(sums, partial, c0, c1)
        elif len(begin) > 0:
            for c in range(c0, c1):
                values[3, c] = shift_of(x, pilots, c * S)
            add_runs(
                sums, lane_sums, None, x, None, values, begin, length, weight, r.multiplier, None, c0, c1, C,
                S,
            )  # fmt: skip
        finish_moments(values, sums, c0, c1)
        finish_forward(values, x, r, c0, c1)
        if r.writes and blockwise:
            normalize_samples(y, mask, x, residual, values, 0, N, c0, c1, relu, nontemporal, C * S, C, S)
        increment(counters, CHANNELS_DONE)
    if r.writes and not blockwise:
        wait(counters, CHANNELS_DONE, -(-C // block))
        distance = PREFETCH_DISTANCE if nontemporal else 0
        while True:
            t = increment(counters, WRITE_TASK)
            if t >= tasks:
                break
            _, n0, n1, c0, c1 = sweep_task(t, N, C, sweep, spread)
            normalize_samples(y, mask, x, residual, values, n0, n1, c0, c1, relu, nontemporal, distance, C, S)
    if nontemporal:
        fence()


@loop()
def backward(r, dx, dresidual, dy, x, mask, relu):
    """dx = scale * g - p * (k0 + k1 * (x - shift)), where p is not 0 only in the runs; dresidual = g.

    dbias and dweight are sums over everything, or ``multiplier`` times those over the runs, or precomputed
    in ``total``: dx then holds scale * g and is repaired in the runs. ``repairs`` says whether a gradient
    flows through the statistics, ``full`` whether the runs are everything.
    """
    N, C, S, block, sweep, spread = r.N, r.C, r.S, r.block, r.sweep, r.spread
    begin, length, weight = runs_in(r)
    values, partial = array_at(r.values, (6, C), 0.0), array_at(r.partial, (2, r.groups, C), 0.0)
    total, counters = array_at(r.total, (2, C), 0.0), array_at(r.counters, (COUNTERS,), 0)
    scratch = thread_scratch(r, counters)
    writes, full = r.writes != 0, r.full != 0
    sampled, summed = r.sums_over == SAMPLE, r.sums_over != PRECOMPUTED
    nontemporal = writes and r.nontemporal != 0 and aligned(dx) and aligned(dresidual)
    # all of dx is written after the sums
    dense = writes and r.repairs != 0 and (full or N * S < RUN_REPAIR_ELEMENTS * len(begin))
    blockwise = dense and r.cached == 0
    p_stride = 0 if full else 1
    weights = array_at(scratch + r.weights, (LANES + p_stride * (S + LANES),), zero(x))
    fill(weights, cast(x, weight[0] if full else 0.0))
    size = max(block, sweep)
    sums, slopes = array_at(scratch + r.sums, (2, size), 0.0), array_at(scratch + r.slopes, (2, size), 0.0)
    lane_sums = array_at(scratch + r.lane_sums, (2, size * LANES), zero(x))
    clear(lane_sums)
    tasks = -(-C // sweep) * -(-N // spread)
    if not blockwise and summed and (not sampled or not dense):
        while True:
            t = increment(counters, SUM_TASK)
            if t >= tasks:
                break
            g, n0, n1, c0, c1 = sweep_task(t, N, C, sweep, spread)
            if sampled:
                for n in range(n0, n1 if writes else n0):
                    repair_sample(
                        dx, dresidual, dy, x, mask, values, None, weights, p_stride, n, c0, c1, relu,
                        nontemporal, PREFETCH_DISTANCE, C, S,
                    )  # fmt: skip
            else:
                clear(sums)
                if dense or not writes:
                    add_samples(
                        sums, lane_sums, None, None, dy, x, mask, values, n0, n1, c0, c1, relu, False,
                        PREFETCH_DISTANCE, C, S,
                    )  # fmt: skip
                else:
                    add_samples(
                        sums, lane_sums, dx, dresidual, dy, x, mask, values, n0, n1, c0, c1, relu,
                        nontemporal, PREFETCH_DISTANCE, C, S,
                    )  # fmt: skip
                store_partial(partial, g, sums, 1.0, c0, c1)
            increment(counters, SUMS_DONE)
        wait(counters, SUMS_DONE, tasks)
    while True:
        t = increment(counters, CHANNEL_TASK)
        c0, c1 = t * block, min(C, (t + 1) * block)
        if c0 >= C:
            break
        clear(sums)
        if sampled:
            add_runs(
                sums, lane_sums, dy, x, mask, values, begin, length, weight, r.multiplier, relu, c0, c1, C, S
            )
        elif blockwise and summed:
            add_samples(
                sums, lane_sums, None, None, dy, x, mask, values, 0, N, c0, c1, relu, False, C * S, C, S
            )
        elif summed:
            collect(sums, partial, c0, c1)
        if summed:
            finish_backward(total, sums, values, x, r, c0, c1)
        if blockwise:
            repair_samples(
                dx, dresidual, dy, x, mask, values, total, slopes, weights, p_stride, begin, length, weight,
                0, N, c0, c1, relu, nontemporal, C * S, C, S,
            )  # fmt: skip
        elif r.repairs and not dense:
            for k in range(len(begin)):
                if k == 0 or weight[k] != weight[k - 1]:
                    find_slopes(slopes, total, values, weight[k], c0, c1)
                repair_run(dx, dy, x, mask, values, slopes, begin[k], length[k], c0, c1, relu, C, S)
        increment(counters, CHANNELS_DONE)
    if dense and not blockwise:
        wait(counters, CHANNELS_DONE, -(-C // block))
        while True:
            t = increment(counters, WRITE_TASK)
            if t >= tasks:
                break
            _, n0, n1, c0, c1 = sweep_task(t, N, C, sweep, spread)
            repair_samples(
                dx, dresidual, dy, x, mask, values, total, slopes, weights, p_stride, begin, length, weight,
                n0, n1, c0, c1, relu, nontemporal, PREFETCH_DISTANCE, C, S,
            )  # fmt: skip
    if nontemporal:
        fence()


@loop()
def normalize_samples(y, mask, x, residual, values, n0, n1, c0, c1, relu, nontemporal, distance, C, S):
    """y and the mask of segments of samples n0 .. n1-1."""
    for n in range(n0, n1):
        normalize_segment(
            sample_of(y, n, C * S), sample_of(mask, n, mask_bytes(C, S)), sample_of(x, n, C * S),
            sample_of(residual, n, C * S), values, c0, c1, S, relu, nontemporal, distance,
        )  # fmt: skip


@loop()
def add_samples(
    sums, lane_sums, dx, dresidual, dy, x, mask, values, n0, n1, c0, c1, relu, nontemporal, distance, C, S
):  # fmt: skip
    """Add the sums over samples n0 .. n1-1; dx = scale * g, dresidual = g unless None."""
    interval = max(1, CHUNK // S)
    for n in range(n0, n1):
        last = n == n1 - 1 or (n - n0) % interval == interval - 1
        sums_segment(
            sums, lane_sums, 1.0, last, sample_of(dx, n, C * S), sample_of(dresidual, n, C * S),
            sample_of(dy, n, C * S), sample_of(x, n, C * S), sample_of(mask, n, mask_bytes(C, S)), values, c0,
            c1, S, relu, nontemporal, distance,
        )  # fmt: skip


@loop()
def repair_sample(
    dx, dresidual, dy, x, mask, values, slopes, p, p_stride, n, c0, c1, relu, nontemporal, distance, C, S
):  # fmt: skip
    """dx and dresidual of a sample's segment; p is 0 without slopes."""
    if dx is not None or dresidual is not None:
        repair_segment(
            sample_of(dx, n, C * S), sample_of(dresidual, n, C * S), sample_of(dy, n, C * S),
            sample_of(x, n, C * S), sample_of(mask, n, mask_bytes(C, S)), values, slopes, p, p_stride, c0, c1,
            S, relu, nontemporal, distance,
        )  # fmt: skip


@loop()
def repair_samples(
    dx, dresidual, dy, x, mask, values, total, slopes, weights, p_stride, begin, length, weight, n0, n1, c0,
    c1, relu, nontemporal, distance, C, S,
):  # fmt: skip
    """dx and dresidual of samples n0 .. n1-1, from the sums in total."""
    find_slopes(slopes, total, values, 1.0, c0, c1)
    k = 0
    while k < len(begin) and begin[k] < n0 * S:
        k += 1
    for n in range(n0, n1):
        if p_stride > 0:
            k = expand_weights(weights, begin, length, weight, k, n, S)
        repair_sample(
            dx, dresidual, dy, x, mask, values, slopes, weights, p_stride, n, c0, c1, relu, nontemporal,
            distance, C, S,
        )  # fmt: skip


@loop()
def expand_weights(row, begin, length, weight, k, n, S):
    """row = p of sample n as `repair_segment` takes it, from run k on; return the next sample's first run."""
    for i in range(len(row)):
        row[i] = 0
    while k < len(begin) and begin[k] < (n + 1) * S:
        first = LANES + begin[k] - n * S
        for i in range(first, first + length[k]):
            row[i] = weight[k]
        k += 1
    for i in range(LANES):  # vectors reach into the maps before and after this one
        row[i], row[LANES + S + i] = row[S + i], row[LANES + i]
    return k
