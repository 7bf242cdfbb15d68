"""One pass over a row: consecutive elements in all the arrays, with what is computed of each.

The coefficients are scalars where a row is of one channel, else arrays of the row's length.

Coefficients, in the type of the arithmetic: ``z = (x - shift) * scale + offset (+ residual)``. Here shift is
the mean rounded to that type and offset makes up for the rounding: at |mean|/std of 1e6 the folded form
``x * scale + offset`` loses 5 %. Nothing is contracted or reordered, so that the backward's sign of z is the
forward's, bit for bit.

Rows that are summed are cut into vectors from their first element on, so that sums are the same in any
memory; rows that are written at the multiples of 16, so that a streamed store is an aligned one. A mask has a
bit for each element, of a row's element e bit ``16 * w + e``: no two rows share a word.

Arrays that may be missing, and relu, are None or not at compile time, which prunes the branches.
"""

from __future__ import annotations

from sbncore.cpu.compiled import jit
from sbncore.cpu.lanes import (
    LANES,
    above_zero,
    at,
    load_lanes,
    nothing,
    prefetch,
    read_bits,
    store_lanes,
    total,
    where,
    write_bits,
)

CHUNK = 4096  # elements that are summed in float32, 16 ways


@jit()
def gradient(dy, x, mask, v, w, i, shift, scale, offset, relu, keep):
    """g, dy behind the activation, and x - shift; without a dy g is that too: its sums are the moments."""
    deviation = load_lanes(x, v, keep) - at(shift, i, keep)
    if dy is None:
        g = where(keep, deviation)
    else:
        g = load_lanes(dy, v, keep)
        if mask is not None:
            g = where(read_bits(mask, 16 * w + v), g)
        elif relu is not None:
            g = where(above_zero(deviation * at(scale, i, keep) + at(offset, i, keep)), g)
    return g, deviation


@jit()
def sums_row(dy, x, mask, w, o, end, shift, scale, offset, relu, ahead):
    """Return the sums of g and g * (x - shift) of one channel; moments fetch ``ahead`` what comes next."""
    first, second = 0.0, 0.0
    for chunk in range(o, end, CHUNK):
        a, b = nothing(x), nothing(x)
        last = min(chunk + CHUNK, end)
        for v in range(chunk, last - LANES + 1, LANES):
            if dy is None:
                prefetch(x, v + ahead)
            g, deviation = gradient(dy, x, mask, v, w, 0, shift, scale, offset, relu, None)
            a = a + g
            b = b + g * deviation
        rest = (last - chunk) % LANES
        if rest:
            v = last - rest
            g, deviation = gradient(dy, x, mask, v, w, 0, shift, scale, offset, relu, (0, rest))
            a = a + g
            b = b + g * deviation
        first += total(a)
        second += total(b)
    return first, second


@jit()
def sums_column(totals, dy, x, mask, words, more_words, base, o, stride, rows, i, shift, scale, offset, relu, keep):
    """Add to totals, at i, the sums over some rows of one vector each."""
    a, b = nothing(x), nothing(x)
    for q in range(rows):
        w = words + q * more_words - ((base + q * stride) >> 4)
        g, deviation = gradient(dy, x, mask, o + q * stride + i, w, i, shift, scale, offset, relu, keep)
        a = a + g
        b = b + g * deviation
    store_lanes(totals[0], i, load_lanes(totals[0], i, keep) + a, keep, None)
    store_lanes(totals[1], i, load_lanes(totals[1], i, keep) + b, keep, None)


@jit()
def sums_rows(totals, dy, x, mask, words, more_words, base, o, m, stride, rows, shift, scale, offset, relu):
    """Add the sums over some rows of m elements, ``stride`` apart, to totals, an array of each of the two.

    The mask's w is ``words - base // 16`` for the first row; for the next, words and base grow by
    ``more_words`` and the stride.
    """
    whole = m - m % LANES
    for i in range(0, whole, LANES):
        sums_column(
            totals, dy, x, mask, words, more_words, base, o, stride, rows, i, shift, scale, offset, relu, None
        )
    if whole < m:
        sums_column(
            totals, dy, x, mask, words, more_words, base, o, stride, rows, whole, shift, scale, offset, relu,
            (0, m - whole),
        )  # fmt: skip


@jit()
def edge(o, end, k):
    """The first (k = 0) or last vector of a row that is written, and its lanes, if they are not all of it."""
    v = (o if k == 0 else end) & -LANES
    partial = o > v if k == 0 else end > v >= o
    return partial, v, (max(0, o - v), min(LANES, end - v))


@jit()
def normalize_vector(y, mask, x, residual, v, w, i, shift, scale, offset, relu, stream, keep):
    z = (load_lanes(x, v, keep) - at(shift, i, keep)) * at(scale, i, keep) + at(offset, i, keep)
    if residual is not None:
        z = z + load_lanes(residual, v, keep)
    if relu is not None:
        bits = above_zero(z)  # of a NaN too, which passes
        z = where(bits, z)
        if mask is not None:
            write_bits(mask, w + (v >> 4), bits)
    store_lanes(y, v, z, keep, stream)


@jit()
def normalize_row(y, mask, x, residual, w, o, end, shift, scale, offset, relu, stream):
    """y = act(z), and where there is a mask the bits of z > 0."""
    for v in range((o + LANES - 1) & -LANES, end & -LANES, LANES):
        normalize_vector(y, mask, x, residual, v, w, v - o, shift, scale, offset, relu, stream, None)
    for k in range(2):
        partial, v, keep = edge(o, end, k)
        if partial:
            normalize_vector(y, mask, x, residual, v, w, v - o, shift, scale, offset, relu, stream, keep)


@jit()
def repair_vector(dx, dresidual, dy, x, mask, v, w, i, shift, scale, offset, k0, k1, p, relu, stream, keep):
    g, deviation = gradient(dy, x, mask, v, w, i, shift, scale, offset, relu, keep)
    if dx is not None:
        d = g * at(scale, i, keep)
        if k0 is not None:
            d = d - at(p, i, None) * (at(k0, i, keep) + deviation * at(k1, i, keep))
        store_lanes(dx, v, d, keep, stream)
    if dresidual is not None:
        store_lanes(dresidual, v, g, keep, stream)


@jit()
def repair_row(dx, dresidual, dy, x, mask, w, o, end, shift, scale, offset, k0, k1, p, relu, stream):
    """dx = scale * g - p * (k0 + k1 * (x - shift)), or scale * g without a k0; dresidual = g."""
    for v in range((o + LANES - 1) & -LANES, end & -LANES, LANES):
        repair_vector(
            dx, dresidual, dy, x, mask, v, w, v - o, shift, scale, offset, k0, k1, p, relu, stream, None
        )
    for k in range(2):
        partial, v, keep = edge(o, end, k)
        if partial:
            repair_vector(
                dx, dresidual, dy, x, mask, v, w, v - o, shift, scale, offset, k0, k1, p, relu, stream, keep
            )
