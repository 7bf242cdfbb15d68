"""The CPU engine: geometry, and the order in which the kernels run."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from sbncore.cpu import kernels, threads
from sbncore.cpu.elements import COMPUTE
from sbncore.layout import Layout
from sbncore.plans import Runs

ROW = 1 << 16  # elements of a channels-first row; longer ones are shared among tasks
TILE = 256  # elements of the shortest channels-last row worth a loop
RUN = 16384  # elements of a channels-last run, which is summed in float32
PLACES = 64  # of such a run at least: what flushing its sums is shared among
TASK = 16384  # elements worth a task of their own
TASKS = 64
PARALLEL = 1 << 20  # elements worth waking the other threads: it takes 50 to 100 us


class Coefficients(NamedTuple):
    """``z = (x - shift) * scale + offset`` for each channel, in the type of the arithmetic."""

    shift: np.ndarray
    scale: np.ndarray
    offset: np.ndarray


def compute_type(x: np.ndarray) -> Any:
    """Return the type that elements of a storage type are computed in."""
    return COMPUTE[x.dtype]


def coefficients(
    mean: np.ndarray, rstd: np.ndarray, weight: np.ndarray | None, bias: np.ndarray | None, compute: Any
) -> Coefficients:
    """Return the coefficients of float64 statistics and parameters."""
    shift = mean.astype(compute)
    scale = rstd if weight is None else weight * rstd
    offset = (shift - mean) * scale
    if bias is not None:
        offset = offset + bias
    return Coefficients(shift, scale.astype(compute), offset.astype(compute))


def moments(x: np.ndarray, layout: Layout, runs: Runs) -> tuple[np.ndarray, np.ndarray]:
    """Return mean and var (C,) in float64 of the places in ``runs``, under their weights made to sum to 1."""
    sixteenths = min(16, len(runs.begin))
    nearby = np.arange(sixteenths) * (len(runs.begin) - 1) // max(1, sixteenths - 1)
    places = runs.begin[nearby] + runs.length[nearby] // 2
    shift = np.zeros(layout.C, compute_type(x))
    kernels.shifts(shift, x, places, layout.last or None, layout.C, layout.S)
    weighted = runs._replace(weight=runs.weight / np.dot(runs.weight, runs.length))
    about = Coefficients(shift, shift, shift)  # without a dy only the shift is used
    first, second = sums(None, None, None, x, None, about, False, layout, weighted)
    return shift + first, np.maximum(second - first * first, 0)


def sums(
    dx: np.ndarray | None,
    dresidual: np.ndarray | None,
    dy: np.ndarray | None,
    x: np.ndarray,
    mask: np.ndarray | None,
    coefficients: Coefficients,
    relu: bool,
    layout: Layout,
    runs: Runs | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Return the weighted sums of g and g * (x - shift), (C,) in float64; write dx and dresidual.

    Without ``runs`` everywhere, and the sums are not weighted.
    """
    work = _Work(layout, runs, mask is not None) if runs else _work_everywhere(layout, mask is not None)
    partial = np.zeros((2, work.blocks, layout.C))
    threads.run(
        kernels.sums, work.tasks, work.parallel, partial, dx, dresidual, dy, x, mask,
        *work.tiled(coefficients), *work.runs, relu or None, *work.sizes,
    )  # fmt: skip
    first, second = partial.sum(axis=1)
    return first, second


def normalize(
    y: np.ndarray,
    mask: np.ndarray | None,
    x: np.ndarray,
    residual: np.ndarray | None,
    coefficients: Coefficients,
    relu: bool,
    layout: Layout,
) -> None:
    """Write y, and the mask's bits."""
    work = _work_everywhere(layout, mask is not None)
    begin, length, _ = work.runs
    threads.run(
        kernels.normalize, work.tasks, work.parallel, y, mask, x, residual,
        *work.tiled(coefficients), begin, length, relu or None, *work.sizes,
    )  # fmt: skip


