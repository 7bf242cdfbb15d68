"""The CPU engine: geometry, and the kernels with what is between them."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from sbncore.cpu import channels, kernels, threads
from sbncore.layout import Layout
from sbncore.plans import Runs

ROW = 1 << 16  # elements of a channels-first row; longer ones are shared among tasks
TILE = 256  # elements of the shortest channels-last row worth a loop
RUN = 16384  # elements of a channels-last run, which is summed in float32
PLACES = 64  # of such a run at least: what flushing its sums is shared among
TASK = 16384  # elements worth a task of their own
TASKS = 64
PARALLEL = 1 << 20  # elements worth waking the other threads: it takes 50 to 100 us

Coefficients = tuple[np.ndarray, ...]  # shift, scale, offset: z = (x - shift) * scale + offset


class Work(NamedTuple):
    """How one kernel's work over runs is cut into rows and tasks, by the shape alone."""

    begin: np.ndarray
    length: np.ndarray
    weight: np.ndarray
    tile: int
    blocks: int
    tasks: int
    parallel: bool
    sizes: tuple[Any, ...]  # the kernels' last arguments

    def run(self, kernel: Any, *arguments: Any) -> None:
        """Call a kernel over all tasks."""
        threads.run(kernel, self.tasks, self.parallel, *arguments, *self.sizes)


def work_at(layout: Layout, runs: Runs, masked: bool) -> Work:
    """Return the work over runs of places."""
    C, last = layout.C, layout.last
    whole = last and not (masked and C % 8)  # else a mask's row has bits to spare
    tile = max(1, TILE // C) if whole else 1
    longest = max(PLACES, RUN // C) // tile * tile if last else ROW
    begin, length, weight, places = channels.cut(*runs, last, longest)
    elements = places * C
    tasks = min(TASKS, max(1, elements // TASK))
    blocks = max(1, min(len(begin), tasks))
    channel_blocks = 1 if last else min(C, -(-tasks // blocks))
    sizes = (last or None, C, layout.S, tile, blocks, channel_blocks)
    return Work(
        begin, length, weight, tile, blocks, blocks * channel_blocks, elements >= PARALLEL, sizes
    )


@lru_cache(maxsize=1024)
def work_everywhere(layout: Layout, masked: bool) -> Work:
    """Return the work over all places, each of weight 1."""
    begin = np.arange(layout.N, dtype=np.int64) * layout.S
    return work_at(layout, Runs(begin, np.full(layout.N, layout.S), np.ones(layout.N)), masked)


def draw_moments(values: np.ndarray, x: np.ndarray, work: Work, weigh: float) -> None:
    """values[0], values[1] = mean and var of the work's places, whose weights sum to 1 / ``weigh``."""
    last, C, S, tile = work.sizes[:4]
    shift = channels.shifts(x, work.begin, work.length, last, C, S, tile)
    partial = np.zeros((2, work.blocks, C))
    work.run(
        kernels.sums, partial, None, None, None, x, None, shift, shift, shift, work.begin, work.length,
        work.weight * weigh, None,
    )  # fmt: skip
    channels.finish_moments(values, partial, shift)


def normalize(
    y: np.ndarray,
    mask: np.ndarray | None,
    x: np.ndarray,
    residual: np.ndarray | None,
    coefficients: Coefficients,
    relu: bool,
    work: Work,
) -> None:
    """Write y, and the mask's bits."""
    work.run(
        kernels.normalize, y, mask, x, residual, *coefficients, work.begin, work.length, relu or None
    )


def sums(
    dx: np.ndarray | None,
    dresidual: np.ndarray | None,
    dy: np.ndarray,
    x: np.ndarray,
    mask: np.ndarray | None,
    coefficients: Coefficients,
    relu: bool,
    work: Work,
) -> np.ndarray:
    """Return the blocks' weighted sums of g and g * (x - shift); write dx and dresidual."""
    partial = np.zeros((2, work.blocks, work.sizes[1]))
    work.run(
        kernels.sums, partial, dx, dresidual, dy, x, mask, *coefficients, work.begin, work.length,
        work.weight, relu or None,
    )  # fmt: skip
    return partial


def repair(
    dx: np.ndarray,
    dresidual: np.ndarray | None,
    dy: np.ndarray,
    x: np.ndarray,
    mask: np.ndarray | None,
    coefficients: Coefficients,
    slopes: tuple[np.ndarray, ...],
    relu: bool,
    work: Work,
) -> None:
    """Write dx (and dresidual) at the places of the work, of weights p; slopes are the kernel's k0 and k1."""
    work.run(
        kernels.repair, dx, dresidual, dy, x, mask, *coefficients, *slopes, work.begin, work.length,
        work.weight.astype(coefficients[0].dtype), relu or None,
    )  # fmt: skip


def mask_for(layout: Layout) -> np.ndarray:
    """Return memory for one bit per element."""
    return np.empty(mask_size(layout), np.uint8)


def mask_size(layout: Layout) -> int:
    """Return the bytes of one bit per element; every row begins with a byte of its own."""
    rows, row = (layout.N * layout.S, layout.C) if layout.last else (layout.N * layout.C, layout.S)
    return rows * ((row + 7) // 8)
