"""The CPU engine: how a call over flat memory is cut into tasks, and which kernel does them."""

from __future__ import annotations

import math
import os
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from sbncore.cpu import channels_first, channels_last, short_maps, threads
from sbncore.cpu.lanes import LANES
from sbncore.layout import Layout
from sbncore.plans import Runs

SEGMENT, SHORT_SEGMENT = 65536, 2048  # elements of a sample that a task goes over at once, channels-first
SPREAD = 512  # elements of a channel worth summing up
TILE = 256  # elements of the shortest channels-last row worth a loop
RUN = 16384  # elements of a channels-last run, which is summed in float32
PLACES = 64  # of such a run at least: what flushing its sums is shared among
TASK = 16384  # elements worth a task of their own
TASKS = 64
GROUPS = 32  # of runs of channels-last memory, whose sums are tasks
CACHED = 1 << 20  # elements of an array that is read twice, in the order of memory, rather than by blocks
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
    """How channels-first memory is cut: by the shape alone. Segments are whole vectors, or whole samples."""

    short: bool  # maps
    block: int  # channels of a task over all samples
    sweep: int  # channels of a sweep's task
    spread: int  # samples of a sweep's task
    tasks: int
    elements: int

    @property
    def cached(self) -> bool:
        """Whether a call finds an array again in a cache."""
        return self.elements <= CACHED

    def partial(self, layout: Layout, used: bool) -> np.ndarray:
        """Return room for the sums of a sweep's tasks."""
        return np.empty((2, -(-layout.N // self.spread) if used else 0, layout.C))

    def run(self, short: Any, long: Any, arguments: tuple[Any, ...]) -> None:
        """Call the kernel for short maps or for long ones."""
        parallel = _parallel(self.elements)
        if self.short:
            threads.run(short, self.tasks, parallel, *arguments, self.block)
        else:
            cuts = self.block, self.sweep, self.spread, self.cached
            threads.run(long, self.tasks, parallel, *arguments, *cuts)


@lru_cache(maxsize=1024)
def cut_first(layout: Layout) -> Cut:
    """Return the cut of a channels-first layout."""
    N, C, S = layout.N, layout.C, layout.S
    short, even = S < LANES, _even(S)
    wanted = max(1, min(TASKS // 4, C, N * C * S // TASK))
    segment = -(-(SHORT_SEGMENT if short else SEGMENT) // S)
    block, sweep = min(segment, -(-C // wanted)), min(segment, C)
    block, sweep = (max(1, min(C, _multiple(size, even))) for size in (block, sweep))
    spread = max(1, -(-SPREAD // S), SEGMENT // (sweep * S))
    tasks = max(-(-C // block), 1 if short else -(-C // sweep) * -(-N // spread))
    return Cut(short, block, sweep, spread, tasks, N * C * S)


def _parallel(elements: int) -> bool:
    """Whether a call is worth more than one thread."""
    return elements >= PARALLEL or (threads.openmp() > 0 and elements >= PARALLEL // AWAKE)


def _even(size: int) -> int:
    """How many of a size make whole vectors."""
    return LANES // math.gcd(size, LANES)


def _multiple(value: int, of: int) -> int:
    return -(-value // of) * of


class Strips(NamedTuple):
    """How channels-last memory is cut into tasks, of so many places each: by the shape alone."""

    tile: int  # places of a row
    piece: int  # places that are summed in float32
    span: int  # places of a task
    tasks: int
    elements: int

    def run(self, kernel: Any, *arguments: Any) -> None:
        """Call the kernel."""
        parallel = _parallel(self.elements)
        threads.run(kernel, self.tasks, parallel, *arguments, self.tile, self.piece, self.span)


@lru_cache(maxsize=1024)
def cut_last(layout: Layout) -> Strips:
    """Return the cut of a channels-last layout: rows are whole vectors, no two write bits of one word."""
    C, places = layout.C, layout.N * layout.S
    tile = max(1, _multiple(max(1, TILE // max(1, C)), _even(C)))
    piece = _multiple(max(PLACES, RUN // max(1, C)), tile)
    span = _multiple(max(-(-places // TASKS), -(-TASK // max(1, C))), tile)
    return Strips(tile, piece, span, -(-places // span), places * C)


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
    full: bool,
    weigh: float,
) -> None:
    """Write y, values and the mask, of memory flat and ``parameters`` in the order of finish_forward's.

    The runs' weights sum to 1 / ``weigh``, and where they are everything they are ``full``; without runs the
    statistics are the prior's. Without a y the statistics are all.
    """
    if layout.C == 0:
        return
    stream = y is not None and _streams(y, layout, KEPT * STREAM)
    if not layout.last:
        cut, sizes = cut_first(layout), (layout.N, layout.C, layout.S)
        full = full and len(runs.begin) > 0
        partial = [] if cut.short else [cut.partial(layout, full and cut.cached)]
        whole = [] if cut.short else [full]
        arguments = (
            y, mask, x, residual, values, parameters, *partial, *runs, weigh, *whole, relu or None, stream,
            *sizes,
        )  # fmt: skip
        cut.run(short_maps.forward, channels_first.forward, arguments)
        return
    strips = cut_last(layout)
    sums = np.empty((2, min(GROUPS, len(runs.begin)), layout.C))
    strips.run(
        channels_last.forward, y, mask, x, residual, values, parameters, sums, *runs, weigh, relu or None,
        stream, layout.N, layout.C, layout.S,
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
            given in total, and dx, written without them, is made right.
    """
    stream = _streams(x, layout, STREAM)
    repairs = dx is not None and len(runs.begin) > 0
    sampled, full = True if scale > 0 else None, full and len(runs.begin) > 0
    if not layout.last:
        cut, sizes = cut_first(layout), (layout.N, layout.C, layout.S)
        partial = [] if cut.short else [cut.partial(layout, True)]
        whole = [] if cut.short else [full]
        arguments = (
            dx, dresidual, dy, x, mask, values, total, *partial, dweight, dbias, *runs, scale, *whole,
            repairs, relu or None, sampled, stream, *sizes,
        )  # fmt: skip
        cut.run(short_maps.backward, channels_first.backward, arguments)
        return
    strips = cut_last(layout)
    sums = np.empty((2, min(GROUPS, len(runs.begin)) if sampled else strips.tasks, layout.C))
    strips.run(
        channels_last.backward, dx, dresidual, dy, x, mask, values, total, sums, dweight, dbias, *runs, scale,
        full, repairs, relu or None, sampled, stream, layout.N, layout.C, layout.S,
    )  # fmt: skip


def _streams(like: np.ndarray, layout: Layout, worth: int) -> bool:
    """Whether outputs, worth it from so many bytes on, are streamed: where vectors are parts of lines."""
    return like.nbytes >= worth and (layout.last or layout.C * layout.S % LANES == 0)


def mask_size(layout: Layout) -> int:
    """Return the bytes of a mask: a bit per element, in words of 16 that no two samples share."""
    N, C, S = layout.N, layout.C, layout.S  # plain arithmetic: a compiler's symbols pass through it
    if layout.last:
        return 2 * ((N * S * C + LANES - 1) // LANES)
    return 2 * N * ((C * S + LANES - 1) // LANES)
