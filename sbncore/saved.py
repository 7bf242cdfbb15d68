"""What forward keeps for backward."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from sbncore.arrays import ELEMENT, PARAMETER
from sbncore.layout import Layout
from sbncore.plans import Plan
from sbncore.statistics import Moments, Statistics, public

if TYPE_CHECKING:
    from sbncore.cpu.engine import Coefficients


@dataclass(frozen=True, eq=False, repr=False)
class Saved:
    """What backward needs: x itself (no copy where its memory is dense), the statistics, a bit per element.

    x must not change between forward and backward. ``statistics`` are those that normalized.
    """

    like: Any  # the caller's x
    x: np.ndarray  # its memory, flat
    layout: Layout
    plan: Plan
    moments: Moments
    rstd: np.ndarray
    coefficients: Coefficients
    weight: Any
    bias: Any
    residual: bool
    relu: bool
    mask: np.ndarray | None
    gradient: str

    @property
    def statistics(self) -> Statistics:
        """Mean and var (C,), and count, of the values that normalized."""
        return public(self.moments, PARAMETER[ELEMENT[self.x.dtype]], self.like)

    def __repr__(self) -> str:
        return f"Saved(shape={self.layout.shape}, gradient={self.gradient!r}, plan={self.plan!r})"
