"""The caller's arrays in and out: views of any array that speaks DLPack, and back, no copies.

Inside, an array is NumPy's, or on a GPU CuPy's, of its *storage* type: float64 and float32 as they are,
float16 and bfloat16 as int16 and uint16 of their bits, since NumPy has no bfloat16 and Numba no float16.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import numpy as np

STORAGE = {name: np.dtype(kind) for name, kind in zip(
    ("float64", "float32", "float16", "bfloat16"), ("f8", "f4", "i2", "u2"), strict=True)}  # fmt: skip
ELEMENT = {storage: name for name, storage in STORAGE.items()}
PARAMETER = {"float64": "float64", "float32": "float32", "float16": "float32", "bfloat16": "float32"}
LINE, LARGE = 64, 1 << 20  # bytes: a cache line, and memory worth beginning at one
CPU, CUDA = 1, (2, 13)  # DLPack's kDLCPU; kDLCUDA and kDLCUDAManaged


class ShortWay(NamedTuple):
    """An adapter's own view of an array of its framework, and back, where that is quicker than DLPack."""

    view: Callable[[Any], np.ndarray | None]  # None: DLPack must try
    array: Callable[[np.ndarray, Any], Any]


SHORT_WAYS: dict[type, ShortWay] = {}
_HERE: AbstractContextManager[None] = nullcontext()
Array = Any  # anything `borrow` takes


def element_type(array: np.ndarray) -> str:
    """Return "float64", "float32", "float16" or "bfloat16" of an array of a storage type."""
    return ELEMENT[array.dtype]


def borrow(array: Array, name: str) -> np.ndarray:
    """Return a view of the caller's array in its storage type: NumPy's, or CuPy's of what is on a GPU.

    Raises:
        TypeError: if it is no array, on another kind of device, of another dtype, or not in native byte
            order, or if it is on a GPU that CuPy cannot reach.
    """
    if type(array) is np.ndarray:
        return _as_storage(array, name)
    if isinstance(array, np.ndarray):
        if isinstance(array, np.ma.MaskedArray):
            raise TypeError(f"{name}: expected an array without a mask, got a masked array")
        return _as_storage(np.asarray(array), name)
    short = SHORT_WAYS.get(type(array))
    if short is not None:
        view = short.view(array)
        if view is not None:
            return view
    if not hasattr(array, "__dlpack__"):
        raise TypeError(f"{name}: expected an array (NumPy's or one with DLPack), got {type(array).__name__}")
    try:
        kind = array.__dlpack_device__()[0]
        if kind == CPU:
            return _exported(array, name)
    except (BufferError, ValueError, RuntimeError) as complaint:  # sparse, without memory, ...
        raise TypeError(f"{name}: expected an array that DLPack can export, got: {complaint}") from None
    if kind in CUDA:
        return _on_gpu(array, name)
    device = getattr(array, "device", "another device")
    raise TypeError(f"{name}: expected an array on the CPU or a CUDA device, got one on {device}")


def give(result: np.ndarray, like: Array) -> Array:
    """Return an array of a storage type, or of float64/float32, as the caller's own type of array."""
    name = ELEMENT[result.dtype]
    if isinstance(like, type(result)):
        if name == "float16":
            return result.view(np.float16)
        return result.view(like.dtype) if name == "bfloat16" else result
    short = SHORT_WAYS.get(type(like))
    if short is not None:
        array = short.array(result, like)
        if array is not None:
            return array
    xp = _namespace(like)
    if name == "bfloat16":
        if hasattr(like, "detach"):
            return xp.from_dlpack(result).view(like.dtype)
        return xp.asarray(result.view(np.asarray(like).dtype))
    return xp.from_dlpack(result.view(np.float16) if name == "float16" else result)


def widen(stored: np.ndarray) -> np.ndarray:
    """Return the values of a storage type in float64."""
    if stored.dtype == np.int16:
        stored = stored.view(np.float16)
    elif stored.dtype == np.uint16:
        stored = (stored.astype(np.uint32) << 16).view(np.float32)
    return stored.astype(np.float64)


