"""The caller's arrays in and out: views of any array that speaks DLPack, and back, no copies.

Inside, an array is NumPy's, or on a GPU a `DeviceView`, of its storage type.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache, partial
from typing import Any, NamedTuple

import numpy as np

from sbncore import dlpack
from sbncore.interchange import exportable, way_back
from sbncore.views import STORAGE, DeviceView

ELEMENT = {storage: name for name, storage in STORAGE.items()}
PARAMETER = {"float64": "float64", "float32": "float32", "float16": "float32", "bfloat16": "float32"}
LINE, LARGE = 64, 1 << 20  # bytes: a cache line, and memory worth beginning at one


class Framework(NamedTuple):
    """An adapter's own views of its framework's arrays, and back, which are quicker than DLPack's."""

    view: Callable[[Any], Any]  # in the storage type; None: DLPack must try
    array: Callable[[Any, Any], Any]  # of a view, as another array; None: DLPack must try


FRAMEWORKS: dict[type, Framework] = {}  # by the type of their arrays; an adapter enters its own
_HERE: AbstractContextManager[None] = nullcontext()
Array = Any  # anything `borrow` takes


def element_type(array: np.ndarray) -> str:
    """Return "float64", "float32", "float16" or "bfloat16" of an array of a storage type."""
    return ELEMENT[array.dtype]


def borrow(array: Array, name: str, written: bool = False) -> Any:
    """Return a view of the caller's array in its storage type: NumPy's, or a `DeviceView` of one on a GPU.

    Raises:
        TypeError: if it is no array, on another kind of device, of another dtype, or not in native byte
            order, if it is on a GPU that CuPy cannot reach, or a tensor that autograd follows.
        ValueError: if it is to be written, and is read-only or would come as a copy.
    """
    if isinstance(array, np.ndarray):
        if not written and type(array) is np.ndarray and array.dtype.char in "fd" and array.dtype.isnative:
            return array
        if isinstance(array, np.ma.MaskedArray):
            raise TypeError(f"{name}: expected an array without a mask, got a masked array")
        if written and not array.flags.writeable:
            raise ValueError(f"{name}: expected a writeable array, got a read-only one")
        return _as_storage(np.asarray(array), name)
    framework = FRAMEWORKS.get(type(array))
    view = None if framework is None else framework.view(array)
    if view is not None:
        return view
    array = exportable(array, name, written)
    try:
        view = None if framework is None else framework.view(array)
        if view is not None:
            return view
        kind = array.__dlpack_device__()[0]
        if kind == dlpack.CPU:
            if not hasattr(array, "dtype"):  # what comes back is of x's type and dtype
                raise BufferError(f"{type(array).__name__} without dtype")
            memory = dlpack.memory_of(array, written)
            view = dlpack.numpy_view(memory)
    except dlpack.Unfit as complaint:
        raise TypeError(_unfit(name, complaint)) from None
    except Exception as complaint:  # sparse, deleted, freed, ...: every framework has errors of its own
        raise TypeError(
            f"{name}: expected an array that DLPack can export, got: {complaint}; pass one with its values "
            f"in memory, such as numpy.asarray({name})"
        ) from complaint
    if view is None:
        if kind not in dlpack.CUDA:
            device = getattr(array, "device", "another device")
            raise TypeError(f"{name}: expected an array on the CPU or a CUDA device, got one on {device}")
        return _from_gpu(array, name, written)
    if written and memory.refusal:
        raise ValueError(f"{name}: expected a writeable array, got {memory.refusal}")
    return view


def bytes_in(array: Array, name: str) -> Any:
    """Return a caller's array of bytes as NumPy's or CuPy's, to be read.

    Raises:
        TypeError: if it is no array, or of another dtype.
    """
    if not isinstance(array, np.ndarray):
        array = exportable(array, name, written=False)
        xp: Any = np
        if array.__dlpack_device__()[0] in dlpack.CUDA:
            from sbncore.cuda.device import cupy

            xp = cupy()
        array = array if isinstance(array, xp.ndarray) else xp.from_dlpack(array)
    if array.dtype != np.uint8:
        raise TypeError(f"{name}: expected dtype uint8, got {array.dtype}")
    return array


