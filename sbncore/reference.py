"""The formulas in plain NumPy float64: the readable truth that every engine is compared with.

Shapes: x, y, dy, residual (N, C, *spatial); p (N, *spatial), the weight of each place in the
statistics (`Plan.weights`); weight, bias, mean, var (C,). With xhat = (x - mean) * rstd:

    mean = sum p x        var = sum p (x - mean)**2        rstd = 1 / sqrt(var + eps)
    y    = act(weight * xhat + bias + residual)
    g    = dy behind the activation's derivative
    dx   = weight * rstd * (g - p * (sum g + xhat * sum(g * xhat)))

The sums run over all places of a channel. A prior (w, mean0, var0) has no places: it moves the moments,
and then p sums to 1 - w.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]


@dataclass
class Saved:
    """What backward needs."""

    x: Array
    p: Array
    mean: Array
    var: Array
    rstd: Array
    weight: Array
    z: Array  # before the activation
    activation: str | None


def moments(
    x: ArrayLike, p: Array, prior: tuple[float, ArrayLike, ArrayLike] | None = None
) -> tuple[Array, Array]:
    """Return mean and var, (C,): the moments of x under the weights p, mixed with the prior."""
    x = np.asarray(x, np.float64)
    axes = (0, *range(2, x.ndim))
    w, *moments = prior if prior is not None else (0.0, 0.0, 0.0)
    mean0, var0 = (np.asarray(moment, np.float64) for moment in moments)
    q = (p / (1 - w) if w < 1 else p)[:, None]
    anchor = x.mean(axes) if x.size else np.zeros(x.shape[1])  # cancels rounding far from zero
    m = anchor + (q * (x - _along(anchor, x))).sum(axes)
    v = (q * (x - _along(m, x)) ** 2).sum(axes)
    mean = (1 - w) * m + w * mean0
    var = (1 - w) * (v + (m - mean) ** 2) + w * (var0 + (mean0 - mean) ** 2)
    return mean, var


def forward(
    x: ArrayLike,
    weight: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    p: Array,
    prior: tuple[float, ArrayLike, ArrayLike] | None = None,
    eps: float = 1e-5,
    activation: str | None = None,
    residual: ArrayLike | None = None,
) -> tuple[Array, Saved]:
    """Return y = act(weight * xhat + bias + residual) and what backward needs."""
    x = np.asarray(x, np.float64)
    C = x.shape[1]
    weight = np.ones(C) if weight is None else np.asarray(weight, np.float64)
    bias = np.zeros(C) if bias is None else np.asarray(bias, np.float64)
    mean, var = moments(x, p, prior)
    rstd = 1 / np.sqrt(var + eps)
    z = _along(weight * rstd, x) * (x - _along(mean, x)) + _along(bias, x)
    if residual is not None:
        z = z + np.asarray(residual, np.float64)
    y = np.where(z <= 0, 0.0, z) if activation == "relu" else z
    return y, Saved(x, p, mean, var, rstd, weight, z, activation)


def backward(dy: ArrayLike, saved: Saved, gradient: str = "exact") -> dict[str, Array]:
    """Return the gradients of x, weight, bias and residual.

    "exact" is the derivative; "sampled" estimates the two sums from the places of p alone, scaled to
    all M of them; "detached" takes the statistics as constants.
    """
    x, p = saved.x, saved.p[:, None]
    axes = (0, *range(2, x.ndim))
    g = np.asarray(dy, np.float64)
    if saved.activation == "relu":
        g = np.where(saved.z <= 0, 0.0, g)
    xhat = (x - _along(saved.mean, x)) * _along(saved.rstd, x)
    everywhere = np.ones_like(p)
    counted = everywhere if gradient != "sampled" or not p.any() else p / p.mean()
    dbias = (counted * g).sum(axes)
    dweight = (counted * g * xhat).sum(axes)
    through = 0.0 if gradient == "detached" else p
    dx = _along(saved.weight * saved.rstd, x) * (g - through * (_along(dbias, x) + xhat * _along(dweight, x)))
    return {"x": dx, "weight": dweight, "bias": dbias, "residual": g}


def _along(channels: Array, x: Array) -> Array:
    """Shape (C,) so that it broadcasts along the channels of x."""
    return channels.reshape(1, -1, *(1,) * (x.ndim - 2))
