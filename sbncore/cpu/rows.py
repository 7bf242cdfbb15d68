"""Vectors of 16 elements with what is computed of each element, and passes over rows of them.

A *row* is consecutive elements in all the arrays, with coefficients that are arrays of the row's length.
The functions of a vector take such arrays, or one channel's scalars, or vectors (`sbncore.cpu.segments`).
Each element is read once in every array, and written once.

In the type of the arithmetic, ``z = (x - shift) * scale + offset (+ residual)``: shift is the mean rounded
to that type and offset makes up for the rounding; at |mean|/std of 1e6 the folded form ``x * scale +
offset`` loses 5 %. Nothing is contracted or reordered, so that the backward's sign of z is the forward's,
bit for bit. Sums over rows are added element by element, in two rows of their own.

A row that is written is divided into vectors at the arrays' multiples of 16, wherever the memory lies, so
that non-temporal stores fill whole cache lines; of its first and last vector only some lanes may be active.
A row that is added to others is divided from its first element on. A mask's bit e is the arrays' element
e's; rows that are written together with it begin at whole words. ``distance`` elements further on is
prefetched: the CPU foresees no jumps.

Arrays that may be missing, and relu, are None or not at compile time, which prunes the branches. Indices: v
is a vector's first element in the arrays, i in the coefficients.
"""

from __future__ import annotations

from sbncore.cpu.elements import loop
from sbncore.cpu.record import LANES
from sbncore.cpu.vectors import (
    above_zero,
    blend,
    broadcast,
    load_lanes,
    prefetch,
    read_bits,
    select,
    store_lanes,
    sum_lanes,
    write_bits,
)


@loop()
def gradient(dy, x, mask, v, i, shift, scale, offset, relu, active):
    """g, the gradient before the activation, and x - shift; without a dy both are x - shift, for moments."""
    deviation = load_lanes(x, v, active) - broadcast(shift, i, active)
    if dy is None:
        g = select(active, deviation)
    else:
        g = load_lanes(dy, v, active)
        if mask is not None:
            g = select(read_bits(mask, v), g)
        elif relu is not None:
            g = select(above_zero(deviation * broadcast(scale, i, active) + broadcast(offset, i, active)), g)
    return g, deviation


@loop()
def partial_vector(o, end, k):
    """Whether a row's first (k = 0) or last vector is partial, where it begins, and its active lanes."""
    v = (o if k == 0 else end) & -LANES
    partial = o > v if k == 0 else end > v >= o
    return partial, v, (max(0, o - v), min(LANES, end - v))


@loop()
def prefetch_inputs(a, b, v):
    """Prefetch the cache lines of element v of two arrays."""
    if a is not None:
        prefetch(a, v)
    prefetch(b, v)


@loop()
def sums_vector(dx, dresidual, dy, x, mask, v, shift, scale, offset, relu, nontemporal, distance, active):
    """Return g and g * (x - shift) of a vector; dx = scale * g, dresidual = g unless None."""
    prefetch_inputs(dy, x, v + distance)
    g, deviation = gradient(dy, x, mask, v, 0, shift, scale, offset, relu, active)
    if dx is not None:
        store_lanes(dx, v, g * broadcast(scale, 0, active), active, nontemporal)
    if dresidual is not None:
        store_lanes(dresidual, v, g, active, nontemporal)
    return g, g * deviation


@loop()
def add_vector(
    row_sums, dx, dresidual, dy, x, mask, v, i, shift, scale, offset, relu, nontemporal, distance, active
):  # fmt: skip
    """Do `add_row` of the vector at element v, the i-th of the row."""
    prefetch_inputs(dy, x, v + distance)
    g, deviation = gradient(dy, x, mask, v, i, shift, scale, offset, relu, active)
    if dx is not None:
        store_lanes(dx, v, g * broadcast(scale, i, active), active, nontemporal)
    if dresidual is not None:
        store_lanes(dresidual, v, g, active, nontemporal)
    store_lanes(row_sums[0], i, load_lanes(row_sums[0], i, active) + g, active, None)
    store_lanes(row_sums[1], i, load_lanes(row_sums[1], i, active) + g * deviation, active, None)


@loop(forceinline=True)
def add_row(row_sums, dx, dresidual, dy, x, mask, o, end, shift, scale, offset, relu, nontemporal, distance):
    """Add g and g * (x - shift) of each element to row_sums; dx = scale * g, dresidual = g unless None."""
    whole = o + ((end - o) & -LANES)
    for v in range(o, whole, LANES):
        add_vector(
            row_sums, dx, dresidual, dy, x, mask, v, v - o, shift, scale, offset, relu, nontemporal, distance,
            None,
        )  # fmt: skip
    if whole < end:
        active = 0, end - whole
        add_vector(
            row_sums, dx, dresidual, dy, x, mask, whole, whole - o, shift, scale, offset, relu, nontemporal,
            distance, active,
        )  # fmt: skip


