"""Shapes and memory: an array of any layout as flat memory with its sizes N, C, S, and back."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from sbncore.arrays import writeable


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

    def flatten(self, array: np.ndarray) -> np.ndarray:
        """Return the array's memory in this layout, flat: a view where it lies so already, else a copy."""
        ordered = self._ordered(array)
        if not (ordered.flags.c_contiguous and ordered.flags.aligned):
            ordered = np.array(ordered, order="C")
        return writeable(ordered).reshape(-1)

    def restore(self, flat: np.ndarray) -> np.ndarray:
        """Return flat memory of this layout in the logical shape, as a view."""
        sizes = (self.N, *self.spatial, self.C) if self.last else (self.N, self.C, *self.spatial)
        return np.moveaxis(flat.reshape(sizes), -1 if self.last else 1, self.axis)

    def view(self, array: np.ndarray) -> np.ndarray | None:
        """Return `flatten` if it is a view on the array, else None."""
        ordered = self._ordered(array)
        if ordered.flags.c_contiguous and ordered.flags.aligned:
            return writeable(ordered).reshape(-1)
        return None

    def _ordered(self, array: np.ndarray) -> np.ndarray:
        return np.moveaxis(array, self.axis, -1 if self.last else 1)


def layout_of(array: np.ndarray, axis: int) -> Layout:
    """Return the layout the array lies in, or for odd strides the one that is nearest.

    One position a map is channels-last, whose rows are the long ones then.
    """
    shape, axis = array.shape, axis % array.ndim
    last, first = Layout(shape, axis, True), Layout(shape, axis, False)
    if first.S <= 1:
        return last
    if first._ordered(array).flags.c_contiguous:
        return first
    if last._ordered(array).flags.c_contiguous:
        return last
    spatial = [abs(s) for a, s in enumerate(array.strides) if a not in (0, axis) and shape[a] > 1]
    return last if abs(array.strides[axis]) < min(spatial) else first
