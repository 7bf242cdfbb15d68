"""What is computed for each channel between the passes over memory, in float64.

From the sums to the moments, the coefficients and the running statistics; from the backward's sums to
dweight, dbias and the slopes that dx is repaired by. A task is a range of channels c0 .. c1-1 and reads and
writes a few words for each.

``values`` is what forward leaves for backward, (6, C): mean, var, rstd, shift, scale, offset, the last
three as rounded to the type of the arithmetic. ``sums`` are of some channels, (2, channels). A parameter
that is absent is an array of length 0.
"""

from __future__ import annotations

import numpy as np

from sbncore.cpu.elements import cast, channel_array, load, loop, store, zero


@loop()
def find_pilots(pilots, r, begin, length, last):
    """Find a few elements of the first channel, far from each other, whose mean is its shift."""
    for k in range(len(pilots)):
        j = k * (len(begin) - 1) // max(1, len(pilots) - 1)
        place = begin[j] + length[j] // 2
        pilots[k] = place * r.C if last else place + place // r.S * (r.C - 1) * r.S


@loop()
def shift_of(x, pilots, channel):
    """Return the mean of the pilots of the channel that begins ``channel`` elements after the first.

    One value would do but for an outlier; the running form keeps a constant a constant.
    """
    shift = zero(x)
    for k in range(len(pilots)):
        shift += (load(x, pilots[k] + channel) - shift) * cast(x, 1.0 / (k + 1.0))
    return shift


@loop()
def clear(sums):
    """Set sums to 0."""
    for k in range(sums.shape[0]):
        for i in range(sums.shape[1]):
            sums[k, i] = 0


@loop()
def fill(row, value):
    """Set all elements of a row to a value."""
    for i in range(len(row)):
        row[i] = value


@loop()
def store_partial(partial, g, sums, p, c0, c1):
    """partial[:, g] = p times the sums of channels c0 .. c1-1."""
    for k in range(2):
        for c in range(c0, c1):
            partial[k, g, c] = p * sums[k, c - c0]


@loop()
def collect(sums, partial, c0, c1):
    """Add all tasks' partial sums of channels c0 .. c1-1."""
    for t in range(partial.shape[1]):
        for k in range(2):
            for c in range(c0, c1):
                sums[k, c - c0] += partial[k, t, c]


@loop()
def finish_moments(values, sums, c0, c1):
    """values[0], values[1] = mean and var of channels c0 .. c1-1.

    From weighted sums of x - shift and of its square; the shift is in values[3].
    """
    for c in range(c0, c1):
        first, second = sums[0, c - c0], sums[1, c - c0]
        var = second - first * first
        values[0, c] = values[3, c] + first
        values[1, c] = 0.0 if var < 0 else var


@loop()
def finish_forward(values, x, r, c0, c1):
    """Mix the moments of channels c0 .. c1-1 with the prior, move the running statistics, fill in values."""
    prior, eps, factor, unbiased, skip_nonfinite = r.prior, r.eps, r.factor, r.unbiased, r.skip_nonfinite
    weight, bias = channel_array(r.weight, r.C, zero(x)), channel_array(r.bias, r.C, zero(x))
    prior_mean, prior_var = channel_array(r.prior_mean, r.C, 0.0), channel_array(r.prior_var, r.C, 0.0)
    running_mean = channel_array(r.running_mean, r.C, zero(x))
    running_var = channel_array(r.running_var, r.C, zero(x))
    for c in range(c0, c1):
        mean, var = values[0, c], values[1, c]
        if prior > 0:
            mean0, var0 = prior_mean[c], prior_var[c]
            if prior == 1:
                mean, var = mean0, var0
            else:
                both = (1 - prior) * mean + prior * mean0
                var = (1 - prior) * (var + (mean - both) ** 2) + prior * (var0 + (mean0 - both) ** 2)
                mean = both
        rstd = 1 / np.sqrt(var + eps)  # infinite where the prior's variance and eps are 0
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


@loop()
def finish_backward(total, sums, values, x, r, c0, c1):
    """total = dbias and dweight of channels c0 .. c1-1, from the sums of g and g * (x - shift)."""
    dweight, dbias = channel_array(r.dweight, r.C, zero(x)), channel_array(r.dbias, r.C, zero(x))
    for c in range(c0, c1):
        first, second = sums[0, c - c0], sums[1, c - c0]
        rounding = values[0, c] - values[3, c]
        total[0, c], total[1, c] = first, (second - rounding * first) * values[2, c]
        if len(dbias) > 0:
            store(dbias, c, cast(dbias, total[0, c]))
        if len(dweight) > 0:
            store(dweight, c, cast(dweight, total[1, c]))


@loop()
def find_slopes(slopes, total, values, p, c0, c1):
    """p times k0 and k1: scale * (dbias - (mean - shift) * rstd * dweight), scale * rstd * dweight."""
    for c in range(c0, c1):
        k1 = values[4, c] * values[2, c] * total[1, c]
        slopes[0, c - c0] = p * (values[4, c] * total[0, c] - k1 * (values[0, c] - values[3, c]))
        slopes[1, c - c0] = p * k1
