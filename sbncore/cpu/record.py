"""The one argument of every CPU kernel: a record of sizes, choices, constants and addresses.

`sbncore.cpu.engine` fills it in; a kernel is a C function of its address, which any thread may call. Loads
neither Numba nor llvmlite.
"""

from __future__ import annotations

import ctypes

import numpy as np

LANES = 16  # of the kernels' vectors, whatever the CPU has
BLOCK = 128  # channels of channels-last memory whose sums are a task
SPOTS = 16  # at most, of which a channel's shift is made
# what the sums of backward are over: `Record.sums_over`
EVERYTHING, SAMPLE, GIVEN = range(3)
# the counters by which threads claim a call's tasks and count those done, each in a cache line of its own
FIRST, DONE, SECOND, FINISHED, THIRD, WRITTEN, LAST, THREAD = range(0, 64, 8)
COUNTERS = 64

_SIZES = (
    "N", "C", "S",
    "block", "sweep", "spread", "cached",  # tasks of channels-first memory (`sbncore.cpu.engine.First`)
    "tile", "piece", "span",  # and of channels-last
    "groups",  # of tasks whose sums are kept apart in ``partial``
    "runs", "mask_size",
    "capacity",  # of the memory for pieces that runs are cut into
)  # fmt: skip
_CHOICES = (
    "writes",  # y, or dx
    "stream",  # past the caches
    "full",  # the runs are everything, with one weight
    "repairs",  # a gradient flows through the statistics
    "sums_over", "skip_nonfinite",
)  # fmt: skip
_CONSTANTS = (
    "times",  # what sums over the runs are multiplied by
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
SCRATCH = ("spots", "sums", "slopes", "lanes", "rows", "weights", "pieces")


class Record(ctypes.Structure):
    """A call as its kernel takes it; a thread's scratch memory is cut at the offsets named in SCRATCH."""

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


# NumPy's ABI: where its elements are stands behind the head that all of Python's objects have.
# ``array.ctypes`` and ``__array_interface__`` take ten times as long, and a call needs a dozen.
_words = ctypes.cast(8, ctypes.POINTER(ctypes.c_int64))  # memory, from address 8 on
_BEHIND = object.__basicsize__ - 8


def addresses(*arrays: np.ndarray | None) -> list[int]:
    """Return where arrays begin, 0 of None."""
    return [0 if array is None else _words[id(array) + _BEHIND >> 3] for array in arrays]
