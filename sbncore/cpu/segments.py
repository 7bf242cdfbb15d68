"""Passes over channels-first memory with one set of coefficients for each channel: segments and runs.

A *segment* is the maps of channels c0 .. c1-1 of a sample, which follow each other in memory; a *run* is
some positions of the map of every channel c0 .. c1-1. Maps have 16 positions or more in segments, any
number in runs. A pass reads and writes what its head in `sbncore.cpu.channels_first` says, each element
once.

All arrays are a sample's own. Its memory is divided into vectors at the multiples of 16 from its first
element on, and so are the segments: only a sample's last vector may be partial. Where a map ends within a
vector, the *seam*, that vector takes the coefficients of both channels, blended; there are two at most.

``values`` holds the coefficients (`sbncore.cpu.per_channel`), in float64. A channel's sums stay in 16 lanes
of the arithmetic's type, in ``lane_sums``, from one sample to the next, until they are flushed to float64
``sums``.
"""

from __future__ import annotations

from numba import types
from numba.extending import overload

from sbncore.cpu.elements import cast, loop, sample_of
from sbncore.cpu.record import LANES
from sbncore.cpu.rows import normalize_vector, repair_few, repair_vector, sums_vector
from sbncore.cpu.tuning import LANE_TERMS, RUN_PREFETCH_DISTANCE
from sbncore.cpu.vectors import blend, broadcast, load_lanes, select, store_lanes, sum_lanes, zeros

CHUNK = LANES * LANE_TERMS  # elements between two flushes


@loop(forceinline=True)
def coefficients_of(x, values, c):
    """shift, scale and offset of a channel."""
    shift, scale, offset = cast(x, values[3, c]), cast(x, values[4, c]), cast(x, values[5, c])
    return broadcast(shift, 0, None), broadcast(scale, 0, None), broadcast(offset, 0, None)


def slopes_at(x, slopes, k):
    """k0 and k1 of the k-th channel; None of None."""


@overload(slopes_at, inline="always")
def _slopes_at(x, slopes, k):
    if isinstance(slopes, types.Array):
        return lambda x, slopes, k: (
            broadcast(cast(x, slopes[0, k]), 0, None), broadcast(cast(x, slopes[1, k]), 0, None)
        )  # fmt: skip
    return lambda x, slopes, k: (None, None)


@loop(forceinline=True)
def blended(k, before, after):
    """Coefficients of which the first k lanes are of one channel, the others of the next."""
    return blend(k, before[0], after[0]), blend(k, before[1], after[1]), blend(k, before[2], after[2])


@loop()
def normalize_segment(y, mask, x, residual, values, c0, c1, S, relu, nontemporal, distance):
    """y = act(z), and where there is a mask the bits of z > 0."""
    before = coefficients_of(x, values, c0)
    v, end = c0 * S, c0 * S
    for c in range(c0, c1):
        end += S
        whole = end & -LANES
        for u in range(v, whole, LANES):
            normalize_vector(
                y, mask, x, residual, u, 0, before[0], before[1], before[2], relu, nontemporal, distance, None
            )
        v = whole
        after = coefficients_of(x, values, min(c + 1, c1 - 1))
        if whole < end and c + 1 < c1:
            a, b, o = blended(end - whole, before, after)
            normalize_vector(y, mask, x, residual, v, 0, a, b, o, relu, nontemporal, distance, None)
            v += LANES
        before = after
    if v < end:
        active = 0, end - v
        normalize_vector(
            y, mask, x, residual, v, 0, before[0], before[1], before[2], relu, nontemporal, distance, active
        )


