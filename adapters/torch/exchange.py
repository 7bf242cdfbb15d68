"""Tensors as the functional API's views, and back: by their addresses, else by DLPack."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sbncore import arrays, dlpack
from sbncore.adapters.torch.tensors import ELEMENTS, address, raw_stream
from sbncore.views import DeviceMemory, DeviceView

STORAGE = {dtype: arrays.STORAGE[element] for dtype, element in ELEMENTS.items()}
DTYPES = {stored: dtype for dtype, stored in STORAGE.items()} | {np.dtype("u1"): torch.uint8}


def view_of(tensor: Tensor) -> Any:
    """Return a tensor's memory as a view of its storage type, or None where DLPack must try.

    `torch.Tensor.numpy` would do on the CPU, but leaves the tensor's storage unresizable for good.
    """
    if tensor.dtype not in STORAGE or tensor.layout is not torch.strided:
        return None
    if tensor.is_neg() or _followed(tensor):
        return None
    try:
        begin = address(tensor)
    except RuntimeError:  # a freed storage, a transform's tensor
        return None
    shape, strides, dtype = _described(tensor.shape, tensor.stride(), tensor.dtype)
    if tensor.is_cuda:
        return DeviceView(begin, shape, strides, dtype, tensor.get_device(), tensor, MEMORY)
    if tensor.is_cpu:
        memory = dlpack.Memory(begin, shape, strides, dtype, dlpack.CPU, 0, "", tensor)
        return dlpack.numpy_view(memory)
    return None


@lru_cache(maxsize=4096)
def _described(
    shape: torch.Size, strides: tuple[int, ...], dtype: torch.dtype
) -> tuple[tuple[int, ...], tuple[int, ...], np.dtype]:
    """Return shape and strides, in bytes, as views have them, and the storage type."""
    stored = STORAGE[dtype]
    return tuple(shape), tuple(stride * stored.itemsize for stride in strides), stored


def _followed(tensor: Tensor) -> bool:
    """Return whether autograd, forward mode or a trace may follow a tensor."""
    level = torch.autograd.forward_ad._current_level
    return tensor.requires_grad or level >= 0 or torch._C._is_tracing()


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


MEMORY = DeviceMemory(_new, raw_stream)


def register() -> None:
    """Let the functional API know PyTorch's tensors."""
    for kind in (torch.Tensor, torch.nn.Parameter):
        arrays.FRAMEWORKS[kind] = arrays.Framework(view_of, tensor_of)
