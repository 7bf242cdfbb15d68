"""The first two moments of each channel, and how those of several sets of values become those of all."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from sbncore.arrays import borrow, give, widen

Moments = tuple[np.ndarray, np.ndarray, float]  # mean and var (C,) in float64, count


@dataclass(frozen=True, eq=False)
class Statistics:
    """Mean and variance of each channel, as they normalize and as a running average needs them.

    Attributes:
        mean, var: (C,), float64 for float64 arrays, else float32; var is the biased one.
        count: ``1 / sum(p_i ** 2)``, the number of values where all weigh the same; infinite where
            there are none, as in running statistics. ``var * count / (count - 1)`` is unbiased.
    """

    mean: Any
    var: Any
    count: float = math.inf


def merge(*statistics: Statistics, weights: tuple[float, ...] | None = None) -> Statistics:
    """Return the moments of the mixture, by (weight, mean, M2) and never by sums of squares.

    ``mean = sum w_k mean_k``, ``var = sum w_k (var_k + (mean_k - mean)**2)``,
    ``1/count = sum w_k**2 / count_k`` (Chan, Golub and LeVeque, The American Statistician 37(3), 1983).

    Args:
        statistics: of disjoint sets of values, of the same channels, one or more.
        weights: of each, positive or zero, summing to 1; by default in proportion to the counts, which then
            gives the moments of all values together. A count of 0 (an empty rank) weighs nothing.

    Returns:
        Statistics, arrays of the first one's type.

    Raises:
        ValueError: if there is nothing to merge, or weights, counts or shapes do not fit.
        TypeError: if an argument is no Statistics.
    """
    for k, each in enumerate(statistics):
        if not isinstance(each, Statistics):
            raise TypeError(f"merge: expected Statistics, got {type(each).__name__} as argument {k}")
    if not statistics:
        raise ValueError("merge: expected at least one Statistics, got none")
    shapes = {tuple(array.shape) for each in statistics for array in (each.mean, each.var)}
    if len(shapes) > 1:
        raise ValueError(f"merge: expected statistics of the same channels, got shapes {sorted(shapes)}")
    if weights is None:
        counts = [each.count for each in statistics]
        total = math.fsum(counts)
        if not 0 < total < math.inf:
            raise ValueError(f"merge: expected counts with a positive finite sum, or weights, got {counts}")
        weights = tuple(count / total for count in counts)
    elif len(weights) != len(statistics) or min(weights) < 0 or abs(math.fsum(weights) - 1) > 1e-9:
        raise ValueError(f"merge: expected {len(statistics)} weights that sum to 1, got {weights}")
    first = statistics[0].mean
    moments = [(widen(borrow(s.mean, "mean")), widen(borrow(s.var, "var")), s.count) for s in statistics]
    return public(merge_moments(moments, weights), borrow(first, "mean").dtype, first)


def merge_moments(moments: list[Moments], weights: tuple[float, ...]) -> Moments:
    """`merge` of bare float64 moments; what weighs nothing may be anything."""
    counted = [(w, *m) for w, m in zip(weights, moments, strict=True) if w > 0]
    mean = sum(w * m for w, m, _, _ in counted)
    var = sum(w * (v + (m - mean) ** 2) for w, m, v, _ in counted)
    inverse = math.fsum(w * w / count for w, _, _, count in counted)
    return mean, var, 1 / inverse if inverse else math.inf  # type: ignore[return-value]


def unbiased(count: float) -> float:
    """Return what makes the variance of so many values unbiased; of one value it stays 0."""
    return 1 / (1 - 1 / count) if count > 1 else 1.0


def public(moments: Moments, dtype: Any, like: Any) -> Statistics:
    """Return Statistics in the given NumPy dtype and in the type of the array ``like``."""
    mean, var, count = moments
    return Statistics(give(mean.astype(dtype), like), give(var.astype(dtype), like), count)
