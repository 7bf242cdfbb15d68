"""Tensors as the functional API's views, and back: on the CPU by their addresses, else by DLPack."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from sbncore import arrays, dlpack
from sbncore.adapters.torch.tensors import ELEMENTS, address


def view_of(tensor: Tensor) -> np.ndarray | None:
    """Return a CPU tensor's memory as NumPy's array of its storage type, or None where DLPack must try.

    `torch.Tensor.numpy` would do, but leaves the tensor's storage unresizable for good.
    """
    element = ELEMENTS.get(tensor.dtype)
    if element is None or not tensor.is_cpu or tensor.layout is not torch.strided or tensor.is_neg():
        return None
    dtype = arrays.STORAGE[element]
    strides = tuple(stride * dtype.itemsize for stride in tensor.stride())
    memory = dlpack.Memory(address(tensor), tuple(tensor.shape), strides, dtype, dlpack.CPU, 0, "", tensor)
    return dlpack.numpy_view(memory)


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
