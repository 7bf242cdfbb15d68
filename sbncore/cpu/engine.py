"""The CPU engine: how a call over flat memory is cut into tasks, and the kernels with what lies between."""

from __future__ import annotations

import math
import os
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from sbncore.cpu import channels, channels_first, channels_last, threads
from sbncore.cpu.lanes import LANES
from sbncore.layout import Layout
from sbncore.plans import Runs

SHORT = 256  # elements of a map from which on it is a row of its own
SEGMENT, SHORT_SEGMENT = 16384, 2048  # elements of a sample that a task goes over at once, channels-first
TILE = 256  # elements of the shortest channels-last row worth a loop
RUN = 16384  # elements of a channels-last run, which is summed in float32
PLACES = 64  # of such a run at least: what flushing its sums is shared among
TASK = 16384  # elements worth a task of their own
TASKS = 64
PARALLEL = 1 << 20  # elements worth waking the other threads: it takes 50 to 100 us
AWAKE = 8  # times fewer are worth threads that are awake, OpenMP's
NOWHERE = Runs(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0))


def _worth_streaming() -> int:
    """Bytes of a gradient from which on it is written past the caches: a quarter of the last of them.

    SBNCORE_STREAM, in bytes, has the last word: 0 streams everything.
    """
    asked = os.environ.get("SBNCORE_STREAM", "")
    if asked.isdigit():
        return int(asked)
    try:
        cache = os.sysconf("SC_LEVEL3_CACHE_SIZE")
    except (AttributeError, OSError, ValueError):
        cache = 0
    return max(cache, 1 << 24) // 4


STREAM = _worth_streaming()
KEPT = 3  # times larger is an output that is streamed: a forward has fewer arrays in the cache with it


class Cut(NamedTuple):
    """How channels-first memory is cut: by the shape alone."""

    short: bool | None  # True or None, as the kernels take it
    group: int  # channels of a task
    tasks: int
    elements: int


