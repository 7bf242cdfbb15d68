"""What forward keeps for backward."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from sbncore.arrays import ELEMENT, LARGE, PARAMETER, borrow
from sbncore.interchange import detached
from sbncore.layout import Layout
from sbncore.plans import Plan
from sbncore.statistics import Statistics, public

PROBED = 32  # elements that are looked at again: of a large array, for less than a hundredth of a call
ROWS = 6  # of the values: mean, var, rstd, shift, scale, offset


class Kept(NamedTuple):
    """The caller's memory for what backward needs beside x, where an autograd wants to hold it."""

    values: Any  # (ROWS, C) float64
    mask: Any  # (mask_size,) uint8, or None
    step: Any = None  # (1,) int64 on a GPU: the step drawn at, where an array held it


@dataclass(eq=False, repr=False, slots=True)  # frozen would take a microsecond
class Saved:
    """What backward needs: x itself (no copy where its memory is dense), the statistics, a bit per element.

    x must not change between forward and backward. ``statistics`` are those that normalized.
    """

    like: Any  # the caller's x
    x: Any  # its memory, flat
    layout: Layout
    plan: Plan
    state: Any  # the engine's own
    weight: Any
    bias: Any
    residual: bool
    relu: bool
    gradient: str
    call: Any = None  # the cached call, where forward took one
    probe: bytes | None = None  # by `probe`, of x as it was

    @property
    def statistics(self) -> Statistics:
        """Mean and var (C,), and count, of the values that normalized."""
        return public(self.state.moments, PARAMETER[ELEMENT[self.x.dtype]], self.like)

    def check(self) -> None:
        """Look x up again: its framework may have moved its memory, and somebody may have changed it.

        Raises:
            TypeError: if its memory was freed.
            ValueError: if it is another, or was seen to have changed.
        """
        if type(self.like) is not np.ndarray:
            view = borrow(detached(self.like), "x")
            if view.shape != self.layout.shape or view.dtype != self.x.dtype:
                raise ValueError(f"saved: expected x of shape {self.layout.shape} still, got {view.shape}")
            if self.layout.lies(view):
                self.x = self.layout.flatten(view)
        if self.probe is not None and self.probe != probe(self.x):
            raise ValueError("saved: expected x as it was in forward, got one that has changed since")

    def __repr__(self) -> str:
        return f"Saved(shape={self.layout.shape}, gradient={self.gradient!r}, plan={self.plan!r})"


def probe(x: np.ndarray) -> bytes | None:
    """Return a few elements of a large array in the CPU's memory, spread over it; of another, None."""
    if not isinstance(x, np.ndarray) or x.nbytes < LARGE:
        return None
    return x[:: x.size // PROBED].tobytes()


def digest(x: Any) -> int:
    """Return a checksum of an array's values; from a GPU they are fetched."""
    return zlib.crc32(np.ascontiguousarray(x.get() if hasattr(x, "get") else x).data)
