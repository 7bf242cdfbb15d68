"""What forward keeps for backward."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from sbncore.arrays import ELEMENT, PARAMETER
from sbncore.layout import Layout
from sbncore.plans import Plan
from sbncore.statistics import Statistics, public

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
    call: Any = None  # the shorter way of a CPU's call, where forward took it

    @property
    def statistics(self) -> Statistics:
        """Mean and var (C,), and count, of the values that normalized."""
        return public(self.state.moments, PARAMETER[ELEMENT[self.x.dtype]], self.like)

    def __repr__(self) -> str:
        return f"Saved(shape={self.layout.shape}, gradient={self.gradient!r}, plan={self.plan!r})"
