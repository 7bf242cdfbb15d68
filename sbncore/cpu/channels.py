"""What is computed for each channel between the kernels, compiled: NumPy takes longer than small arrays do.

``values`` is what forward keeps, (6, C) in float64: mean, var, rstd, shift, scale, offset. Coefficients come
in the type of the arithmetic, ``tile`` times over, as the kernels read them. A parameter that is absent is
an array of length 0.
"""

from __future__ import annotations

import numpy as np

from sbncore.cpu.elements import cast, load, store, zero
from sbncore.cpu.kernels import jit


@jit()
def cut(begin, length, weight, joins, longest):
    """Runs joined where one follows the other (if ``joins``), then cut to ``longest``; and their places."""
    heads, places = np.empty(len(begin) + 1, np.int64), 0
    count, pieces, whole = 0, 0, 0
    for r in range(len(begin)):
        follows = r > 0 and begin[r] == begin[r - 1] + length[r - 1] and weight[r] == weight[r - 1]
        if not (joins and follows):
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
def shifts(x, begin, length, last, C, S, tile):
    """The mean of a few values of each channel, exactly their value where they are equal.

    One value would do but for an outlier; the running form keeps a constant a constant.
    """
    shift = np.full(tile * C, zero(x))
    count = min(16, len(begin))
    for k in range(count):
        r = k * (len(begin) - 1) // max(1, count - 1)
        place = begin[r] + length[r] // 2
        n, s = place // S, place % S
        for c in range(C):
            i = place * C + c if last is not None else (n * C + c) * S + s
            shift[c] += (load(x, i) - shift[c]) / (k + 1)
    for i in range(C, tile * C):
        shift[i] = shift[i - C]
    return shift


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
def finish_forward(
    values, x, weight, bias, prior_mean, prior_var, prior, eps, running_mean, running_var, factor, unbiased,
    skip_nonfinite, tile,
):  # fmt: skip
    """Mix the moments with the prior, move the running statistics, fill in values; returns coefficients."""
    C = values.shape[1]
    out = np.full((3, tile * C), zero(x))
    for c in range(C):
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
        out[0, c] = mean
        scale = rstd * np.float64(load(weight, c)) if len(weight) > 0 else rstd
        offset = (np.float64(out[0, c]) - mean) * scale
        if len(bias) > 0:
            offset += np.float64(load(bias, c))
        out[1, c], out[2, c] = scale, offset
        values[0, c], values[1, c], values[2, c] = mean, var, rstd
        values[3, c], values[4, c], values[5, c] = out[0, c], out[1, c], out[2, c]
        if len(running_mean) > 0 and (not skip_nonfinite or (np.isfinite(mean) and np.isfinite(var))):
            before = np.float64(load(running_mean, c))
            store(running_mean, c, cast(running_mean, before + factor * (mean - before)))
            before = np.float64(load(running_var, c))
            store(running_var, c, cast(running_var, before + factor * (unbiased * var - before)))
    repeat(out, C)
    return out[0], out[1], out[2]


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
def finish_backward(partial, values, dweight, dbias):
    """dbias and dweight, (2, C) in float64, from the blocks' sums of g and g * (x - shift)."""
    total = np.zeros((2, values.shape[1]))
    for c in range(values.shape[1]):
        for b in range(partial.shape[1]):
            total[0, c] += partial[0, b, c]
            total[1, c] += partial[1, b, c]
        rounding = values[0, c] - values[3, c]
        total[1, c] = (total[1, c] - rounding * total[0, c]) * values[2, c]
        if len(dbias) > 0:
            store(dbias, c, cast(dbias, total[0, c]))
        if len(dweight) > 0:
            store(dweight, c, cast(dweight, total[1, c]))
    return total


@jit()
def slopes(total, values, x, tile):
    """k0 and k1 of the repair: scale * (dbias - (mean - shift) * rstd * dweight), scale * rstd * dweight."""
    C = values.shape[1]
    out = np.full((2, tile * C), zero(x))
    for c in range(C):
        k1 = values[4, c] * values[2, c] * total[1, c]
        out[0, c] = values[4, c] * total[0, c] - k1 * (values[0, c] - values[3, c])
        out[1, c] = k1
    repeat(out, C)
    return out[0], out[1]


@jit()
def repeat(rows, C):
    """Fill rows with their first C elements, over and over."""
    for k in range(rows.shape[0]):
        for i in range(C, rows.shape[1]):
            rows[k, i] = rows[k, i - C]
