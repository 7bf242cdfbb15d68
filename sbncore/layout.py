"""Shapes and memory: an array of any layout as flat memory with its sizes N, C, S, and back."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from sbncore.arrays import aligned, contiguous, dense


class Layout(NamedTuple):
    """Logical shape, channels at ``axis``; memory (N, S, C) if ``last``, else (N, C, S)."""

    shape: tuple[int, ...]
    axis: int
    last: bool

    @property
    def N(self) -> int:
        return self.shape[0]

    @property
    def C(self) -> int:
        return self.shape[self.axis]

    @property
    def spatial(self) -> tuple[int, ...]:
        return self.shape[1 : self.axis] + self.shape[self.axis + 1 :]

    @property
    def S(self) -> int:
        return math.prod(self.spatial)

    @property
    def sizes(self) -> tuple[int, int, int]:
        return self.N, self.C, self.S

    def flatten(self, array: np.ndarray) -> np.ndarray:
        """Return the array's memory in this layout, flat: a view where it lies so already, else a copy."""
        ordered = self._ordered(array)
        if not _dense(ordered):
            ordered = dense(ordered)
        return ordered.reshape(-1)

    def lies(self, array: np.ndarray) -> bool:
        """Whether the array's memory is in this layout already."""
        return _dense(self._ordered(array))

    def restore(self, flat: np.ndarray) -> np.ndarray:
        """Return flat memory of this layout in the logical shape, as a view."""
        sizes, axes = _restoring(self)
        array = flat.reshape(*sizes)
        return array if axes is None else array.transpose(axes)

    @property
    def order(self) -> tuple[int, ...] | None:
        """The axes in the order of memory, or None where that is their own."""
        last = len(self.shape) - 1
        if self.axis == (last if self.last else 1):
            return None
        spatial = [axis for axis in range(1, last + 1) if axis != self.axis]
        return (0, *spatial, self.axis) if self.last else (0, self.axis, *spatial)

    def _ordered(self, array: np.ndarray) -> np.ndarray:
        order = self.order
        return array if order is None else array.transpose(order)


@lru_cache(maxsize=1024)
def _restoring(layout: Layout) -> tuple[tuple[int, ...], tuple[int, ...] | None]:
    """Return the sizes in the order of memory, and how their axes are transposed to the logical ones."""
    N, C, spatial = layout.N, layout.C, layout.spatial
    sizes = (N, *spatial, C) if layout.last else (N, C, *spatial)
    here, axis = len(sizes) - 1 if layout.last else 1, layout.axis
    if here == axis:
        return sizes, None
    others = [each for each in range(len(sizes)) if each != here]
    return sizes, (*others[:axis], here, *others[axis:])


def _dense(ordered: np.ndarray) -> bool:
    return contiguous(ordered) and aligned(ordered)


def layout_of(array: np.ndarray, axis: int) -> Layout:
    """Return the layout the array lies in, or for odd strides the one that is nearest.

    One position a map is channels-last, whose rows are the long ones then.
    """
    key = (array.shape, array.strides, axis)
    found = _found.get(key)
    if found is None:
        if len(_found) >= 4096:
            _found.clear()
        found = _found[key] = nearest(*key)
    return found


_found: dict[tuple[tuple[int, ...], tuple[int, ...], int], Layout] = {}


def nearest(shape: tuple[int, ...], strides: tuple[int, ...], axis: int) -> Layout:
    """Return `layout_of` of arrays of such a shape and strides, in elements or in bytes."""
    axis %= len(shape)
    last, first = Layout(shape, axis, True), Layout(shape, axis, False)
    if first.S <= 1:
        return last
    if shape[axis] <= 1 or not shape[0]:  # a channel's stride says nothing
        return first
    spatial = [abs(s) for a, s in enumerate(strides) if a not in (0, axis) and shape[a] > 1]
    return last if abs(strides[axis]) < min(spatial) else first