def giver(like: Array, view: np.ndarray) -> Callable[[np.ndarray], Array]:
    """Return `give` for results as ``view``, its way found: what is looked up before anything is written."""
    if not isinstance(like, type(view)) and type(like) not in FRAMEWORKS:
        way_back(like, view.dtype)
    return partial(give, like=like)


def give(result: Any, like: Array) -> Array:
    """Return an array of a storage type as the caller's own type of array, else as NumPy's or CuPy's."""
    framework = FRAMEWORKS.get(type(like))
    array = None if framework is None else framework.array(result, like)
    if array is not None:
        return array
    result = computable(result)
    if not isinstance(like, type(result)):
        return way_back(like, result.dtype)(result)
    if result.dtype.kind == "f" or result.dtype == np.uint8:
        return result
    return result.view(np.float16 if result.dtype == np.int16 else like.dtype)


def computable(view: Any) -> Any:
    """Return an array that NumPy or CuPy can compute with."""
    if not isinstance(view, DeviceView):
        return view
    return _cuda().array_of(view)


def viewed(array: Any) -> Any:
    """Return the engine's view of an array that NumPy or CuPy has computed."""
    if array is None or isinstance(array, np.ndarray | DeviceView):
        return array
    return _cuda().view_of(array)


def dense(view: Any) -> Any:
    """Return a copy whose elements are dense, in C's order."""
    return viewed(computable(view).copy(order="C"))


def assign(view: Any, values: Any) -> None:
    """Write values to the memory of a view."""
    computable(view)[...] = computable(values)


def widen(stored: np.ndarray) -> np.ndarray:
    """Return the values of a storage type in float64."""
    stored = computable(stored)
    if stored.dtype == np.int16:
        stored = stored.view(np.float16)
    elif stored.dtype == np.uint16:
        stored = (stored.astype(np.uint32) << 16).view(np.float32)
    return stored.astype(np.float64)


# NumPy's ABI: where its elements are stands behind the head that all of Python's objects have.
# ``array.ctypes`` and ``__array_interface__`` take ten times as long, and a call needs a dozen.
_words = ctypes.cast(8, ctypes.POINTER(ctypes.c_int64))  # memory, from address 8 on
_BEHIND = object.__basicsize__ - 8


def address(view: np.ndarray) -> int:
    """Return where a borrowed array begins in memory."""
    if isinstance(view, np.ndarray):
        return _words[id(view) + _BEHIND >> 3]
    return view.address  # type: ignore[no-any-return]


def vector(view: np.ndarray, element: str) -> np.ndarray:
    """Return an array (C,) as the engines read it: itself, or a dense copy of that element type."""
    dtype = STORAGE[element]
    if view.dtype != dtype:
        return viewed(widen(view).astype(dtype))  # type: ignore[no-any-return]
    return view if contiguous(view) and aligned(view) else dense(view)


