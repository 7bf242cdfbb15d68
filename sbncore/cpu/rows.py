"""One pass over a row: consecutive elements in all the arrays, with what is computed of each.

The coefficients are scalars where a row is of one channel, else arrays of the row's length.

Coefficients, in the type of the arithmetic: ``z = (x - shift) * scale + offset (+ residual)``. Here shift is
the mean rounded to that type and offset makes up for the rounding: at |mean|/std of 1e6 the folded form
``x * scale + offset`` loses 5 %. Nothing is contracted or reordered, so that the backward's sign of z is the
forward's, bit for bit.

A row is cut into vectors at the arrays' multiples of 16, wherever the memory lies, so that streamed stores
fill whole lines. Of the first and the last vector only some lanes are kept. Rows that are added to others
are cut from their first element on. A mask's bit e is the arrays' element e's; rows that are written
together with it begin at whole words.

What a pass will read ``ahead`` by so many elements is fetched meanwhile: the CPU foresees no jumps.

Arrays that may be missing, and relu, are None or not at compile time, which prunes the branches.
"""

from __future__ import annotations

from sbncore.cpu.elements import loop
from sbncore.cpu.record import LANES
from sbncore.cpu.vectors import (
    above_zero,
    at,
    blend,
    load_lanes,
    prefetch,
    read_bits,
    store_lanes,
    total,
    where,
    write_bits,
)


@loop()
def gradient(dy, x, mask, v, i, shift, scale, offset, relu, keep):
    """g, dy behind the activation, and x - shift; without a dy g is that too: its sums are the moments."""
    deviation = load_lanes(x, v, keep) - at(shift, i, keep)
    if dy is None:
        g = where(keep, deviation)
    else:
        g = load_lanes(dy, v, keep)
        if mask is not None:
            g = where(read_bits(mask, v), g)
        elif relu is not None:
            g = where(above_zero(deviation * at(scale, i, keep) + at(offset, i, keep)), g)
    return g, deviation


@loop()
def edge(o, end, k):
    """The first (k = 0) or last vector of a row that is written, and its lanes, if they are not all of it."""
    v = (o if k == 0 else end) & -LANES
    partial = o > v if k == 0 else end > v >= o
    return partial, v, (max(0, o - v), min(LANES, end - v))


@loop()
def fetch(a, b, v):
    if a is not None:
        prefetch(a, v)
    prefetch(b, v)


@loop()
def sums_vector(dx, dresidual, dy, x, mask, v, shift, scale, offset, relu, stream, ahead, keep):
    fetch(dy, x, v + ahead)
    g, deviation = gradient(dy, x, mask, v, 0, shift, scale, offset, relu, keep)
    if dx is not None:
        store_lanes(dx, v, g * at(scale, 0, keep), keep, stream)
    if dresidual is not None:
        store_lanes(dresidual, v, g, keep, stream)
    return g, g * deviation


@loop()
def add_vector(totals, dx, dresidual, dy, x, mask, v, i, shift, scale, offset, relu, stream, ahead, keep):
    fetch(dy, x, v + ahead)
    g, deviation = gradient(dy, x, mask, v, i, shift, scale, offset, relu, keep)
    if dx is not None:
        store_lanes(dx, v, g * at(scale, i, keep), keep, stream)
    if dresidual is not None:
        store_lanes(dresidual, v, g, keep, stream)
    store_lanes(totals[0], i, load_lanes(totals[0], i, keep) + g, keep, None)
    store_lanes(totals[1], i, load_lanes(totals[1], i, keep) + g * deviation, keep, None)


@loop(forceinline=True)
def add_row(totals, dx, dresidual, dy, x, mask, o, end, shift, scale, offset, relu, stream, ahead):
    """Add g and g * (x - shift) of each element to totals; dx = scale * g, dresidual = g where given."""
    whole = o + ((end - o) & -LANES)
    for v in range(o, whole, LANES):
        add_vector(
            totals, dx, dresidual, dy, x, mask, v, v - o, shift, scale, offset, relu, stream, ahead, None
        )
    if whole < end:
        keep = 0, end - whole
        add_vector(
            totals, dx, dresidual, dy, x, mask, whole, whole - o, shift, scale, offset, relu, stream, ahead,
            keep,
        )  # fmt: skip


