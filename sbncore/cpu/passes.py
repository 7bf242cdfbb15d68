"""What channels-first kernels do in memory: passes over segments of samples, and over runs of channels."""

from __future__ import annotations

from sbncore.cpu.channels import find_slopes
from sbncore.cpu.compiled import loop
from sbncore.cpu.elements import sample_of
from sbncore.cpu.lanes import LANES, load_lanes, total
from sbncore.cpu.rows import CHUNK, repair_few, repair_vector, sums_vector
from sbncore.cpu.segments import (
    coefficients_of,
    normalize_segment,
    repair_segment,
    slopes_at,
    sums_segment,
)
from sbncore.cpu.stores import store_lanes

FLUSH = CHUNK // LANES  # values that a lane sums up in float32
AHEAD = 512  # elements: how long before they are used scattered runs are fetched


@loop()
def mask_bytes(C, S):
    """How many bytes of a mask a sample has."""
    return 2 * ((C * S + LANES - 1) // LANES)


@loop()
def part_of(t, N, C, sweep, spread):
    """The t-th task of a sweep: of which group of samples, these, and the channels."""
    across = (C + sweep - 1) // sweep
    g, c0 = t // across, t % across * sweep
    return g, g * spread, min(N, (g + 1) * spread), c0, min(C, c0 + sweep)


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
def keep(partial, g, sums, p, c0, c1):
    """Put a sweep's sums, times p, where `collect` finds them."""
    for k in range(2):
        for c in range(c0, c1):
            partial[k, g, c] = p * sums[k, c - c0]


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
