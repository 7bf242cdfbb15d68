"""What is computed for each channel between the kernels, compiled: NumPy takes longer than small arrays do.

``values`` is what forward keeps, (6, C) in float64: mean, var, rstd, shift, scale, offset, the last three as
rounded to the type of the arithmetic. For channels-last rows coefficients come in that type, ``tile`` times
over. A parameter that is absent is an array of length 0.
"""

from __future__ import annotations

import numpy as np

from sbncore.cpu.compiled import jit
from sbncore.cpu.elements import cast, load, store, zero


@jit()
def cut(begin, length, weight, longest):
    """Runs joined where one follows the other, then cut to ``longest``; and their places."""
    heads, places = np.empty(len(begin) + 1, np.int64), 0
    count, pieces, whole = 0, 0, 0
    for r in range(len(begin)):
        follows = r > 0 and begin[r] == begin[r - 1] + length[r - 1] and weight[r] == weight[r - 1]
        if not follows:
            pieces += (whole + longest - 1) // longest
            heads[count] = r
            count, whole = count + 1, 0
        whole += length[r]
        places += length[r]
    pieces += (whole + longest - 1) // longest
    heads[count] = len(begin)
    out_begin, out_length = np.empty(pieces, np.int64), np.empty(pieces, np.int64)
    out_weight = np.empty(pieces)
    k = 0
    for h in range(count):
        first, last = begin[heads[h]], heads[h + 1] - 1
        end = begin[last] + length[last]
        while first < end:
            out_begin[k], out_length[k] = first, min(longest, end - first)
            out_weight[k] = weight[last]
            first += longest
            k += 1
    return out_begin, out_length, out_weight, places


@jit()
def spots_of(begin, length, C, S, last):
    """Where the first channel's values are of which its shift is made: a few, far apart."""
    spots = np.empty(min(16, len(begin)), np.int64)
    for k in range(len(spots)):
        r = k * (len(begin) - 1) // max(1, len(spots) - 1)
        place = begin[r] + length[r] // 2
        spots[k] = place * C if last else place + place // S * (C - 1) * S
    return spots


@jit()
def shift_of(x, spots, channel):
    """The mean of a few values of the channel that is ``channel`` elements behind the first.

    One value would do but for an outlier; the running form keeps a constant a constant.
    """
    shift = zero(x)
    for k in range(len(spots)):
        shift += (load(x, spots[k] + channel) - shift) * cast(x, 1.0 / (k + 1.0))
    return shift


@jit()
def shifts(x, begin, length, C, S, tile):
    """Every channel's shift, for channels-last rows."""
    shift = np.full((1, tile * C), zero(x))
    spots = spots_of(begin, length, C, S, True)
    for c in range(C):
        shift[0, c] = shift_of(x, spots, c)
    repeat(shift, C)
    return shift[0]


@jit()
def finish_moments(values, partial, shift):
    """values[0], values[1] = mean and var, from the blocks' weighted sums of x - shift and its square."""
    for c in range(values.shape[1]):
        first, second = 0.0, 0.0
        for b in range(partial.shape[1]):
            first += partial[0, b, c]
            second += partial[1, b, c]
        var = second - first * first
        values[0, c] = shift[c] + first
        values[1, c] = 0.0 if var < 0 else var


@jit(error_model="numpy")
def finish_forward(values, x, parameters, c0, c1):
    """Mix the moments of channels c0 .. c1-1 with the prior, move the running statistics, fill in values."""
    (
        weight, bias, prior_mean, prior_var, prior, eps, running_mean, running_var, factor, unbiased,
        skip_nonfinite,
    ) = parameters  # fmt: skip
    for c in range(c0, c1):
        mean, var = values[0, c], values[1, c]
        if prior > 0:
            mean0, var0 = np.float64(load(prior_mean, c)), np.float64(load(prior_var, c))
            if prior == 1:
                mean, var = mean0, var0
            else:
                both = (1 - prior) * mean + prior * mean0
                var = (1 - prior) * (var + (mean - both) ** 2) + prior * (var0 + (mean0 - both) ** 2)
                mean = both
        rstd = 1 / np.sqrt(var + eps)  # infinite where a given variance and eps are 0
        shift = np.float64(cast(x, mean))
        scale = rstd * np.float64(load(weight, c)) if len(weight) > 0 else rstd
        offset = (shift - mean) * scale
        if len(bias) > 0:
            offset += np.float64(load(bias, c))
        values[0, c], values[1, c], values[2, c] = mean, var, rstd
        values[3, c], values[4, c], values[5, c] = shift, cast(x, scale), cast(x, offset)
        if len(running_mean) > 0 and (not skip_nonfinite or (np.isfinite(mean) and np.isfinite(var))):
            before = np.float64(load(running_mean, c))
            store(running_mean, c, cast(running_mean, before + factor * (mean - before)))
            before = np.float64(load(running_var, c))
            store(running_var, c, cast(running_var, before + factor * (unbiased * var - before)))


@jit()
def coefficients(values, x, tile):
    """The coefficients that forward left in values."""
    C = values.shape[1]
    out = np.full((3, tile * C), zero(x))
    for k in range(3):
        for c in range(C):
            out[k, c] = values[3 + k, c]
    repeat(out, C)
    return out[0], out[1], out[2]


@jit()
def finish_backward(total, partial, values, dweight, dbias, c0, c1):
    """total = dbias and dweight of channels c0 .. c1-1, from the blocks' sums of g and g * (x - shift)."""
    for c in range(c0, c1):
        first, second = 0.0, 0.0
        for b in range(partial.shape[1]):
            first += partial[0, b, c - c0]
            second += partial[1, b, c - c0]
        rounding = values[0, c] - values[3, c]
        total[0, c], total[1, c] = first, (second - rounding * first) * values[2, c]
        if len(dbias) > 0:
            store(dbias, c, cast(dbias, total[0, c]))
        if len(dweight) > 0:
            store(dweight, c, cast(dweight, total[1, c]))


@jit()
def slopes_of(total, values, c0, c1):
    """k0 and k1 of the repair: scale * (dbias - (mean - shift) * rstd * dweight), scale * rstd * dweight."""
    out = np.empty((2, c1 - c0))
    for c in range(c0, c1):
        k1 = values[4, c] * values[2, c] * total[1, c]
        out[0, c - c0] = values[4, c] * total[0, c] - k1 * (values[0, c] - values[3, c])
        out[1, c - c0] = k1
    return out


@jit()
def slopes(total, values, x, tile):
    """`slopes_of` all channels, for channels-last rows."""
    C = values.shape[1]
    out = np.full((2, tile * C), zero(x))
    out[:, :C] = slopes_of(total, values, 0, C)
    repeat(out, C)
    return out[0], out[1]


@jit()
def repeat(rows, C):
    """Fill rows with their first C elements, over and over."""
    for k in range(rows.shape[0]):
        for i in range(C, rows.shape[1]):
            rows[k, i] = rows[k, i - C]