@loop(forceinline=True)
def sum_of(array, o, end):
    """The sum of an array's elements o .. end-1, in float64."""
    result = 0.0
    whole = o + ((end - o) & -LANES)
    for v in range(o, whole, LANES):
        result += total(load_lanes(array, v, None))
    if whole < end:
        result += total(load_lanes(array, whole, (0, end - whole)))
    return result


@loop()
def normalize_vector(y, mask, x, residual, v, i, shift, scale, offset, relu, stream, ahead, keep):
    fetch(residual, x, v + ahead)
    z = (load_lanes(x, v, keep) - at(shift, i, keep)) * at(scale, i, keep) + at(offset, i, keep)
    if residual is not None:
        z = z + load_lanes(residual, v, keep)
    if relu is not None:
        bits = above_zero(z)  # of a NaN too, which passes
        z = where(bits, z)
        if mask is not None:
            write_bits(mask, v >> 4, bits)
    store_lanes(y, v, z, keep, stream)


@loop(forceinline=True)
def normalize_row(y, mask, x, residual, o, end, shift, scale, offset, relu, stream, ahead):
    """y = act(z), and where there is a mask the bits of z > 0."""
    for v in range((o + LANES - 1) & -LANES, end & -LANES, LANES):
        normalize_vector(y, mask, x, residual, v, v - o, shift, scale, offset, relu, stream, ahead, None)
    for k in range(2):
        partial, v, keep = edge(o, end, k)
        if partial:
            normalize_vector(y, mask, x, residual, v, v - o, shift, scale, offset, relu, stream, ahead, keep)


@loop()
def bent_by(p, i, keep, bend):
    """p * bend, and 0 where p is, whatever the sums have become; without a p it is in the bend."""
    if p is None:
        return bend
    weights = at(p, i, keep)
    return where(above_zero(weights), weights * bend)


@loop()
def repair_vector(
    dx, dresidual, dy, x, mask, v, i, shift, scale, offset, k0, k1, p, relu, stream, ahead, keep
):  # fmt: skip
    fetch(x, dy, v + ahead)
    g, deviation = gradient(dy, x, mask, v, i, shift, scale, offset, relu, keep)
    if dx is not None:
        d = g * at(scale, i, keep)
        if k0 is not None:
            bend = at(k0, i, keep) + deviation * at(k1, i, keep)
            d = d - bent_by(p, i, keep, bend)
        store_lanes(dx, v, d, keep, stream)
    if dresidual is not None:
        store_lanes(dresidual, v, g, keep, stream)


@loop()
def repair_few(dx, dy, x, mask, v, first, end, shift, scale, offset, k0, k1, relu, ahead):
    """`repair_vector` of lanes first .. end-1, with p in k0 and k1; the others are written as they are."""
    fetch(x, dy, v + ahead)
    g, deviation = gradient(dy, x, mask, v, 0, shift, scale, offset, relu, None)
    d, before = g * at(scale, 0, None) - (k0 + deviation * k1), load_lanes(dx, v, None)
    store_lanes(dx, v, blend(first, before, blend(end, d, before)), None, None)


@loop(forceinline=True)
def repair_row(dx, dresidual, dy, x, mask, o, end, shift, scale, offset, k0, k1, p, relu, stream, ahead):
    """dx = scale * g - p * (k0 + k1 * (x - shift)), or scale * g without a k0; dresidual = g."""
    for v in range((o + LANES - 1) & -LANES, end & -LANES, LANES):
        repair_vector(
            dx, dresidual, dy, x, mask, v, v - o, shift, scale, offset, k0, k1, p, relu, stream, ahead, None
        )
    for k in range(2):
        partial, v, keep = edge(o, end, k)
        if partial:
            repair_vector(
                dx, dresidual, dy, x, mask, v, v - o, shift, scale, offset, k0, k1, p, relu, stream, ahead,
                keep,
            )  # fmt: skip