def address(view: np.ndarray) -> int:
    """Return where an array begins in memory."""
    if isinstance(view, np.ndarray):
        return view.__array_interface__["data"][0]  # type: ignore[no-any-return]
    return view.data.ptr  # type: ignore[no-any-return]


def place(view: np.ndarray) -> str:
    """Return which device's memory a borrowed array is in, in words."""
    return "the CPU" if isinstance(view, np.ndarray) else f"cuda:{view.device.id}"


def on_device(view: np.ndarray) -> AbstractContextManager[Any]:
    """Return a context in which a borrowed array's device is the current one."""
    return _HERE if isinstance(view, np.ndarray) else view.device  # type: ignore[return-value]


def empty_like(view: np.ndarray) -> np.ndarray:
    """Return new memory of a borrowed array's shape and type, on its device.

    Large arrays begin at a cache line.
    """
    if isinstance(view, np.ndarray):
        if view.nbytes < LARGE:
            return np.empty_like(view)
        return empty(view.shape, view.dtype)
    from sbncore.cuda.device import device_of

    return device_of(view).empty(view.shape, view.dtype)


def empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Return new memory that begins at a cache line: the engine streams whole lines only.

    NumPy's own large arrays begin 16 bytes behind one.
    """
    nbytes = math.prod(shape) * dtype.itemsize
    memory = np.empty(nbytes + LINE, np.uint8)
    first = -address(memory) % LINE
    return memory[first : first + nbytes].view(dtype).reshape(shape)


def is_writeable(array: Array) -> bool:
    """Whether the caller's array may be written to: NumPy's say so, JAX's never are."""
    if isinstance(array, np.ndarray):
        return bool(array.flags.writeable)
    return not type(array).__module__.startswith("jax")


def writeable(view: np.ndarray) -> np.ndarray:
    """Return the same memory without the read-only mark that NumPy puts on what comes by DLPack.

    Also what the engine does with its inputs: a read-only array would be another compilation of each kernel.
    """
    if not isinstance(view, np.ndarray) or view.flags.writeable:
        return view
    return np.asarray(_Memory(view))


class _Memory:
    """Carries an array's memory through NumPy's array interface and keeps its owner alive."""

    def __init__(self, view: np.ndarray) -> None:
        self.owner = view
        interface = dict(view.__array_interface__)
        self.__array_interface__ = interface | {"data": (interface["data"][0], False)}


def _as_storage(array: np.ndarray, name: str) -> np.ndarray:
    dtype = array.dtype
    if dtype.kind == "f" and dtype.itemsize in (4, 8) and dtype.isnative:
        return array
    if not dtype.isnative:
        raise TypeError(f"{name}: expected native byte order, got dtype {dtype}")
    if dtype.name not in STORAGE:
        raise TypeError(f"{name}: expected dtype float64, float32, float16 or bfloat16, got {dtype}")
    return array.view(STORAGE[dtype.name])


def _on_gpu(array: Array, name: str) -> Any:
    from sbncore.cuda.device import cupy

    xp = cupy()
    if not isinstance(array, xp.ndarray):
        if hasattr(array, "detach"):
            array = array.detach()
            if "bfloat16" in str(array.dtype):
                return xp.from_dlpack(array.view(_namespace(array).int16)).view(np.uint16)
        array = xp.from_dlpack(array)
    return _as_storage(array, name)


def _exported(array: Array, name: str) -> np.ndarray:
    if hasattr(array, "detach"):
        array = array.detach()  # PyTorch exports no tensor that requires a gradient
    if "bfloat16" not in str(array.dtype):
        return _as_storage(np.from_dlpack(array), name)
    if hasattr(array, "detach"):  # NumPy's DLPack cannot carry it
        return np.from_dlpack(array.view(_namespace(array).int16)).view(np.uint16)
    return np.asarray(array).view(np.uint16)


def _namespace(array: Array) -> Any:
    if hasattr(array, "__array_namespace__"):
        return array.__array_namespace__()
    return sys.modules[type(array).__module__.partition(".")[0]]