@loop(forceinline=True)
def sum_range(array, o, end):
    """Return the sum of an array's elements o .. end-1, in float64."""
    result = 0.0
    whole = o + ((end - o) & -LANES)
    for v in range(o, whole, LANES):
        result += sum_lanes(load_lanes(array, v, None))
    if whole < end:
        result += sum_lanes(load_lanes(array, whole, (0, end - whole)))
    return result


@loop()
def normalize_vector(y, mask, x, residual, v, i, shift, scale, offset, relu, nontemporal, distance, active):
    """Do `normalize_row` of the vector at element v, the i-th of the row."""
    prefetch_inputs(residual, x, v + distance)
    deviation = load_lanes(x, v, active) - broadcast(shift, i, active)
    z = deviation * broadcast(scale, i, active) + broadcast(offset, i, active)
    if residual is not None:
        z = z + load_lanes(residual, v, active)
    if relu is not None:
        bits = above_zero(z)  # of a NaN too, which passes
        z = select(bits, z)
        if mask is not None:
            write_bits(mask, v >> 4, bits)
    store_lanes(y, v, z, active, nontemporal)


@loop(forceinline=True)
def normalize_row(y, mask, x, residual, o, end, shift, scale, offset, relu, nontemporal, distance):
    """y = act(z), and where there is a mask the bits of z > 0."""
    for v in range((o + LANES - 1) & -LANES, end & -LANES, LANES):
        normalize_vector(
            y, mask, x, residual, v, v - o, shift, scale, offset, relu, nontemporal, distance, None
        )
    for k in range(2):
        partial, v, active = partial_vector(o, end, k)
        if partial:
            normalize_vector(
                y, mask, x, residual, v, v - o, shift, scale, offset, relu, nontemporal, distance, active
            )


@loop()
def weighted(p, i, active, correction):
    """p * correction; 0 where p is 0, even if sums are not finite. Without a p it is in the correction."""
    if p is None:
        return correction
    weights = broadcast(p, i, active)
    return select(above_zero(weights), weights * correction)


@loop()
def repair_vector(
    dx, dresidual, dy, x, mask, v, i, shift, scale, offset, k0, k1, p, relu, nontemporal, distance, active
):  # fmt: skip
    """Do `repair_row` of the vector at element v, the i-th of the row."""
    prefetch_inputs(x, dy, v + distance)
    g, deviation = gradient(dy, x, mask, v, i, shift, scale, offset, relu, active)
    if dx is not None:
        d = g * broadcast(scale, i, active)
        if k0 is not None:
            correction = broadcast(k0, i, active) + deviation * broadcast(k1, i, active)
            d = d - weighted(p, i, active, correction)
        store_lanes(dx, v, d, active, nontemporal)
    if dresidual is not None:
        store_lanes(dresidual, v, g, active, nontemporal)


@loop()
def repair_few(dx, dy, x, mask, v, first, end, shift, scale, offset, k0, k1, relu, distance):
    """`repair_vector` of lanes first .. end-1, with p in k0 and k1; the others are written as they are."""
    prefetch_inputs(x, dy, v + distance)
    g, deviation = gradient(dy, x, mask, v, 0, shift, scale, offset, relu, None)
    d, before = g * broadcast(scale, 0, None) - (k0 + deviation * k1), load_lanes(dx, v, None)
    store_lanes(dx, v, blend(first, before, blend(end, d, before)), None, None)


@loop(forceinline=True)
def repair_row(
    dx, dresidual, dy, x, mask, o, end, shift, scale, offset, k0, k1, p, relu, nontemporal, distance
):  # fmt: skip
    """dx = scale * g - p * (k0 + k1 * (x - shift)), or scale * g without a k0; dresidual = g."""
    for v in range((o + LANES - 1) & -LANES, end & -LANES, LANES):
        repair_vector(
            dx, dresidual, dy, x, mask, v, v - o, shift, scale, offset, k0, k1, p, relu, nontemporal,
            distance, None,
        )  # fmt: skip
    for k in range(2):
        partial, v, active = partial_vector(o, end, k)
        if partial:
            repair_vector(
                dx, dresidual, dy, x, mask, v, v - o, shift, scale, offset, k0, k1, p, relu, nontemporal,
                distance, active,
            )  # fmt: skip
