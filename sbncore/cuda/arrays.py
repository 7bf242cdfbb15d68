"""The caller's arrays on a GPU: CuPy views in the storage types of `sbncore.arrays`."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

from sbncore.arrays import STORAGE
from sbncore.cuda.device import cupy

_STORAGE = {np.dtype(kind): np.dtype(kind) for kind in ("f8", "f4")} | {np.dtype("f2"): STORAGE["float16"]}


def borrowed(array: Any, name: str) -> Any:
    """Return a CuPy view of an array in CUDA memory.

    Raises:
        TypeError: if it is of another dtype.
        RuntimeError: if CuPy is missing, or finds no device.
    """
    xp = cupy()
    if not isinstance(array, xp.ndarray):
        if hasattr(array, "detach"):
            array = array.detach()
        if "bfloat16" in str(array.dtype) and hasattr(array, "view"):  # as bits, where it is PyTorch's
            array = array.view(sys.modules[type(array).__module__.partition(".")[0]].uint16)
            return xp.from_dlpack(array)
        array = xp.from_dlpack(array)
    storage = _STORAGE.get(array.dtype)
    if storage is None and array.dtype.name == "bfloat16":
        storage = STORAGE["bfloat16"]
    if storage is None:
        raise TypeError(f"{name}: expected dtype float64, float32, float16 or bfloat16, got {array.dtype}")
    return array if storage == array.dtype else array.view(storage)