@loop()
def sums_segment(
    sums, lane_sums, p, flushes, dx, dresidual, dy, x, mask, values, c0, c1, S, relu, nontemporal, distance
):  # fmt: skip
    """Add g and g * (x - shift) to each channel's lanes, and if it ``flushes`` p times those to its sums.

    dx = scale * g, dresidual = g unless None. Without a dy g is x - shift.
    """
    first, second = lane_sums[0], lane_sums[1]
    before = coefficients_of(x, values, c0)
    v, end = c0 * S, c0 * S
    left, right = zeros(x), zeros(x)  # what a seam adds to the next channel
    for c in range(c0, c1):
        k = c - c0
        a, b = load_lanes(first, k * LANES, None) + left, load_lanes(second, k * LANES, None) + right
        left, right = zeros(x), zeros(x)
        end += S
        whole = end & -LANES
        while True:
            last = min(v + CHUNK, whole)
            for u in range(v, last, LANES):
                g, product = sums_vector(
                    dx, dresidual, dy, x, mask, u, before[0], before[1], before[2], relu, nontemporal,
                    distance, None,
                )  # fmt: skip
                a = a + g
                b = b + product
            v = last
            if v >= whole:
                break
            sums[0, k] += p * sum_lanes(a)
            sums[1, k] += p * sum_lanes(b)
            a, b = zeros(x), zeros(x)
        after = coefficients_of(x, values, min(c + 1, c1 - 1))
        if whole < end:
            active = 0, end - whole
            if c + 1 < c1:
                blend0, blend1, blend2 = blended(end - whole, before, after)
                g, product = sums_vector(
                    dx, dresidual, dy, x, mask, v, blend0, blend1, blend2, relu, nontemporal, distance, None
                )
                next_lanes = end - whole, LANES
                left, right = select(next_lanes, g), select(next_lanes, product)
                g, product = select(active, g), select(active, product)
                v += LANES
            else:
                g, product = sums_vector(
                    dx, dresidual, dy, x, mask, v, before[0], before[1], before[2], relu, nontemporal,
                    distance, active,
                )  # fmt: skip
            a = a + g
            b = b + product
        before = after
        if flushes:
            sums[0, k] += p * sum_lanes(a)
            sums[1, k] += p * sum_lanes(b)
            a, b = zeros(x), zeros(x)
        store_lanes(first, k * LANES, a, None, None)
        store_lanes(second, k * LANES, b, None, None)


@loop()
def repair_segment(
    dx, dresidual, dy, x, mask, values, slopes, p, p_stride, c0, c1, S, relu, nontemporal, distance
):  # fmt: skip
    """dx = scale * g - p * (k0 + k1 * (x - shift)), or scale * g without slopes; dresidual = g.

    p holds the map's positions from 16 before the first to 16 behind the last, round the map's ends
    (``p_stride`` 1), or 16 times what it is everywhere (0).
    """
    before, slope = coefficients_of(x, values, c0), slopes_at(x, slopes, 0)
    v, end = c0 * S, c0 * S
    for c in range(c0, c1):
        begin = end - LANES
        end += S
        whole = end & -LANES
        for u in range(v, whole, LANES):
            repair_vector(
                dx, dresidual, dy, x, mask, u, (u - begin) * p_stride, before[0], before[1], before[2],
                slope[0], slope[1], p, relu, nontemporal, distance, None,
            )  # fmt: skip
        v, n, k = whole, min(c + 1, c1 - 1), end - whole
        after, next_slope = coefficients_of(x, values, n), slopes_at(x, slopes, n - c0)
        if whole < end and c + 1 < c1:
            shift, scale, offset = blended(k, before, after)
            repair_vector(
                dx, dresidual, dy, x, mask, v, (v - begin) * p_stride, shift, scale, offset,
                blend(k, slope[0], next_slope[0]), blend(k, slope[1], next_slope[1]), p, relu, nontemporal,
                distance, None,
            )  # fmt: skip
            v += LANES
        elif v < end:
            repair_vector(
                dx, dresidual, dy, x, mask, v, (v - begin) * p_stride, before[0], before[1], before[2],
                slope[0], slope[1], p, relu, nontemporal, distance, (0, k),
            )  # fmt: skip
        before, slope = after, next_slope


