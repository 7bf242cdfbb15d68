"""How far apart the runs of a map lie: evenly along each of its axes.

Runs at ``S / runs`` positions from one another lie below each other where that is whole rows, as in maps of
16, 32 or 56 columns, and then tell of a few columns only. A distance near it spreads them over all axes.
"""

from __future__ import annotations

import math

import numpy as np

FURTHEST = 0.25  # from S / runs, as a part of it, or a step along the first axis


def distance(spatial: tuple[int, ...], positions: int, length: int, align: int) -> int:
    """Return the distance of runs that have the least in common with one another, a multiple of ``align``.

    The variance of a sample's mean is the mean correlation of its pairs. Of two positions r rows and c
    columns apart it is taken to be ``1 / (1 + (r / rows)**2 + (c / columns)**2)``, likewise with more axes:
    with half or a quarter of that reach the choices did as well on activations of two data sets.

    Args:
        spatial: sizes of a map, whose product is S.
        positions, length: of a sample and of a run, the last one being what is left; runs that fit
            ``S // runs`` apart.
        align: divides S and length.
    """
    S = math.prod(spatial)
    runs = -(-positions // length)
    if runs == 1:
        return S
    last = positions - (runs - 1) * length
    even = S / runs
    off = min(FURTHEST * even, S // spatial[0])
    least = -(-max(length, math.ceil(even - off)) // align) * align
    most = min((S - last) // (runs - 1), math.floor(even + off))
    tried = np.arange(least, most + 1, align)
    if not tried.size:
        return S // runs // align * align
    lags = np.arange(1, runs) * tried[:, None]
    wraps = lags / S  # how likely a pair lies S - lag apart
    pairs = runs - np.arange(1, runs)
    alike = pairs * ((1 - wraps) * _likeness(lags, 0.0, spatial) + wraps * _likeness(S - lags, 0.0, spatial))
    # summed exactly: all machines must choose the same
    return int(min(zip(map(math.fsum, alike), abs(tried * runs - S), tried, strict=True))[2])


def _likeness(lags: np.ndarray, apart: np.ndarray | float, spatial: tuple[int, ...]) -> np.ndarray:
    """Return the correlation of positions so far apart in memory, wherever the first of them lies.

    ``apart`` is their squared distance along axes behind these.
    """
    *outer, size = spatial
    if not outer:
        along = lags / size
        return 1 / (1 + apart + along * along)
    here, there = lags % size / size, (size - lags % size) / size
    # of the places along the axis, the share from which the second position lies a step on in those before
    nearer = _likeness(lags // size, apart + here * here, tuple(outer))
    return (1 - here) * nearer + here * _likeness(lags // size + 1, apart + there * there, tuple(outer))
