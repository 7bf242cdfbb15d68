"""The CPU engine: how a call over flat memory is cut into tasks, and which kernel does them."""

from __future__ import annotations

import contextlib
import math
import os
from functools import lru_cache
from pathlib import Path
from typing import Any

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
SUPPOSED = 32 << 20  # bytes of a last cache at least
NOWHERE = Runs(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0))


def _worth_streaming() -> int:
    """Bytes of a gradient from which on it is written past the caches: an eighth of the last of them.

    SBNCORE_STREAM, in bytes, has the last word: 0 streams everything.
    """
    asked = os.environ.get("SBNCORE_STREAM", "")
    return int(asked) if asked.isdigit() else _last_cache() // 8


def _last_cache() -> int:
    """Bytes of the last cache as Linux tells, shared by the cores around it; glibc adds up all there are."""
    sizes = [SUPPOSED]
    with contextlib.suppress(OSError, ValueError):
        for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
            number = path.read_text().strip()
            sizes.append(int(number.rstrip("KM")) << {"K": 10, "M": 20}.get(number[-1:], 0))
    return max(sizes)


STREAM = _worth_streaming()
KEPT = 3  # times larger is an output that is streamed: a forward has fewer arrays in the cache with it


class Engine:
    """The kernels over arrays of a layout, whose memory is cut into tasks by the shape alone."""

    kernels: tuple[Any, Any]  # forward and backward
    whole = True  # whether vectors are parts of lines
    cached = False  # whether small arrays are read twice in one order
    tasks: int
    cuts: tuple[int, ...]  # the sizes and what follows from them, as the kernels take it

    def __init__(self, layout: Layout) -> None:
        self.sizes = layout.N, layout.C, layout.S
        self.elements = math.prod(self.sizes)

    def rows(self, everything: bool, drawn: int) -> int:
        """Return of how many tasks sums are kept apart, over everything or over so many runs."""
        raise NotImplementedError

    def forward(
        self,
        y: np.ndarray | None,
        x: np.ndarray,
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

        The runs' weights sum to 1 / ``weigh``, and where they are everything they are ``full``; without runs
        the statistics are the prior's. Without a y the statistics are all.
        """
        C, drawn = self.sizes[1], len(runs.begin)
        if C == 0:
            return
        full = full and drawn > 0
        stream = y is not None and self.whole and y.nbytes >= KEPT * STREAM
        sums = np.empty((2, self.rows(full and self.cached, drawn), C))
        threads.run(
            self.kernels[0], self.tasks, self._parallel(), y, mask, x, residual, values, parameters, sums,
            *runs, weigh, full, relu or None, stream, *self.cuts,
        )  # fmt: skip

    def backward(
        self,
        dx: np.ndarray | None,
        dresidual: np.ndarray | None,
        dy: np.ndarray,
        x: np.ndarray,
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
        drawn, sampled = len(runs.begin), scale > 0
        stream = self.whole and x.nbytes >= STREAM
        sums = np.empty((2, self.rows(not sampled, drawn), self.sizes[1]))
        threads.run(
            self.kernels[1], self.tasks, self._parallel(), dx, dresidual, dy, x, mask, values, total, sums,
            dweight, dbias, *runs, scale, full and drawn > 0, dx is not None and drawn > 0, relu or None,
            sampled or None, stream, *self.cuts,
        )  # fmt: skip

    def _parallel(self) -> bool:
        """Whether a call is worth more than one thread."""
        worth = self.elements
        return worth >= PARALLEL or (worth >= PARALLEL // AWAKE and threads.openmp() > 0)


class First(Engine):
    """Channels-first.

    ``block`` is the channels of a task over all samples, ``sweep`` and ``spread`` the channels and samples
    of a sweep's task: whole vectors, or whole samples.
    """

    kernels = channels_first.forward, channels_first.backward
    segment = SEGMENT

    def __init__(self, layout: Layout) -> None:
        super().__init__(layout)
        N, C, S = self.sizes
        wanted = max(1, min(TASKS // 4, C, self.elements // TASK))
        segment, even = -(-self.segment // max(1, S)), LANES // math.gcd(S, LANES)
        block, sweep = (
            max(1, min(C, _multiple(size, even))) for size in (min(segment, -(-C // wanted)), min(segment, C))
        )
        spread = max(1, -(-SPREAD // max(1, S)), SEGMENT // (sweep * max(1, S)))
        self.groups = -(-N // spread)
        self.whole, self.cached = C * S % LANES == 0, self.elements <= CACHED
        self.tasks = max(-(-C // block), -(-C // sweep) * self.groups)
        self.cuts = *self.sizes, block, sweep, spread, self.cached

    def rows(self, everything: bool, drawn: int) -> int:
        return self.groups if everything else 0


class ShortFirst(First):
    """Channels-first, of maps of fewer positions than a vector has lanes."""

    kernels = short_maps.forward, short_maps.backward
    segment = SHORT_SEGMENT

    def rows(self, everything: bool, drawn: int) -> int:
        return 0


class Last(Engine):
    """Channels-last.

    A row is ``tile`` places, a ``piece`` those that are summed in float32, a ``span`` those of a task: rows
    are whole vectors, and no two write bits of one word.
    """

    kernels = channels_last.forward, channels_last.backward

    def __init__(self, layout: Layout) -> None:
        super().__init__(layout)
        N, C, S = self.sizes
        places, width = N * S, max(1, C)
        tile = max(1, _multiple(max(1, TILE // width), LANES // math.gcd(C, LANES)))
        piece = _multiple(max(PLACES, RUN // width), tile)
        span = _multiple(max(-(-places // TASKS), -(-TASK // width)), tile)
        self.tasks, self.cuts = -(-places // span), (*self.sizes, tile, piece, span)

    def rows(self, everything: bool, drawn: int) -> int:
        return self.tasks if everything else min(GROUPS, drawn)


@lru_cache(maxsize=1024)
def of(layout: Layout) -> Engine:
    """Return the engine for a layout."""
    if layout.last:
        return Last(layout)
    return ShortFirst(layout) if layout.S < LANES else First(layout)


def _multiple(value: int, of: int) -> int:
    return -(-value // of) * of


def mask_size(layout: Layout) -> int:
    """Return the bytes of a mask: a bit per element, in words of 16 that no two samples share."""
    N, C, S = layout.N, layout.C, layout.S  # plain arithmetic: a compiler's symbols pass through it
    if layout.last:
        return 2 * ((N * S * C + LANES - 1) // LANES)
    return 2 * N * ((C * S + LANES - 1) // LANES)
