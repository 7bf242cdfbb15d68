"""How a call over an array of one layout is divided into tasks, by the array's shape alone."""

from __future__ import annotations

import contextlib
import math
import os
from functools import lru_cache
from pathlib import Path

from sbncore.cpu import threads, tuning
from sbncore.cpu.record import LANES, Record
from sbncore.layout import Layout


def _nontemporal_bytes() -> int:
    """Return the bytes from which on a gradient is written past the caches.

    SBNCORE_STREAM, in bytes, overrides it: 0 streams everything.
    """
    asked = os.environ.get("SBNCORE_STREAM", "")
    return int(asked) if asked.isdigit() else _last_cache() // tuning.NONTEMPORAL_FRACTION


def _last_cache() -> int:
    """Bytes of the last cache as Linux tells, shared by the cores around it; glibc adds up all there are."""
    sizes = [tuning.LAST_CACHE_BYTES]
    with contextlib.suppress(OSError, ValueError):
        for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
            number = path.read_text().strip()
            sizes.append(int(number.rstrip("KM")) << {"K": 10, "M": 20}.get(number[-1:], 0))
    return max(sizes)


NONTEMPORAL_BYTES = _nontemporal_bytes()


class Engine:
    """The division of arrays of a layout into tasks, in the record that calls begin with."""

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
            self.scratch += multiple(size, tuning.CACHE_LINE)
        self.template = bytes(record)

    def groups(self, everything: bool, drawn: int) -> int:
        """Return of how many tasks sums are kept apart, over everything or over so many runs."""
        raise NotImplementedError


class First(Engine):
    """Channels-first.

    ``block`` is the channels of a task over all samples, ``sweep`` and ``spread`` the channels and samples
    of a sweep's task: whole vectors, or whole samples.
    """

    memory = "channels_first"
    segment = tuning.SEGMENT_ELEMENTS

    def __init__(self, layout: Layout) -> None:
        super().__init__(layout)
        N, C, S = self.sizes
        wanted = max(1, min(tuning.MAX_TASKS // 4, C, self.elements // tuning.TASK_ELEMENTS))
        segment, even = -(-self.segment // max(1, S)), LANES // math.gcd(S, LANES)
        block, sweep = (
            max(1, min(C, multiple(size, even))) for size in (min(segment, -(-C // wanted)), min(segment, C))
        )
        spread = max(1, -(-tuning.SWEEP_VALUES // max(1, S)), tuning.SEGMENT_ELEMENTS // (sweep * max(1, S)))
        self.swept = -(-N // spread)
        self.whole, self.cached = C * S % LANES == 0, self.elements <= tuning.TWO_SWEEPS_ELEMENTS
        self.tasks = max(-(-C // block), -(-C // sweep) * self.swept)
        size, cuts = max(block, sweep), {"block": block, "sweep": sweep, "spread": spread}
        sums, rows = 16 * size, 8 * 6 * block * S if S < LANES else 0
        self.prepare(
            cuts,
            pilots=8 * tuning.PILOTS,
            sums=sums,
            slopes=sums,
            lane_sums=LANES * sums,
            rows=rows,
            weights=8 * (S + 2 * LANES),
        )

    def groups(self, everything: bool, drawn: int) -> int:
        return self.swept if everything else 0


class ShortFirst(First):
    """Channels-first, of maps of fewer positions than a vector has lanes."""

    memory = "short_maps"
    segment = tuning.SHORT_MAPS_ELEMENTS

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
        tile = max(1, multiple(max(1, tuning.ROW_ELEMENTS // width), LANES // math.gcd(C, LANES)))
        piece = multiple(max(tuning.FLUSH_PLACES, tuning.FLUSH_ELEMENTS // width), tile)
        span = multiple(max(-(-places // tuning.MAX_TASKS), -(-tuning.TASK_ELEMENTS // width)), tile)
        self.tasks, self.piece = -(-places // span), piece * width
        cuts = {"tile": tile, "piece": piece, "span": span}
        self.prepare(
            cuts,
            pilots=8 * tuning.PILOTS,
            sums=16 * tuning.CHANNEL_BLOCK,
            slopes=16 * C,
            rows=8 * 5 * tile * C,
            pieces=0,
        )

    def groups(self, everything: bool, drawn: int) -> int:
        return self.tasks if everything else min(tuning.RUN_TASKS, drawn)


@lru_cache(maxsize=1024)
def of(layout: Layout) -> Engine:
    """Return the engine for a layout."""
    if layout.last:
        return Last(layout)
    return ShortFirst(layout) if layout.S < LANES else First(layout)


def multiple(value: int, of: int) -> int:
    """Return the least multiple that is not below a value."""
    return -(-value // of) * of


def parallel(elements: int) -> bool:
    """Whether a call over so many elements is worth more than one thread."""
    if elements >= tuning.PARALLEL_ELEMENTS:
        return True
    return elements >= tuning.PARALLEL_ELEMENTS // tuning.OPENMP_ADVANTAGE and threads.openmp() > 0


def mask_size(layout: Layout) -> int:
    """Return the bytes of a mask: a bit per element, in words of 16 that no two samples share."""
    N, C, S = layout.N, layout.C, layout.S  # plain arithmetic: a compiler's symbols pass through it
    if layout.last:
        return 2 * ((N * S * C + LANES - 1) // LANES)
    return 2 * N * ((C * S + LANES - 1) // LANES)
