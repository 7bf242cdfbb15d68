"""The CPU engine: how a call over flat memory is cut into tasks, and which kernel does them."""

from __future__ import annotations

import contextlib
import math
import os
from ctypes import addressof
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from sbncore.cpu import kernels, threads
from sbncore.cpu.record import (
    BLOCK,
    EVERYTHING,
    GIVEN,
    LANES,
    SAMPLE,
    SPOTS,
    Record,
    addresses,
)
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
PARALLEL = 1 << 20  # minimum number of elements for multi-threading: to start takes 50 to 100 us
AWAKE = 8  # times fewer are worth threads that are awake, OpenMP's
SUPPOSED = 32 << 20  # bytes of a last cache at least
LINE = 64  # bytes
CLAIMS = Record.claims.offset
NOWHERE = Runs(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0))


def _worth_streaming() -> int:
    """Bytes of a gradient from which on it is written past the caches: an eighth of the last of them.

    SBNCORE_STREAM, in bytes, overrides it: 0 streams everything.
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


class Channels(NamedTuple):
    """What forward takes for each channel, arrays (C,), of no elements where absent."""

    weight: np.ndarray
    bias: np.ndarray
    prior_mean: np.ndarray
    prior_var: np.ndarray
    prior: float
    eps: float
    running_mean: np.ndarray
    running_var: np.ndarray
    factor: float  # of the new statistics in the running ones
    unbiased: float  # the variance's factor there
    skip_nonfinite: bool


class Call(NamedTuple):
    """A kernel, the record that its calls begin with, and bytes of ``partial`` and of a thread's memory."""

    kernel: kernels.Function
    template: bytes
    partial: int
    scratch: int


