"""One pass over a segment, channels-first: the maps of channels c0 .. c1-1 of a sample, that lie in a row.

All arrays are a sample's own. Its memory is cut into vectors at the multiples of 16 from its first element
on, and so are the segments, so that only a sample's last vector can be a part of one. Where a map ends within
a vector, the *seam*, that takes the coefficients of both channels, blended: a vector has to do with two maps
at most, of 16 positions or more.

``values`` holds the coefficients (`sbncore.cpu.per_channel`), in float64. The sums of a channel stay in 16
lanes, from one sample to the next, until they are flushed.
"""

from __future__ import annotations

from numba import types
from numba.extending import overload

from sbncore.cpu.elements import cast, loop, sample_of
from sbncore.cpu.record import LANES
from sbncore.cpu.rows import normalize_vector, repair_few, repair_vector, sums_vector
from sbncore.cpu.tuning import LANE_TERMS, RUN_PREFETCH_DISTANCE
from sbncore.cpu.vectors import at, blend, load_lanes, nothing, store_lanes, total, where

CHUNK = LANES * LANE_TERMS


@loop(forceinline=True)
def coefficients_of(x, values, c):
    """shift, scale and offset of a channel."""
    shift, scale, offset = cast(x, values[3, c]), cast(x, values[4, c]), cast(x, values[5, c])
    return at(shift, 0, None), at(scale, 0, None), at(offset, 0, None)


def slopes_at(x, slopes, k):
    """k0 and k1 of the k-th channel; None of None."""


@overload(slopes_at, inline="always")
def _slopes_at(x, slopes, k):
    if isinstance(slopes, types.Array):
        return lambda x, slopes, k: (at(cast(x, slopes[0, k]), 0, None), at(cast(x, slopes[1, k]), 0, None))
    return lambda x, slopes, k: (None, None)


@loop(forceinline=True)
def blended(k, before, after):
    """Coefficients of which the first k lanes are of one channel, the others of the next."""
    return blend(k, before[0], after[0]), blend(k, before[1], after[1]), blend(k, before[2], after[2])


@loop()
def normalize_segment(y, mask, x, residual, values, c0, c1, S, relu, stream, ahead):
    """y = act(z), and where there is a mask the bits of z > 0."""
    now = coefficients_of(x, values, c0)
    v, end = c0 * S, c0 * S
    for c in range(c0, c1):
        end += S
        whole = end & -LANES
        for u in range(v, whole, LANES):
            normalize_vector(y, mask, x, residual, u, 0, now[0], now[1], now[2], relu, stream, ahead, None)
        v = whole
        following = coefficients_of(x, values, min(c + 1, c1 - 1))
        if whole < end and c + 1 < c1:
            a, b, o = blended(end - whole, now, following)
            normalize_vector(y, mask, x, residual, v, 0, a, b, o, relu, stream, ahead, None)
            v += LANES
        now = following
    if v < end:
        keep = 0, end - v
        normalize_vector(y, mask, x, residual, v, 0, now[0], now[1], now[2], relu, stream, ahead, keep)


@loop()
def sums_segment(sums, lanes, p, flushes, dx, dresidual, dy, x, mask, values, c0, c1, S, relu, stream, ahead):
    """Add g and g * (x - shift) to each channel's lanes, and if it ``flushes`` p times those to its sums.

    dx = scale * g, dresidual = g where given. Without a dy g is x - shift.
    """
    first, second = lanes[0], lanes[1]
    now = coefficients_of(x, values, c0)
    v, end = c0 * S, c0 * S
    left, right = nothing(x), nothing(x)  # what a seam adds to the next channel
    for c in range(c0, c1):
        k = c - c0
        a, b = load_lanes(first, k * LANES, None) + left, load_lanes(second, k * LANES, None) + right
        left, right = nothing(x), nothing(x)
        end += S
        whole = end & -LANES
        while True:
            last = min(v + CHUNK, whole)
            for u in range(v, last, LANES):
                g, product = sums_vector(
                    dx, dresidual, dy, x, mask, u, now[0], now[1], now[2], relu, stream, ahead, None
                )
                a = a + g
                b = b + product
            v = last
            if v >= whole:
                break
            sums[0, k] += p * total(a)
            sums[1, k] += p * total(b)
            a, b = nothing(x), nothing(x)
        following = coefficients_of(x, values, min(c + 1, c1 - 1))
        if whole < end:
            keep = 0, end - whole
            if c + 1 < c1:
                blend0, blend1, blend2 = blended(end - whole, now, following)
                g, product = sums_vector(
                    dx, dresidual, dy, x, mask, v, blend0, blend1, blend2, relu, stream, ahead, None
                )
                rest = end - whole, LANES
                left, right = where(rest, g), where(rest, product)
                g, product = where(keep, g), where(keep, product)
                v += LANES
            else:
                g, product = sums_vector(
                    dx, dresidual, dy, x, mask, v, now[0], now[1], now[2], relu, stream, ahead, keep
                )
            a = a + g
            b = b + product
        now = following
        if flushes:
            sums[0, k] += p * total(a)
            sums[1, k] += p * total(b)
            a, b = nothing(x), nothing(x)
        store_lanes(first, k * LANES, a, None, None)
        store_lanes(second, k * LANES, b, None, None)


