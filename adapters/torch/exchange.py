"""Tensors as the functional API's views, and back: by their addresses where nothing waits, else by DLPack."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from sbncore import arrays, dlpack
from sbncore.adapters.torch.tensors import ELEMENTS, address


def view_of(tensor: Tensor) -> Any:
    """Return a tensor's memory as NumPy's or CuPy's array of its storage type, or None where DLPack must try.

    `torch.Tensor.numpy` would do, but leaves the tensor's storage unresizable for good. On a GPU DLPack lets
    one stream wait for another; where both are the same, it takes ten times as long for nothing.
    """
    element = ELEMENTS.get(tensor.dtype)
    if element is None or tensor.layout is not torch.strided or tensor.is_neg():
        return None
    dtype = arrays.STORAGE[element]
    strides = tuple(stride * dtype.itemsize for stride in tensor.stride())
    kind, index = (dlpack.CPU, 0) if tensor.is_cpu else (dlpack.CUDA[0], tensor.get_device())
    memory = dlpack.Memory(address(tensor), tuple(tensor.shape), strides, dtype, kind, index, "", tensor)
    if tensor.is_cpu:
        return dlpack.numpy_view(memory)
    if tensor.is_cuda and tensor.numel() and _on_one_stream(tensor):
        return dlpack.cupy_view(memory)
    return None


def _on_one_stream(tensor: Tensor) -> bool:
    """Return whether CuPy's current device is the tensor's, and its current stream torch's."""
    from sbncore.cuda.device import cupy

    runtime, index = cupy().cuda, tensor.get_device()
    if runtime.runtime.getDevice() != index:
        return False
    return bool(runtime.get_current_stream().ptr == torch.cuda.current_stream(index).cuda_stream)


def tensor_of(view: np.ndarray, like: Tensor) -> Tensor | None:
    """Return NumPy's memory of a storage type as a tensor, or None where DLPack must try."""
    if not isinstance(view, np.ndarray):
        return None
    if view.dtype == np.uint16:
        return torch.from_numpy(view.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(view.view(np.float16) if view.dtype == np.int16 else view)


class Stream:
    """A stream's address as CuPy takes it; torch's own streams speak this protocol from 2.10 on."""

    def __init__(self, address: int) -> None:
        self._address = address

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self._address


def register() -> None:
    """Let the functional API know PyTorch's tensors."""
    for kind in (torch.Tensor, torch.nn.Parameter):
        arrays.FRAMEWORKS[kind] = arrays.Framework(view_of, tensor_of)