@lru_cache(maxsize=1024)
def cut_first(layout: Layout) -> Cut:
    """Return the cut of a channels-first layout."""
    N, C, S = layout.N, layout.C, layout.S
    short = S < SHORT
    tasks = max(1, min(TASKS // 4, C, N * C * S // TASK))
    group = max(1, min(-(-(SHORT_SEGMENT if short else SEGMENT) // S), -(-C // tasks)))
    if short and C > _even(S):  # coefficients, spelled out, are whole vectors
        group = _multiple(group, _even(S))
    return Cut(short or None, group, -(-C // group), N * C * S)


def _parallel(elements: int) -> bool:
    """Whether a call is worth more than one thread."""
    return elements >= PARALLEL or (threads.openmp() > 0 and elements >= PARALLEL // AWAKE)


def _even(size: int) -> int:
    """How many of a size make whole vectors."""
    return LANES // math.gcd(size, LANES)


def _multiple(value: int, of: int) -> int:
    return -(-value // of) * of


class Work(NamedTuple):
    """How work over runs of channels-last memory is cut into rows and tasks, by the shape alone."""

    begin: np.ndarray
    length: np.ndarray
    weight: np.ndarray
    tile: int
    tasks: int
    elements: int

    def run(self, kernel: Any, C: int, *arguments: Any) -> None:
        """Call a kernel over all tasks."""
        threads.run(kernel, self.tasks, _parallel(self.elements), *arguments, C, self.tile, self.tasks)


def work_at(layout: Layout, runs: Runs, masked: bool) -> Work:
    """Return the work over runs of places."""
    C = layout.C
    tile = max(1, TILE // C)
    if masked:
        tile = _multiple(tile, _even(C))  # no two rows write bits of one word
    longest = max(PLACES, RUN // C) // tile * tile
    begin, length, weight, places = channels.cut(*runs, longest)
    tasks = min(TASKS, max(1, places * C // TASK), max(1, len(begin)))
    return Work(begin, length, weight, tile, tasks, places * C)


@lru_cache(maxsize=1024)
def work_everywhere(layout: Layout, masked: bool) -> Work:
    """Return the work over all places, each of weight 1."""
    begin = np.arange(layout.N, dtype=np.int64) * layout.S
    return work_at(layout, Runs(begin, np.full(layout.N, layout.S), np.ones(layout.N)), masked)


def forward(
    y: np.ndarray | None,
    x: np.ndarray,
    layout: Layout,
    residual: np.ndarray | None,
    values: np.ndarray,
    mask: np.ndarray | None,
    parameters: tuple[Any, ...],
    relu: bool,
    runs: Runs,
    weigh: float,
) -> None:
    """Write y, values and the mask, of memory flat and ``parameters`` in the order of finish_forward's.

    The runs' weights sum to 1 / ``weigh``; without runs the statistics are the prior's. Without a y the
    statistics are all.
    """
    stream = y is not None and _streams(y, layout, KEPT * STREAM)
    if not layout.last:
        cut = cut_first(layout)
        threads.run(
            channels_first.forward, cut.tasks, _parallel(cut.elements), y, mask, x, residual, values,
            parameters, *runs, weigh, relu or None, cut.short, stream, layout.N, layout.C, layout.S,
            cut.group,
        )  # fmt: skip
        return
    C = layout.C
    everywhere = work_everywhere(layout, mask is not None)
    values[:2] = 0
    if len(runs.begin):
        work = work_at(layout, runs, False)
        shift = channels.shifts(x, work.begin, work.length, C, layout.S, work.tile)
        partial = np.zeros((2, work.tasks, C))
        work.run(
            channels_last.sums, C, partial, None, None, None, x, None, shift, shift, shift, work.begin,
            work.length, work.weight * weigh, None, False,
        )  # fmt: skip
        channels.finish_moments(values, partial, shift)
    channels.finish_forward(values, x, parameters, 0, C)
    if y is not None:
        coefficients = channels.coefficients(values, x, everywhere.tile)
        everywhere.run(
            channels_last.normalize, C, y, mask, x, residual, *coefficients, everywhere.begin,
            everywhere.length, relu or None, stream,
        )  # fmt: skip


def backward(
    dx: np.ndarray | None,
    dresidual: np.ndarray | None,
    dy: np.ndarray,
    x: np.ndarray,
    layout: Layout,
    mask: np.ndarray | None,
    values: np.ndarray,
    total: np.ndarray,
    dweight: np.ndarray,
    dbias: np.ndarray,
    relu: bool,
    runs: Runs,
    full: bool,
    scale: float,
) -> None:
    """Write dx, dresidual, dweight and dbias.

    Args:
        total: (2, C) float64, where the two sums go, dbias and dweight.
        runs: the places drawn, ``full`` where they are all; none where no gradient flows through the
            statistics.
        scale: 0 for sums over everything; above it, for sums over the runs times it; below, the sums are
            given in total, and only dx at the runs is written.
    """
    stream = _streams(x, layout, STREAM)
    repairs = dx is not None and len(runs.begin) > 0
    if not layout.last:
        cut = cut_first(layout)
        threads.run(
            channels_first.backward, cut.tasks, _parallel(cut.elements), dx, dresidual, dy, x, mask, values,
            total, dweight, dbias, *runs, scale, full, repairs, relu or None, cut.short, stream, layout.N,
            layout.C, layout.S, cut.group,
        )  # fmt: skip
        return
    C = layout.C
    everywhere = work_everywhere(layout, mask is not None)
    places = work_at(layout, runs, mask is not None)
    coefficients = channels.coefficients(values, x, everywhere.tile)

    def sums(written: tuple[Any, Any], work: Work, weight: np.ndarray) -> np.ndarray:
        partial = np.zeros((2, work.tasks, C))
        work.run(
            channels_last.sums, C, partial, *written, dy, x, mask, *coefficients, work.begin, work.length,
            weight, relu or None, stream,
        )  # fmt: skip
        return partial

    dense = full and repairs and scale >= 0  # the repair writes everything
    if scale >= 0:
        written = (None, None) if dense else (dx, dresidual)
        if scale > 0:
            partial = sums((None, None), places, places.weight * scale)
            if any(array is not None for array in written):
                sums(written, everywhere, everywhere.weight)
        else:
            partial = sums(written, everywhere, everywhere.weight)
        channels.finish_backward(total, partial, values, dweight, dbias, 0, C)
    if repairs:
        slopes = channels.slopes(total, values, x, places.tile)
        places.run(
            channels_last.repair, C, dx, dresidual if dense else None, dy, x, mask, *coefficients, *slopes,
            places.begin, places.length, places.weight.astype(slopes[0].dtype), relu or None,
            dense and stream,
        )  # fmt: skip


def _streams(like: np.ndarray, layout: Layout, worth: int) -> bool:
    """Whether outputs, worth it from so many bytes on, are streamed: not where a row's ends could not be."""
    whole = layout.last or layout.S < SHORT or layout.S % LANES == 0
    return like.nbytes >= worth and (whole or like.itemsize >= 4)


def mask_size(layout: Layout) -> int:
    """Return the bytes of a mask: a bit per element, and up to 4 bytes more per map, channels-first."""
    N, C, S = layout.N, layout.C, layout.S
    if layout.last:  # plain arithmetic: a compiler's symbols pass through it
        return 2 * ((N * S * C + LANES - 1) // LANES)
    return 2 * N * channels_first.sample_words.py_func(C, S)