@loop()
def repair_segment(dx, dresidual, dy, x, mask, values, slopes, p, turn, c0, c1, S, relu, stream, ahead):
    """dx = scale * g - p * (k0 + k1 * (x - shift)), or scale * g without slopes; dresidual = g.

    p holds the map's positions from 16 before the first to 16 behind the last, round (``turn`` is 1), or 16
    times what it is everywhere (0).
    """
    now, bent = coefficients_of(x, values, c0), slopes_at(x, slopes, 0)
    v, end = c0 * S, c0 * S
    for c in range(c0, c1):
        begin = end - LANES
        end += S
        whole = end & -LANES
        for u in range(v, whole, LANES):
            repair_vector(
                dx, dresidual, dy, x, mask, u, (u - begin) * turn, now[0], now[1], now[2], bent[0], bent[1],
                p, relu, stream, ahead, None,
            )  # fmt: skip
        v, n, k = whole, min(c + 1, c1 - 1), end - whole
        following, bending = coefficients_of(x, values, n), slopes_at(x, slopes, n - c0)
        if whole < end and c + 1 < c1:
            shift, scale, offset = blended(k, now, following)
            repair_vector(
                dx, dresidual, dy, x, mask, v, (v - begin) * turn, shift, scale, offset,
                blend(k, bent[0], bending[0]), blend(k, bent[1], bending[1]), p, relu, stream, ahead, None,
            )  # fmt: skip
            v += LANES
        elif v < end:
            repair_vector(
                dx, dresidual, dy, x, mask, v, (v - begin) * turn, now[0], now[1], now[2], bent[0], bent[1],
                p, relu, stream, ahead, (0, k),
            )  # fmt: skip
        now, bent = following, bending


@loop()
def mask_bytes(C, S):
    """How many bytes of a mask a sample has."""
    return 2 * ((C * S + LANES - 1) // LANES)


@loop()
def add_runs(sums, lanes, dy, x, mask, values, begin, length, weight, scale, relu, c0, c1, C, S):
    """Add the sums of g and g * (x - shift) over the runs, each times its weight and ``scale``."""
    held = 0  # what each lane has summed up
    for r in range(len(begin)):
        n, p, whole = begin[r] // S, weight[r] * scale, length[r] == S
        source, upper = sample_of(x, n, C * S), sample_of(dy, n, C * S)
        bits = sample_of(mask, n, mask_bytes(C, S))
        held += (length[r] + LANES - 1) // LANES
        last = held >= LANE_TERMS or r == len(begin) - 1 or weight[r + 1] != weight[r]
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
    ahead, whole = S * (1 + RUN_PREFETCH_DISTANCE // length), length & -LANES
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


@loop()
def repair_run(dx, dy, x, mask, values, slopes, place, length, c0, c1, relu, C, S):
    """Write dx in a run of every channel, with p in the slopes.

    Vectors overlap, since what they write does not depend on what they find; but where a run is shorter than
    one, its vector lies within the block's memory, and its other elements stay.
    """
    n = place // S
    target, bits = sample_of(dx, n, C * S), sample_of(mask, n, mask_bytes(C, S))
    source, upper = sample_of(x, n, C * S), sample_of(dy, n, C * S)
    ahead, first = S * (1 + RUN_PREFETCH_DISTANCE // length), place - n * S
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