class Engine:
    """The kernels over arrays of a layout, whose memory is cut into tasks by the shape alone."""

    memory: str  # in the kernels' names
    whole = True  # whether vectors are parts of lines
    cached = False  # whether small arrays are read twice in one order
    piece = 0  # elements of what runs are cut into, if they are
    tasks: int

    def __init__(self, layout: Layout) -> None:
        self.sizes = layout.N, layout.C, layout.S
        self.elements = math.prod(self.sizes)

    def prepare(self, cuts: dict[str, int], **scratch: int) -> None:
        """Make the record that calls begin with; ``scratch`` is the bytes of a thread's memory of a name."""
        record = Record(**dict(zip("NCS", self.sizes, strict=True)), **cuts, cached=self.cached)
        self.scratch = 0
        for name, size in scratch.items():
            setattr(record, name, self.scratch)
            self.scratch += _multiple(size, LINE)
        self.template, self.call = bytes(record), lru_cache(maxsize=256)(self._call)

    def groups(self, everything: bool, drawn: int) -> int:
        """Return of how many tasks sums are kept apart, over everything or over so many runs."""
        raise NotImplementedError

    def forward(
        self,
        y: np.ndarray | None,
        x: np.ndarray,
        residual: np.ndarray | None,
        values: np.ndarray,
        mask: np.ndarray | None,
        channels: Channels,
        relu: bool,
        runs: Runs,
        full: bool,
        weigh: float,
    ) -> None:
        """Write y, values and the mask, of memory flat.

        The runs' weights sum to 1 / ``weigh``, and where they are everything they are ``full``; without runs
        the statistics are the prior's. Without a y the statistics are all.
        """
        if self.sizes[1] == 0:
            return
        drawn, writes = len(runs.begin), y is not None
        full = full and drawn > 0
        stream = y is not None and self.whole and y.nbytes >= KEPT * STREAM
        call = self.call(
            "forward", x.dtype.char, relu, residual is not None, mask is not None, full and self.cached,
            drawn, full, weigh, writes, stream, False, EVERYTHING,
        )  # fmt: skip
        record = Record.from_buffer_copy(call.template)
        (
            weight, bias, prior_mean, prior_var, record.prior, record.eps, running_mean, running_var,
            record.factor, record.unbiased, record.skip_nonfinite,
        ) = channels  # fmt: skip
        if record.prior:
            prior_mean, prior_var = (p.astype(np.float64, copy=False) for p in (prior_mean, prior_var))
            record.prior_mean, record.prior_var = addresses(prior_mean, prior_var)
        record.x, record.y, record.residual, record.values, record.weight, record.bias = addresses(
            x, y, residual, values, weight if weight.size else None, bias if bias.size else None
        )
        if running_mean.size:
            record.running_mean, record.running_var = addresses(running_mean, running_var)
        self._run(call, record, runs, mask)

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
        drawn, repairs, residual = len(runs.begin), dx is not None, dresidual is not None
        if dx is None and dresidual is not None:
            dx = np.empty_like(x)  # a kernel writes both or neither
        call = self.call(
            "backward", x.dtype.char, relu, residual, mask is not None, scale <= 0, drawn, full and drawn > 0,
            scale, dx is not None, self.whole and x.nbytes >= STREAM, repairs and drawn > 0,
            EVERYTHING if scale == 0 else SAMPLE if scale > 0 else GIVEN,
        )  # fmt: skip
        record = Record.from_buffer_copy(call.template)
        record.dx, record.dresidual, record.dy, record.x, record.values, record.total = addresses(
            dx, dresidual, dy, x, values, total
        )
        record.dweight, record.dbias = addresses(
            dweight if dweight.size else None, dbias if dbias.size else None
        )
        self._run(call, record, runs, mask)

    def _call(
        self, direction: str, letter: str, relu: bool, residual: bool, mask: bool, everything: bool,
        drawn: int, full: bool, times: float, writes: bool, stream: bool, repairs: bool, sums_over: int,
    ) -> Call:  # fmt: skip
        """Return what calls alike but for their memory have in common."""
        trains = direction == "forward" and drawn > 0
        kernel = kernels.kernel(self.memory, direction, letter, relu, residual, mask, trains)
        record, scratch = Record.from_buffer_copy(self.template), self.scratch
        record.full, record.times, record.writes, record.stream = full, times, writes, stream
        record.repairs, record.sums_over = repairs, sums_over
        record.runs, record.groups = drawn, self.groups(everything, drawn)
        if self.piece:
            record.capacity = drawn + self.elements // self.piece
            scratch += _multiple(24 * record.capacity, LINE)
        record.scratch_size = scratch
        return Call(kernel, bytes(record), _multiple(16 * record.groups * self.sizes[1], LINE), scratch)

    def _run(self, call: Call, record: Record, runs: Runs, mask: np.ndarray | None) -> None:
        """Give the record its runs, mask and scratch memory, and run its kernel on it."""
        kernel, _, partial, scratch = call
        count = threads.count(self.tasks) if self._parallel() else 1
        room, here = np.empty(LINE + partial + count * scratch, np.uint8), addressof(record)
        record.begin, record.length, record.share, first = addresses(*runs, room)
        record.partial = first = (first + LINE - 1) & -LINE  # no vector across two lines
        record.counters, record.scratch = here + CLAIMS, first + partial
        if mask is not None:
            (record.mask,), record.mask_size = addresses(mask), mask.size
        threads.run(kernel, here, count)

    def _parallel(self) -> bool:
        """Whether a call is worth more than one thread."""
        worth = self.elements
        return worth >= PARALLEL or (worth >= PARALLEL // AWAKE and threads.openmp() > 0)


class First(Engine):
    """Channels-first.

    ``block`` is the channels of a task over all samples, ``sweep`` and ``spread`` the channels and samples
    of a sweep's task: whole vectors, or whole samples.
    """

    memory = "channels_first"
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
        self.swept = -(-N // spread)
        self.whole, self.cached = C * S % LANES == 0, self.elements <= CACHED
        self.tasks = max(-(-C // block), -(-C // sweep) * self.swept)
        size, cuts = max(block, sweep), {"block": block, "sweep": sweep, "spread": spread}
        sums, rows = 16 * size, 8 * 6 * block * S if S < LANES else 0
        self.prepare(
            cuts, spots=8 * SPOTS, sums=sums, slopes=sums, lanes=LANES * sums, rows=rows,
            weights=8 * (S + 2 * LANES),
        )  # fmt: skip

    def groups(self, everything: bool, drawn: int) -> int:
        return self.swept if everything else 0


class ShortFirst(First):
    """Channels-first, of maps of fewer positions than a vector has lanes."""

    memory = "short_maps"
    segment = SHORT_SEGMENT

    def groups(self, everything: bool, drawn: int) -> int:
        return 0


class Last(Engine):
    """Channels-last.

    A row is ``tile`` places, a ``piece`` those that are summed in float32, a ``span`` those of a task: rows
    are whole vectors, and no two write bits of one word.
    """

    memory = "channels_last"

    def __init__(self, layout: Layout) -> None:
        super().__init__(layout)
        N, C, S = self.sizes
        places, width = N * S, max(1, C)
        tile = max(1, _multiple(max(1, TILE // width), LANES // math.gcd(C, LANES)))
        piece = _multiple(max(PLACES, RUN // width), tile)
        span = _multiple(max(-(-places // TASKS), -(-TASK // width)), tile)
        self.tasks, self.piece = -(-places // span), piece * width
        cuts = {"tile": tile, "piece": piece, "span": span}
        self.prepare(
            cuts, spots=8 * SPOTS, sums=16 * BLOCK, slopes=16 * C, rows=8 * 5 * tile * C, pieces=0,
        )  # fmt: skip

    def groups(self, everything: bool, drawn: int) -> int:
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
