"""The one argument of every CPU kernel: a record of sizes, choices, constants and addresses.

`sbncore.cpu.engine` fills it in; a kernel is a C function of its address, which any thread may call. Loads
neither Numba nor llvmlite.
"""

from __future__ import annotations

import ctypes

LANES = 16  # of the kernels' vectors, whatever the CPU has
# What backward sums over, `Record.sums_over`; precomputed sums are in ``total``.
EVERYTHING, SAMPLE, PRECOMPUTED = range(3)
# The counters by which a call's threads claim tasks and count those done, each in a cache line of its own.
(
    SUM_TASK, SUMS_DONE, CHANNEL_TASK, CHANNELS_DONE, WRITE_TASK, WRITES_DONE, REPAIR_TASK, THREAD,
) = range(0, 64, 8)  # fmt: skip
COUNTERS = 64

_SIZES = (
    "N", "C", "S",
    "block",  # channels-first: channels of a task over all samples
    "sweep", "spread",  # channels-first: channels and samples of a sweep's task
    "cached",  # channels-first: whether a second sweep finds the array in a cache
    "tile", "piece", "span",  # channels-last: places of a row, of a float32 sum, of a task
    "groups",  # rows of ``partial``, each the sums of one task
    "runs",  # of the sample
    "mask_size",  # bytes
    "capacity",  # pieces that there is scratch memory for, into which the runs are split
)  # fmt: skip
_CHOICES = (
    "writes",  # y, or dx
    "nontemporal",  # stores of y, or dx and dresidual, if these are aligned: past the caches
    "full",  # the runs are everything, with one weight
    "repairs",  # a gradient flows through the statistics
    "sums_over", "skip_nonfinite",
)  # fmt: skip
_CONSTANTS = (
    "multiplier",  # of the sums over the runs
    "prior", "eps", "factor", "unbiased",
)  # fmt: skip
_ADDRESSES = (  # 0 of what is absent
    "x", "y", "residual", "mask", "dy", "dx", "dresidual",
    "values",  # (6, C) float64
    "weight", "bias", "running_mean", "running_var", "dweight", "dbias",  # (C,) in the parameters' type
    "prior_mean", "prior_var",  # (C,) float64
    "begin", "length", "share",  # the runs, (runs,): int64, int64 and their weights in float64
    "total",  # (2, C) float64: dbias and dweight
    "partial",  # (2, groups, C) float64
    "counters", "scratch",
)  # fmt: skip
SCRATCH = (  # byte offsets in a thread's scratch memory
    "pilots",  # int64: the elements whose mean is the first channel's shift
    "sums", "slopes",  # (2, channels) float64
    "lane_sums",  # (2, channels * LANES)
    "rows",  # coefficients, one for each element of a row
    "weights",  # p at a map's positions
    "pieces",  # of runs: begin, length and share, (capacity,) each
)  # fmt: skip


class Record(ctypes.Structure):
    """A call as its kernel takes it."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in (*_SIZES, *_CHOICES)),
        *((name, ctypes.c_double) for name in _CONSTANTS),
        *((name, ctypes.c_int64) for name in (*_ADDRESSES, "scratch_size", *SCRATCH)),
        ("claims", ctypes.c_int64 * COUNTERS),  # what ``counters`` is the address of
    ]


class Draw(ctypes.Structure):
    """The argument of the functions that draw (`sbncore.cpu.runs`); ``count`` is their result."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in (
            "seed", "layer", "step", "stream", "first", "rows", "S", "samples", "positions", "run", "stride",
            "align", "common", "begin", "length", "share", "count",
        )),
        ("weight", ctypes.c_double),
    ]  # fmt: skip
