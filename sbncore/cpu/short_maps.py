"""Kernels over channels-first memory, (N, C, S), of maps of fewer than 16 positions.

A call has one phase, whose tasks are blocks of ``block`` channels over all samples::

    forward   sums over the runs, moments, coefficients; y, mask     reads the sample, then x; writes y
    backward  sums over the runs or everything; dx, dresidual        reads dy and x twice; writes dx

What is read twice is in a cache the second time. A residual is one more array read, dresidual one more
written. A sample's maps of a block are one row (`sbncore.cpu.rows`), whose coefficients are expanded to one
for each element: a vector has to do with several channels.

Sums: float32 (float64 for float64) for LANE_TERMS terms of one element's place in the row, or of one of a
channel's 16 lanes; float64 beyond. Results do not depend on the threads.
"""

from __future__ import annotations

from sbncore.cpu.elements import array_at, cast, loop, sample_of, zero
from sbncore.cpu.per_channel import (
    clear,
    find_pilots,
    find_slopes,
    finish_backward,
    finish_forward,
    finish_moments,
    shift_of,
)
from sbncore.cpu.record import CHANNEL_TASK, COUNTERS, LANES, PRECOMPUTED, SAMPLE
from sbncore.cpu.rows import add_row, normalize_row, repair_row, sum_range
from sbncore.cpu.runs import runs_in
from sbncore.cpu.segments import add_run, flush_lanes, mask_bytes
from sbncore.cpu.tasks import increment, thread_scratch
from sbncore.cpu.tuning import LANE_TERMS, PILOTS
from sbncore.cpu.vectors import aligned, fence


@loop()
def forward(r, y, mask, x, residual, relu):
    """As `sbncore.cpu.channels_first.forward`."""
    N, C, S, block = r.N, r.C, r.S, r.block
    begin, length, weight = runs_in(r)
    values, counters = array_at(r.values, (6, C), 0.0), array_at(r.counters, (COUNTERS,), 0)
    scratch = thread_scratch(r, counters)
    nontemporal = r.nontemporal != 0 and aligned(y)
    sums = array_at(scratch + r.sums, (2, block), 0.0)
    lane_sums = array_at(scratch + r.lane_sums, (2, block * LANES), zero(x))
    rows = array_at(scratch + r.rows, (3, block * S), zero(x))
    clear(lane_sums)
    clear(rows)
    shift, scale, offset = rows[0], rows[1], rows[2]
    pilots = array_at(scratch + r.pilots, (min(PILOTS, len(begin)),), 0)
    find_pilots(pilots, r, begin, length, False)
    while True:
        c0 = increment(counters, CHANNEL_TASK) * block
        if c0 >= C:
            break
        c1 = min(C, c0 + block)
        clear(sums)
        if len(begin) > 0:
            for c in range(c0, c1):
                values[3, c] = shift_of(x, pilots, c * S)
            expand(shift, values[3], c0, c1, S)
            add_runs(
                sums, lane_sums, None, x, None, values, shift, None, None, begin, length, weight,
                r.multiplier, None, c0, c1, C, S,
            )  # fmt: skip
        finish_moments(values, sums, c0, c1)
        finish_forward(values, x, r, c0, c1)
        if r.writes:
            for k in range(3):
                expand(rows[k], values[3 + k], c0, c1, S)
            for n in range(N):
                normalize_row(
                    sample_of(y, n, C * S), sample_of(mask, n, mask_bytes(C, S)), sample_of(x, n, C * S),
                    sample_of(residual, n, C * S), c0 * S, c1 * S, shift, scale, offset, relu, nontemporal,
                    C * S,
                )  # fmt: skip
    if nontemporal:
        fence()


@loop()
def expand(row, values, c0, c1, S):
    """row = a block's values, each S times over."""
    for c in range(c0, c1):
        for i in range((c - c0) * S, (c - c0 + 1) * S):
            row[i] = values[c]


