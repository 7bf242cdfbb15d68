"""Tensors as the functional API's views, and back: by their addresses, else by DLPack."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from sbncore import arrays, dlpack
from sbncore.adapters.torch.tensors import ELEMENTS, address
from sbncore.views import DeviceMemory, DeviceView

DTYPES = {
    arrays.STORAGE[element]: dtype for dtype, element in ELEMENTS.items()
} | {np.dtype("u1"): torch.uint8}  # fmt: skip


def view_of(tensor: Tensor) -> Any:
    """Return a tensor's memory as a view of its storage type, or None where DLPack must try.

    `torch.Tensor.numpy` would do on the CPU, but leaves the tensor's storage unresizable for good.
    """
    element = ELEMENTS.get(tensor.dtype)
    if element is None or tensor.layout is not torch.strided or tensor.is_neg():
        return None
    dtype = arrays.STORAGE[element]
    shape, strides = tuple(tensor.shape), tuple(stride * dtype.itemsize for stride in tensor.stride())
    if tensor.is_cuda:
        return DeviceView(address(tensor), shape, strides, dtype, tensor.get_device(), tensor, MEMORY)
    if tensor.is_cpu:
        memory = dlpack.Memory(address(tensor), shape, strides, dtype, dlpack.CPU, 0, "", tensor)
        return dlpack.numpy_view(memory)
    return None


def tensor_of(view: Any, like: Tensor) -> Tensor | None:
    """Return a view of NumPy's memory or of PyTorch's as a tensor, None of another's."""
    if isinstance(view, DeviceView) and view.memory is MEMORY:
        tensor: Tensor = view.owner
        itemsize = view.dtype.itemsize
        return tensor.as_strided(view.shape, tuple(stride // itemsize for stride in view.strides))
    if not isinstance(view, np.ndarray):
        return None
    if view.dtype == np.uint16:
        return torch.from_numpy(view.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(view.view(np.float16) if view.dtype == np.int16 else view)


def _new(size: int, dtype: np.dtype, index: int) -> DeviceView:
    memory = torch.empty(size, dtype=DTYPES[dtype], device=torch.device("cuda", index))
    return DeviceView(memory.data_ptr(), (size,), (dtype.itemsize,), dtype, index, memory, MEMORY)


def _stream(index: int) -> int:
    return torch.cuda.current_stream(index).cuda_stream


MEMORY = DeviceMemory(_new, _stream)


def register() -> None:
    """Let the functional API know PyTorch's tensors."""
    for kind in (torch.Tensor, torch.nn.Parameter):
        arrays.FRAMEWORKS[kind] = arrays.Framework(view_of, tensor_of)
