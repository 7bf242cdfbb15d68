"""The caller's arrays in and out: views of any array that speaks DLPack, and back, no copies.

Inside, an array is NumPy's, or on a GPU CuPy's, of its *storage* type: float64 and float32 as they are,
float16 and bfloat16 as int16 and uint16 of their bits, since NumPy has no bfloat16 and Numba no float16.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from sbncore import dlpack
from sbncore.interchange import exportable, way_back

STORAGE = {name: np.dtype(kind) for name, kind in zip(
    ("float64", "float32", "float16", "bfloat16"), ("f8", "f4", "i2", "u2"), strict=True)}  # fmt: skip
ELEMENT = {storage: name for name, storage in STORAGE.items()}
PARAMETER = {"float64": "float64", "float32": "float32", "float16": "float32", "bfloat16": "float32"}
LINE, LARGE = 64, 1 << 20  # bytes: a cache line, and memory worth beginning at one


class Framework(NamedTuple):
    """An adapter's own views of its framework's arrays, and back, which are quicker than DLPack's."""

    view: Callable[[Any], np.ndarray | None]  # in the storage type; None: DLPack must try
    array: Callable[[np.ndarray, Any], Any]


FRAMEWORKS: dict[type, Framework] = {}  # by the type of their arrays; an adapter enters its own
_HERE: AbstractContextManager[None] = nullcontext()
Array = Any  # anything `borrow` takes


def element_type(array: np.ndarray) -> str:
    """Return "float64", "float32", "float16" or "bfloat16" of an array of a storage type."""
    return ELEMENT[array.dtype]


def borrow(array: Array, name: str, written: bool = False) -> np.ndarray:
    """Return a view of the caller's array in its storage type: NumPy's, or CuPy's of what is on a GPU.

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


def giver(like: Array, view: np.ndarray) -> Callable[[np.ndarray], Array]:
    """Return `give` for results as ``view``, its way found: what is looked up before anything is written."""
    if isinstance(like, type(view)) or type(like) in FRAMEWORKS:
        return partial(give, like=like)
    return way_back(like, view.dtype)


def give(result: np.ndarray, like: Array) -> Array:
    """Return an array of a storage type as the caller's own type of array, else as NumPy's."""
    if isinstance(like, type(result)):
        if result.dtype == np.int16:
            return result.view(np.float16)
        return result.view(like.dtype) if result.dtype == np.uint16 else result
    framework = FRAMEWORKS.get(type(like))
    array = None if framework is None else framework.array(result, like)
    return way_back(like, result.dtype)(result) if array is None else array


def widen(stored: np.ndarray) -> np.ndarray:
    """Return the values of a storage type in float64."""
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
    return view.data.ptr  # type: ignore[no-any-return]


def vector(view: np.ndarray, element: str) -> np.ndarray:
    """Return an array (C,) as the engines read it: itself, or a dense copy of that element type."""
    dtype = STORAGE[element]
    if view.dtype != dtype:
        return widen(view).astype(dtype)
    dense = view.flags.c_contiguous and aligned(view)
    return view if dense else view.copy()


def narrow(values: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Return float32 or float64 values in a storage type, rounded to nearest even."""
    if dtype == values.dtype:
        return values
    if dtype != np.uint16:
        with np.errstate(over="ignore"):
            return values.astype("f2").view(dtype)
    bits = values.astype("f4").view("u4")
    nearest = (bits + (((bits >> 16) & 1) + 0x7FFF)) >> 16
    nan = (bits & 0x7FFFFFFF) > 0x7F800000  # rounding would make some of them infinite
    return (nearest * ~nan + ((bits | 0x400000) >> 16) * nan).astype("u2")


def place(view: np.ndarray) -> str:
    """Return which device's memory a borrowed array is in, in words."""
    return "the CPU" if isinstance(view, np.ndarray) else f"cuda:{view.device.id}"


def on_device(view: np.ndarray) -> AbstractContextManager[Any]:
    """Return a context in which a borrowed array's device is the current one."""
    return _HERE if isinstance(view, np.ndarray) else view.device  # type: ignore[return-value]


def aligned(view: np.ndarray) -> bool:
    """Return whether the engines may read an array's memory: at multiples of its elements, or on a GPU of
    16 bytes."""
    if isinstance(view, np.ndarray):
        return bool(view.flags.aligned)
    return address(view) % 16 == 0


def look(view: np.ndarray) -> tuple[Any, ...]:
    """Return what tells a borrowed array from others, but for its memory."""
    if isinstance(view, np.ndarray):
        return view.shape, view.strides, view.dtype.char, view.flags.aligned
    return view.shape, view.strides, view.dtype.char, address(view) % 16 == 0, view.device.id


def new(view: np.ndarray, size: int, dtype: Any) -> np.ndarray:
    """Return new memory of so many elements on a borrowed array's device."""
    if isinstance(view, np.ndarray):
        return empty(size, dtype)
    from sbncore.cuda.device import device_of

    return device_of(view).empty(size, dtype)  # type: ignore[no-any-return]


def empty(shape: int | tuple[int, ...], dtype: Any) -> np.ndarray:
    """Return new memory; large arrays begin at a cache line.

    The CPU engine streams whole lines only, and NumPy's own large arrays begin 16 bytes behind one.
    """
    kind = np.dtype(dtype)
    nbytes = kind.itemsize * (shape if isinstance(shape, int) else math.prod(shape))
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


def _from_gpu(array: Array, name: str, written: bool) -> Any:
    from sbncore.cuda.device import cupy

    xp = cupy()
    if isinstance(array, xp.ndarray):
        return _as_storage(array, name)
    stream = xp.cuda.get_current_stream().ptr or 1  # 1 is DLPack's name of the default stream
    try:
        memory = dlpack.memory_of(array, written, stream)
    except dlpack.Unfit as complaint:
        raise TypeError(_unfit(name, complaint)) from None
    if written and memory.refusal:
        raise ValueError(f"{name}: expected a writeable array, got {memory.refusal}")
    return dlpack.cupy_view(memory)