@loop()
def add_runs(
    sums, lane_sums, dy, x, mask, values, shift, scale, offset, begin, length, weight, multiplier, relu, c0,
    c1, C, S,
):  # fmt: skip
    """Add the sums of g and g * (x - shift) over the runs, each times its weight and ``multiplier``."""
    pending = 0  # runs not yet in sums
    for k in range(len(begin)):
        n, p, whole_map = begin[k] // S, weight[k] * multiplier, length[k] == S
        x_n, dy_n = sample_of(x, n, C * S), sample_of(dy, n, C * S)
        mask_n = sample_of(mask, n, mask_bytes(C, S))
        pending += 1
        last = pending == LANE_TERMS or k == len(begin) - 1
        last = last or weight[k + 1] != weight[k] or length[k + 1] != length[k]
        if whole_map:
            add_row(
                (lane_sums[0], lane_sums[1]), None, None, dy_n, x_n, mask_n, c0 * S, c1 * S, shift, scale,
                offset, relu, False, C * S,
            )  # fmt: skip
        else:
            add_run(lane_sums, dy_n, x_n, mask_n, values, begin[k] - n * S, length[k], c0, c1, relu, S)
        if last:
            pending = 0
            if whole_map:
                flush_rows(sums, lane_sums, p, c1 - c0, S)
            else:
                flush_lanes(sums, lane_sums, p, c1 - c0)


@loop()
def flush_rows(sums, row_sums, p, channels, S):
    """Add p times the sum of each channel's S elements of the rows to its sums, and clear the rows."""
    for k in range(2):
        for c in range(channels):
            sums[k, c] += p * sum_range(row_sums[k], c * S, (c + 1) * S)
            for i in range(c * S, (c + 1) * S):
                row_sums[k, i] = 0


@loop()
def backward(r, dx, dresidual, dy, x, mask, relu):
    """As `sbncore.cpu.channels_first.backward`; with precomputed sums too all of dx is written."""
    N, C, S, block = r.N, r.C, r.S, r.block
    begin, length, weight = runs_in(r)
    values, total = array_at(r.values, (6, C), 0.0), array_at(r.total, (2, C), 0.0)
    counters = array_at(r.counters, (COUNTERS,), 0)
    scratch = thread_scratch(r, counters)
    summed = r.sums_over != PRECOMPUTED
    nontemporal = r.writes != 0 and r.nontemporal != 0 and aligned(dx) and aligned(dresidual)
    sums, slopes = array_at(scratch + r.sums, (2, block), 0.0), array_at(scratch + r.slopes, (2, block), 0.0)
    lane_sums = array_at(scratch + r.lane_sums, (2, block * LANES), zero(x))
    rows = array_at(scratch + r.rows, (6, block * S), zero(x))
    clear(lane_sums)
    clear(rows)
    shift, scale, offset, k0, k1, p = rows[0], rows[1], rows[2], rows[3], rows[4], rows[5]
    while True:
        c0 = increment(counters, CHANNEL_TASK) * block
        if c0 >= C:
            break
        c1 = min(C, c0 + block)
        clear(sums)
        for k in range(3):
            expand(rows[k], values[3 + k], c0, c1, S)
        if r.sums_over == SAMPLE:
            add_runs(
                sums, lane_sums, dy, x, mask, values, shift, scale, offset, begin, length, weight,
                r.multiplier, relu, c0, c1, C, S,
            )  # fmt: skip
        elif summed:
            for n in range(N):
                add_row(
                    (lane_sums[0], lane_sums[1]), None, None, sample_of(dy, n, C * S), sample_of(x, n, C * S),
                    sample_of(mask, n, mask_bytes(C, S)), c0 * S, c1 * S, shift, scale, offset, relu, False,
                    C * S,
                )  # fmt: skip
                if n == N - 1 or n % LANE_TERMS == LANE_TERMS - 1:
                    flush_rows(sums, lane_sums, 1.0, c1 - c0, S)
        if summed:
            finish_backward(total, sums, values, x, r, c0, c1)
        if not r.writes:
            continue
        find_slopes(slopes, total, values, 1.0, c0, c1)
        expand(k0, slopes[0], 0, c1 - c0, S)
        expand(k1, slopes[1], 0, c1 - c0, S)
        k = 0
        for n in range(N):
            k = expand_weights(p, begin, length, weight, k if r.repairs else len(begin), n, c1 - c0, S)
            repair_row(
                sample_of(dx, n, C * S), sample_of(dresidual, n, C * S), sample_of(dy, n, C * S),
                sample_of(x, n, C * S), sample_of(mask, n, mask_bytes(C, S)), c0 * S, c1 * S, shift, scale,
                offset, k0, k1, p, relu, nontemporal, C * S,
            )  # fmt: skip
    if nontemporal:
        fence()


@loop()
def expand_weights(row, begin, length, weight, k, n, channels, S):
    """row = p of sample n for every element of a segment, from run k on; return the next sample's first."""
    for i in range(len(row)):
        row[i] = 0
    while k < len(begin) and begin[k] < (n + 1) * S:
        p = cast(row, weight[k])
        for c in range(channels):
            first = c * S + begin[k] - n * S
            for i in range(first, first + length[k]):
                row[i] = p
        k += 1
    return k