def narrow(values: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Return float32 or float64 values in a storage type, rounded to nearest even."""
    if dtype == values.dtype:
        return values
    values = computable(values)
    if dtype != np.uint16:
        with np.errstate(over="ignore"):
            return values.astype("f2").view(dtype)
    bits = values.astype("f4").view("u4")
    nearest = (bits + (((bits >> 16) & 1) + 0x7FFF)) >> 16
    nan = (bits & 0x7FFFFFFF) > 0x7F800000  # rounding would make some of them infinite
    return (nearest * ~nan + ((bits | 0x400000) >> 16) * nan).astype("u2")


def place(view: np.ndarray) -> str:
    """Return which device's memory a borrowed array is in, in words."""
    return "the CPU" if isinstance(view, np.ndarray) else f"cuda:{view.index}"


def on_device(view: np.ndarray, *others: Any) -> AbstractContextManager[Any]:
    """Return a context in which a borrowed array's device is the current one.

    On a GPU what is launched there waits for the frameworks of the other arrays.
    """
    if isinstance(view, np.ndarray):
        return _HERE
    return _cuda().Working(view, others)  # type: ignore[no-any-return]


def stream_of(view: np.ndarray) -> int | None:
    """Return the stream that the framework of an array on a GPU works on, None of the CPU."""
    return None if isinstance(view, np.ndarray) else view.memory.stream(view.index)


def aligned(view: np.ndarray) -> bool:
    """Return whether an array begins where the engines may read it: on a GPU at a multiple of 16 bytes."""
    if isinstance(view, np.ndarray):
        return bool(view.flags.aligned)
    return view.address % 16 == 0


def contiguous(view: np.ndarray) -> bool:
    """Return whether an array's elements are dense in C's order."""
    return bool(view.flags.c_contiguous) if isinstance(view, np.ndarray) else view.contiguous


def look(view: np.ndarray) -> tuple[Any, ...]:
    """Return what tells a borrowed array from others, but for its memory."""
    if isinstance(view, np.ndarray):
        return view.shape, view.strides, view.dtype.char, view.flags.aligned
    return view.shape, view.strides, view.dtype.char, view.address % 16 == 0, view.index


def new(view: np.ndarray, size: int, dtype: Any) -> np.ndarray:
    """Return new memory of so many elements on a borrowed array's device."""
    if isinstance(view, np.ndarray):
        return empty(size, dtype)
    return view.memory.new(size, np.dtype(dtype), view.index)


def empty(shape: int | tuple[int, ...], dtype: Any) -> np.ndarray:
    """Return new memory; large arrays begin at a cache line.

    The CPU engine streams whole lines only, and NumPy's own large arrays begin 16 bytes behind one.
    """
    size = shape if isinstance(shape, int) else math.prod(shape)
    if 8 * size < LARGE:  # of the largest type
        return np.empty(shape, dtype)
    kind = np.dtype(dtype)
    nbytes = kind.itemsize * size
    if nbytes < LARGE:
        return np.empty(shape, kind)
    memory = np.empty(nbytes + LINE, np.uint8)
    first = -address(memory) % LINE
    return memory[first : first + nbytes].view(kind).reshape(shape)


def _as_storage(array: np.ndarray, name: str) -> np.ndarray:
    dtype = array.dtype
    if dtype.kind == "f" and dtype.itemsize in (4, 8) and dtype.isnative:
        return array
    if not dtype.isnative:
        raise TypeError(f"{name}: expected native byte order, got dtype {dtype}")
    if dtype.name not in STORAGE:
        raise TypeError(_unfit(name, dtype))
    return array.view(STORAGE[dtype.name])


def _unfit(name: str, dtype: object) -> str:
    return f"{name}: expected dtype float64, float32, float16 or bfloat16, got {dtype}"


@cache
def _cuda() -> Any:
    """Return the views of CuPy's arrays, which import CuPy; an import statement takes 2 us in every call."""
    from sbncore.cuda import views

    return views


def _from_gpu(array: Array, name: str, written: bool) -> Any:
    from sbncore.cuda.device import cupy

    xp, views = cupy(), _cuda()
    if isinstance(array, xp.ndarray):
        FRAMEWORKS[xp.ndarray] = Framework(views.stored, views.as_cupys)
        view = views.stored(array)
        if view is None:
            raise TypeError(_unfit(name, array.dtype))
        return view
    stream = xp.cuda.get_current_stream().ptr or 1  # 1 is DLPack's name of the default stream
    try:
        memory = dlpack.memory_of(array, written, stream)
    except dlpack.Unfit as complaint:
        raise TypeError(_unfit(name, complaint)) from None
    if written and memory.refusal:
        raise ValueError(f"{name}: expected a writeable array, got {memory.refusal}")
    return views.view_of_memory(memory)
