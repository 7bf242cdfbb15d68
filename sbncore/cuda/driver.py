"""The driver's launch of a kernel, by ctypes: CuPy's launch takes no attributes, and twice the time."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

_CONFIG = struct.Struct("<7I4xQQI4x")  # CUlaunchConfig: grid, block, shared memory, stream, attributes
_Arguments = ctypes.c_char_p * 1
_PROGRAMMATIC_STREAM_SERIALIZATION = 6


class _Attribute(ctypes.Structure):  # CUlaunchAttribute
    _fields_ = [("kind", ctypes.c_int), ("_", ctypes.c_int), ("value", ctypes.c_int * 16)]


_OVERLAP = _Attribute(_PROGRAMMATIC_STREAM_SERIALIZATION, 0, (ctypes.c_int * 16)(1))
_OVERLAP_ADDRESS = ctypes.addressof(_OVERLAP)


class Launch(NamedTuple):
    """A kernel, as its template's instance, and its grid."""

    kernel: str
    grid: tuple[int, int]
    threads: int


def launcher(argument: bytes, stream: int, overlap: bool) -> Callable[[int, tuple[int, int], int], None]:
    """Return what launches a kernel by its function, grid and threads, on a stream, with one argument.

    With ``overlap`` its blocks may be resident before the kernel in front of it has ended; it waits itself
    (``begin`` in device.cu). Needs compute capability 9.0 and a driver of CUDA 12.3 or later.

    Raises:
        RuntimeError: with the driver's error.
    """
    enqueue, arguments = _library().cuLaunchKernelEx, _Arguments(argument)

    def launch(function: int, grid: tuple[int, int], threads: int) -> None:
        config = _CONFIG.pack(*grid, 1, threads, 1, 1, 0, stream, _OVERLAP_ADDRESS, overlap)
        code = enqueue(config, function, arguments, None)
        if code:
            raise RuntimeError(f"the CUDA driver refuses to launch a kernel: {_message(code)}")

    return launch


@cache
def _library() -> Any:
    library = ctypes.CDLL("libcuda.so.1")
    library.cuLaunchKernelEx.argtypes = [ctypes.c_char_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p]
    return library


def _message(code: int) -> str:
    text = ctypes.c_char_p()
    _library().cuGetErrorString(code, ctypes.byref(text))
    return f"{(text.value or b'unknown').decode()} ({code})"
