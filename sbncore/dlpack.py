"""Views of other frameworks' arrays by DLPack: the memory that a capsule describes, NumPy's or CuPy's to use.

NumPy's and CuPy's own ``from_dlpack`` know no bfloat16, and NumPy's marks as read-only what comes in a
capsule from before DLPack 1.0, which cannot tell.
"""

from __future__ import annotations

import ctypes
from typing import Any, NamedTuple

import numpy as np

CPU, CUDA = 1, (2, 13)  # kDLCPU; kDLCUDA and kDLCUDAManaged
VERSION = (1, 0)  # the newest that is understood here
STORED = {(2, 64): "f8", (2, 32): "f4", (2, 16): "i2", (4, 16): "u2"}  # code and bits: kDLFloat, kDLBfloat
KINDS = {0: "int", 1: "uint", 2: "float", 4: "bfloat", 5: "complex", 6: "bool"}
_READ_ONLY, _IS_COPIED = 1, 2


class _Tensor(ctypes.Structure):  # DLTensor
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("device", ctypes.c_int32),
        ("index", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("offset", ctypes.c_uint64),
    ]


class _Versioned(ctypes.Structure):  # DLManagedTensorVersioned
    _fields_ = [
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("context", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
        ("flags", ctypes.c_uint64),
        ("tensor", _Tensor),
    ]


_api = ctypes.pythonapi
_is_valid = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.py_object, ctypes.c_char_p)(("PyCapsule_IsValid", _api))
_pointer = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(
    ("PyCapsule_GetPointer", _api)
)


class Memory(NamedTuple):
    """What a capsule says of an array; the capsule, while it lives, keeps the memory."""

    address: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]  # in bytes
    dtype: np.dtype  # the storage type
    device: int  # DLPack's kind
    device_index: int
    refusal: str  # why it must not be written, or ""
    capsule: Any


def memory_of(array: Any, written: bool, stream: int | None = None) -> Memory:
    """Return the memory of an array that speaks DLPack, itself and no copy if it is to be written.

    Raises:
        TypeError: for a dtype that is none of the engine's.
        Exception: whatever the exporter raises.
    """
    options: dict[str, Any] = {} if stream is None else {"stream": stream}
    try:
        newer = {"copy": False} if written else {}
        capsule = array.__dlpack__(max_version=VERSION, **newer, **options)
    except TypeError:  # before DLPack 1.0
        capsule = array.__dlpack__(**options)
    refusal = ""
    if _is_valid(capsule, b"dltensor_versioned"):
        versioned = _Versioned.from_address(_pointer(capsule, b"dltensor_versioned"))
        tensor, flags = versioned.tensor, versioned.flags
        refusal = "a read-only one" if flags & _READ_ONLY else "a copy" if flags & _IS_COPIED else ""
    else:
        tensor = _Tensor.from_address(_pointer(capsule, b"dltensor"))
    stored = STORED.get((tensor.code, tensor.bits))
    if stored is None or tensor.lanes != 1:
        raise Unfit(f"{KINDS.get(tensor.code, 'type ')}{tensor.bits if tensor.code != 6 else ''}")
    shape, dtype = tuple(tensor.shape[: tensor.ndim]), np.dtype(stored)
    if tensor.strides:
        strides = tuple(stride * dtype.itemsize for stride in tensor.strides[: tensor.ndim])
    else:  # C's order, before DLPack 1.2
        strides = np.lib.stride_tricks.as_strided(np.zeros(1, dtype), shape).copy().strides
    begin = (tensor.data or 0) + tensor.offset
    if not tensor.data and 0 not in shape:
        raise BufferError("a tensor without memory")
    return Memory(begin, shape, strides, dtype, tensor.device, tensor.index, refusal, capsule)


class Unfit(TypeError):
    """A dtype that is none of the engine's, by its name."""


class _Interface:
    """Carries memory through NumPy's array interface and keeps its owner alive."""

    def __init__(self, memory: Memory) -> None:
        self.owner = memory.capsule
        self.__array_interface__ = {
            "version": 3,
            "data": (memory.address, False),
            "shape": memory.shape,
            "strides": memory.strides,
            "typestr": memory.dtype.str,
        }


def numpy_view(memory: Memory) -> np.ndarray:
    """Return NumPy's view of memory on the CPU."""
    if 0 in memory.shape:
        return np.empty(memory.shape, memory.dtype)
    return np.asarray(_Interface(memory))
