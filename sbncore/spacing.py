"""How far apart the runs of a map lie: evenly over its rows and its columns.

Runs at ``S / runs`` positions from one another lie below each other where that is whole rows, as in maps of
16, 32 or 56 columns, and then tell of a few columns only. A distance near it spreads them over both axes.
"""

from __future__ import annotations

import math

import numpy as np

FURTHEST = 0.25  # from S / runs, as a part of it, or a row


def distance(S: int, width: int, positions: int, length: int, align: int) -> int:
    """Return the distance of runs of which each two have the least in common, a multiple of ``align``.

    The variance of a sample's mean is the mean correlation of its pairs. Of two positions r rows and c
    columns apart it is taken to be ``1 / (1 + (r / rows)**2 + (c / columns)**2)``: with half or a quarter of
    that reach the choices did as well on activations of two data sets.

    Args:
        S, width: a map's positions and those of a row.
        positions, length: of a sample and of a run, the last one being what is left; runs that fit
            ``S // runs`` apart.
        align: divides S and length.
    """
    runs = -(-positions // length)
    if runs == 1:
        return S
    last = positions - (runs - 1) * length
    even = S / runs
    off = min(FURTHEST * even, width)
    least = -(-max(length, math.ceil(even - off)) // align) * align
    most = min((S - last) // (runs - 1), math.floor(even + off))
    tried = np.arange(least, most + 1, align)
    if not tried.size:
        return S // runs // align * align
    lags = np.arange(1, runs) * tried[:, None]
    wraps = lags / S  # how likely a pair lies S - lag apart
    pairs = runs - np.arange(1, runs)
    alike = pairs * ((1 - wraps) * _likeness(lags, S, width) + wraps * _likeness(S - lags, S, width))
    # summed exactly: all machines must choose the same
    return int(min(zip(map(math.fsum, alike), abs(tried * runs - S), tried, strict=True))[2])


def _likeness(lags: np.ndarray, S: int, width: int) -> np.ndarray:
    """Return the correlation of positions so far apart in memory, their column being anyone."""
    rows, columns = lags // width, lags % width

    def alike(rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
        height = rows * (width / S)
        across = columns / width
        return 1 / (1 + height * height + across * across)

    share = columns / width  # of the columns from which the second lies in the row after
    return (1 - share) * alike(rows, columns) + share * alike(rows + 1, width - columns)
