"""An array in a GPU's memory as the engine sees it: where it begins, how it lies, and who keeps it.

An array in the CPU's memory is NumPy's; of one on a GPU the engine needs no more than this, and to make it
takes a tenth of the time of an array of CuPy's. Either is of its *storage* type: float64 and float32 as they
are, float16 and bfloat16 as int16 and uint16 of their bits, since NumPy has no bfloat16 and Numba no float16.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

STORAGE: dict[str, np.dtype] = {
    "float64": np.dtype("f8"), "float32": np.dtype("f4"), "float16": np.dtype("i2"),
    "bfloat16": np.dtype("u2"),
}  # fmt: skip


class DeviceView:
    """``shape`` and ``strides``, in bytes, of memory at ``address`` on the GPU ``index``.

    Args:
        dtype: the storage type.
        owner: whoever keeps the memory: an array of the framework's.
        memory: where new arrays beside this one come from.
    """

    __slots__ = ("address", "dtype", "index", "memory", "owner", "shape", "strides")

    def __init__(
        self,
        address: int,
        shape: tuple[int, ...],
        strides: tuple[int, ...],
        dtype: np.dtype,
        index: int,
        owner: Any,
        memory: DeviceMemory,
    ) -> None:
        self.address, self.shape, self.strides, self.dtype = address, shape, strides, dtype
        self.index, self.owner, self.memory = index, owner, memory

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def contiguous(self) -> bool:
        """Whether the elements are dense in C's order."""
        return _contiguous(self.shape, self.strides, self.dtype.itemsize)

    def reshape(self, *shape: int) -> DeviceView:
        """Return dense memory in another shape; -1 is all of it."""
        if shape == (-1,):
            shape = (self.size,)
        return self._as(shape, _strides(shape, self.dtype.itemsize))

    def transpose(self, axes: tuple[int, ...]) -> DeviceView:
        shape, strides = self.shape, self.strides
        return self._as(tuple(shape[axis] for axis in axes), tuple(strides[axis] for axis in axes))

    def _as(self, shape: tuple[int, ...], strides: tuple[int, ...]) -> DeviceView:
        return DeviceView(self.address, shape, strides, self.dtype, self.index, self.owner, self.memory)


class DeviceMemory(NamedTuple):
    """A framework's memory on GPUs, and the stream that its work is enqueued on."""

    new: Callable[[int, np.dtype, int], DeviceView]  # of so many elements, on the GPU of an index
    stream: Callable[[int], int]  # the current one, on the GPU of an index


@lru_cache(maxsize=4096)
def _contiguous(shape: tuple[int, ...], strides: tuple[int, ...], itemsize: int) -> bool:
    dense = _strides(shape, itemsize)
    same = (n == 1 or a == b for n, a, b in zip(shape, strides, dense, strict=True))
    return 0 in shape or all(same)


@lru_cache(maxsize=4096)
def _strides(shape: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    """Return the strides of dense memory in C's order, in bytes."""
    return tuple(itemsize * math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