def repair(
    dx: np.ndarray,
    dresidual: np.ndarray | None,
    dy: np.ndarray,
    x: np.ndarray,
    mask: np.ndarray | None,
    coefficients: Coefficients,
    k0: np.ndarray,
    k1: np.ndarray,
    relu: bool,
    layout: Layout,
    runs: Runs,
) -> None:
    """Write dx (and dresidual) at the places of ``runs``, whose weights are p."""
    work = _Work(layout, runs, mask is not None)
    compute = coefficients.shift.dtype
    begin, length, weight = work.runs
    threads.run(
        kernels.repair, work.tasks, work.parallel, dx, dresidual, dy, x, mask,
        *work.tiled((*coefficients, k0.astype(compute), k1.astype(compute))),
        begin, length, weight.astype(compute), relu or None, *work.sizes,
    )  # fmt: skip


def mask_for(layout: Layout) -> np.ndarray:
    """Return memory for one bit per element."""
    return np.empty(mask_size(layout), np.uint8)


def mask_size(layout: Layout) -> int:
    """Return the bytes of one bit per element; every row begins with a byte of its own."""
    rows, row = (layout.N * layout.S, layout.C) if layout.last else (layout.N * layout.C, layout.S)
    return rows * ((row + 7) // 8)


class _Work:
    """How one kernel's work over ``runs`` is cut into rows and tasks, by the shape alone."""

    def __init__(self, layout: Layout, runs: Runs, masked: bool) -> None:
        C = layout.C
        self.tile = 1 if masked or not layout.last else max(1, TILE // C)
        longest = max(PLACES, RUN // C) // self.tile * self.tile if layout.last else ROW
        self.runs = _split(_joined(runs) if layout.last else runs, longest)
        self.elements = int(self.runs.length.sum()) * C
        tasks = min(TASKS, max(1, self.elements // TASK))
        self.blocks = max(1, min(len(self.runs.begin), tasks))
        channel_blocks = 1 if layout.last else min(C, -(-tasks // self.blocks))
        self.tasks = self.blocks * channel_blocks
        self.sizes = (layout.last or None, C, layout.S, self.tile, self.blocks, channel_blocks)

    @property
    def parallel(self) -> bool:
        return self.elements >= PARALLEL

    def tiled(self, per_channel: tuple[np.ndarray, ...]) -> tuple[np.ndarray, ...]:
        if self.tile == 1:
            return tuple(per_channel)
        return tuple(np.tile(array, self.tile) for array in per_channel)


@lru_cache(maxsize=1024)
def _work_everywhere(layout: Layout, masked: bool) -> _Work:
    """Return the work over all places, each of weight 1."""
    begin = np.arange(layout.N, dtype=np.int64) * layout.S
    return _Work(layout, Runs(begin, np.full(layout.N, layout.S, np.int64), np.ones(layout.N)), masked)


def _joined(runs: Runs) -> Runs:
    """Join runs that follow one another, across samples too: in channels-last they are one in memory."""
    begin, length, weight = runs
    if len(begin) < 2:
        return runs
    follows = (begin[1:] == begin[:-1] + length[:-1]) & (weight[1:] == weight[:-1])
    heads = np.flatnonzero(np.concatenate([[True], ~follows]))
    return Runs(begin[heads], np.add.reduceat(length, heads), weight[heads])


def _split(runs: Runs, longest: int) -> Runs:
    """Cut runs longer than ``longest``."""
    pieces = -(-runs.length // longest)
    if (pieces <= 1).all():
        return runs
    of = np.repeat(np.arange(len(pieces)), pieces)
    offset = longest * (np.arange(len(of)) - np.repeat(np.cumsum(pieces) - pieces, pieces))
    length = np.minimum(longest, runs.length[of] - offset)
    return Runs(runs.begin[of] + offset, length, runs.weight[of])
