"""What forward keeps for backward."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np

from sbncore.arrays import ELEMENT, LARGE, PARAMETER, address, borrow, computable
from sbncore.interchange import detached
from sbncore.layout import Layout
from sbncore.plans import Draw, Plan
from sbncore.signature import ROWS, Call
from sbncore.statistics import Moments, Statistics, public

PROBED = 32  # elements that are looked at again: of a large array, for less than a hundredth of a call


class State:
    """What the engine leaves for backward.

    Args:
        values: (ROWS * C + 1,) float64: see `sbncore.call.ROWS`, and the step drawn at.
        mask: the bits of y > 0, where backward needs them.
        count: of the statistics.
        draw, on_device: where the sample was; its step is in the values if it was read on a GPU.
    """

    def __init__(
        self, values: Any, mask: Any, count: float, channels: int, draw: Draw | None, on_device: bool
    ) -> None:
        self.values, self.mask, self.count, self.channels = values, mask, count, channels
        self.draw, self.on_device = draw, on_device
        self.memory: dict[str, Any] = {}  # a GPU's: a captured graph uses it as long as it lives

    @property
    def rows(self) -> Any:
        """The values of each channel, (ROWS, C)."""
        return computable(self.values)[: ROWS * self.channels].reshape(ROWS, self.channels)

    @property
    def step_address(self) -> int:
        """Where the step is in a GPU's memory, or 0."""
        return address(self.values) + 8 * ROWS * self.channels if self.on_device else 0

    @property
    def moments(self) -> Moments:
        return self.rows[0], self.rows[1], self.count


@dataclass(eq=False, repr=False, slots=True)  # frozen would take a microsecond
class Saved:
    """What backward needs: x itself (no copy where its memory is dense), the statistics, a bit per element.

    x must not change between forward and backward. ``statistics`` are those that normalized.
    """

    like: Any  # the caller's x
    x: Any  # its memory, flat
    layout: Layout
    plan: Plan
    state: State
    weight: Any
    bias: Any
    kinds: tuple[Any, ...]  # storage types of weight and bias
    residual: bool
    relu: bool
    gradient: str
    call: Call | None  # None for arrays without elements
    probe: bytes | None = None  # by `probe`, of x as it was

    @property
    def view(self) -> np.ndarray:
        """x in its logical shape."""
        return self.layout.restore(self.x)

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
    x = computable(x)
    return zlib.crc32(np.ascontiguousarray(x.get() if hasattr(x, "get") else x).data)