@loop()
def mask_bytes(C, S):
    """Return the bytes of a sample's mask: a bit for each element, in words of 16."""
    return 2 * ((C * S + LANES - 1) // LANES)


@loop()
def add_runs(sums, lane_sums, dy, x, mask, values, begin, length, weight, multiplier, relu, c0, c1, C, S):
    """Add the sums of g and g * (x - shift) over the runs, each times its weight and ``multiplier``."""
    pending = 0  # terms of a lane since the last flush
    for k in range(len(begin)):
        n, p, whole_map = begin[k] // S, weight[k] * multiplier, length[k] == S
        x_n, dy_n = sample_of(x, n, C * S), sample_of(dy, n, C * S)
        mask_n = sample_of(mask, n, mask_bytes(C, S))
        pending += (length[k] + LANES - 1) // LANES
        last = pending >= LANE_TERMS or k == len(begin) - 1 or weight[k + 1] != weight[k]
        if whole_map:
            sums_segment(
                sums, lane_sums, p, last, None, None, dy_n, x_n, mask_n, values, c0, c1, S, relu, False, C * S
            )
        else:
            first = begin[k] - n * S
            for o in range(0, length[k], CHUNK):
                size = min(CHUNK, length[k] - o)
                add_run(lane_sums, dy_n, x_n, mask_n, values, first + o, size, c0, c1, relu, S)
                if last or o + size < length[k]:
                    flush_lanes(sums, lane_sums, p, c1 - c0)
        pending = 0 if last else pending


@loop()
def add_run(lane_sums, dy, x, mask, values, first, length, c0, c1, relu, S):
    """Add a run of every channel to its lanes: sums of each alone take twice as long."""
    distance, whole = S * (1 + RUN_PREFETCH_DISTANCE // length), length & -LANES
    for c in range(c0, c1):
        o, i = c * S + first, (c - c0) * LANES
        shift, scale, offset = coefficients_of(x, values, c)
        a, b = load_lanes(lane_sums[0], i, None), load_lanes(lane_sums[1], i, None)
        for v in range(o, o + whole, LANES):
            g, product = sums_vector(
                None, None, dy, x, mask, v, shift, scale, offset, relu, False, distance, None
            )
            a = a + g
            b = b + product
        if whole < length:
            active = 0, length - whole
            g, product = sums_vector(
                None, None, dy, x, mask, o + whole, shift, scale, offset, relu, False, distance, active
            )
            a = a + g
            b = b + product
        store_lanes(lane_sums[0], i, a, None, None)
        store_lanes(lane_sums[1], i, b, None, None)


@loop()
def flush_lanes(sums, lane_sums, p, channels):
    """Add p times every channel's lanes to its sums, and clear the lanes."""
    for k in range(2):
        for c in range(channels):
            sums[k, c] += p * sum_lanes(load_lanes(lane_sums[k], c * LANES, None))
            for i in range(c * LANES, (c + 1) * LANES):
                lane_sums[k, i] = 0


@loop()
def repair_run(dx, dy, x, mask, values, slopes, place, length, c0, c1, relu, C, S):
    """Write dx in a run of every channel, with p in the slopes.

    Vectors overlap, since what they write does not depend on dx; but where a run is shorter than a vector,
    its vector lies within the block's memory and writes the other elements as they are.
    """
    n = place // S
    dx_n, mask_n = sample_of(dx, n, C * S), sample_of(mask, n, mask_bytes(C, S))
    x_n, dy_n = sample_of(x, n, C * S), sample_of(dy, n, C * S)
    distance, first = S * (1 + RUN_PREFETCH_DISTANCE // length), place - n * S
    for c in range(c0, c1):
        shift, scale, offset = coefficients_of(x, values, c)
        k0, k1 = slopes_at(x, slopes, c - c0)
        o = first + c * S
        if length < LANES:
            v = min(o, c1 * S - LANES)
            repair_few(
                dx_n, dy_n, x_n, mask_n, v, o - v, o - v + length, shift, scale, offset, k0, k1, relu,
                distance,
            )  # fmt: skip
            continue
        for v in range(o, o + length, LANES):
            repair_vector(
                dx_n, None, dy_n, x_n, mask_n, min(v, o + length - LANES), 0, shift, scale, offset, k0, k1,
                None, relu, False, distance, None,
            )  # fmt: skip
