"""CuPy's arrays as the engine's views, and views as CuPy's arrays, with which CuPy can compute."""

from __future__ import annotations

import threading
from types import TracebackType
from typing import Any

import numpy as np

from sbncore.cuda.device import cupy
from sbncore.dlpack import Memory
from sbncore.views import STORAGE, DeviceMemory, DeviceView

_STORAGE: dict[Any, np.dtype] = {}  # by CuPy's dtypes, whose names take long to find


class Stream:
    """A stream's address as CuPy takes it; PyTorch's own streams speak this protocol from 2.10 on."""

    def __init__(self, address: int) -> None:
        self._address = address

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self._address


def view_of(array: Any, dtype: np.dtype | None = None) -> DeviceView:
    """Return the view of a CuPy array, of its own dtype or of the one given."""
    data = array.data
    return DeviceView(
        data.ptr, array.shape, array.strides, dtype or array.dtype, data.device_id, array, MEMORY
    )


def stored(array: Any) -> DeviceView | None:
    """Return the view of a CuPy array in its storage type, None of a type that has none."""
    dtype = array.dtype
    found = _STORAGE.get(dtype)
    if found is None:
        if not dtype.isnative or dtype.name not in STORAGE:
            return None
        found = _STORAGE[dtype] = STORAGE[dtype.name]
    return view_of(array, found)


def view_of_memory(memory: Memory) -> DeviceView:
    """Return the view of what a DLPack capsule describes."""
    return DeviceView(
        memory.address,
        memory.shape,
        memory.strides,
        memory.dtype,
        memory.device_index,
        memory.capsule,
        MEMORY,
    )


def array_of(view: DeviceView) -> Any:
    """Return CuPy's array of a view, of its storage type.

    CuPy's current stream waits for what the view's framework has enqueued.
    """
    working = getattr(_current, "working", None)
    if working is not None:
        working.compute()
    _wait(view.memory.stream(view.index), cupy().cuda.get_current_stream())
    return _over(view, view.dtype)


def as_cupys(view: Any, like: Any) -> Any:
    """Return a view of CuPy's own memory as an array of the dtype of ``like``, None of another's."""
    own = isinstance(view, DeviceView) and view.memory is MEMORY
    return _over(view, like.dtype) if own else None


def _over(view: DeviceView, dtype: Any) -> Any:
    xp = cupy()
    reach = (stride * (size - 1) for size, stride in zip(view.shape, view.strides, strict=True))
    nbytes = view.dtype.itemsize + sum(reach) if view.size else 0
    if isinstance(view.owner, xp.ndarray):
        memory = view.owner.data.mem
        pointer = xp.cuda.MemoryPointer(memory, view.address - memory.ptr)
    else:
        pointer = xp.cuda.MemoryPointer(
            xp.cuda.UnownedMemory(view.address, nbytes, view.owner, view.index), 0
        )
    return xp.ndarray(view.shape, dtype, pointer, view.strides)


class Working:
    """A context for work on a view's GPU, which waits for what the frameworks of other views have enqueued.

    CuPy's memory comes from the current device. Where memory is another framework's, that device and that
    framework's stream become CuPy's current ones when CuPy first computes (`array_of`), which is rare.
    """

    def __init__(self, view: DeviceView, others: tuple[Any, ...]) -> None:
        self._view, self._contexts = view, list[Any]()
        self._mixed = [o for o in others if o is not None and o.memory is not view.memory]

    def __enter__(self) -> None:
        self._outer, _current.working = getattr(_current, "working", None), self
        if self._view.memory is MEMORY or self._mixed:
            self.compute()

    def compute(self) -> None:
        """Let CuPy compute on the view's GPU, in order with its framework."""
        if self._contexts:
            return
        cuda, index, own = cupy().cuda, self._view.index, self._view.memory is MEMORY
        outer = cuda.get_current_stream()
        stream = outer if own else cuda.Stream.from_external(Stream(self._view.memory.stream(index)))
        for other in self._mixed:
            _wait(outer.ptr if other.memory is MEMORY else other.memory.stream(index), stream)
        self._contexts = [cuda.Device(index)] if own else [cuda.Device(index), stream]
        for each in self._contexts:
            each.__enter__()

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        _current.working = self._outer
        for each in reversed(self._contexts):
            each.__exit__(kind, value, trace)


_current = threading.local()


def _wait(address: int, stream: Any) -> None:
    """Let a stream wait for what is enqueued on another."""
    if address != stream.ptr:
        stream.wait_event(cupy().cuda.Stream.from_external(Stream(address)).record())


def _new(size: int, dtype: np.dtype, index: int) -> DeviceView:
    return view_of(cupy().empty(size, dtype))  # within `Working`, on the device of that index


def _stream(index: int) -> int:
    return cupy().cuda.get_current_stream(index).ptr  # type: ignore[no-any-return]


MEMORY = DeviceMemory(_new, _stream)
