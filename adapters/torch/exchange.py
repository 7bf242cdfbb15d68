"""Tensors to the engine and back: by DLPack, on the CPU without the framework's own checks around it."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from sbncore import arrays

_versioned: Any = getattr(torch._C, "_to_dlpack_versioned", None)
_DENSE = (torch.float64, torch.float32, torch.float16)


class _Export:
    """A CPU tensor's DLPack capsule, without `torch.Tensor.__dlpack__`'s questions: three times as quick."""

    __slots__ = ("tensor",)

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    def __dlpack__(self, *, max_version: tuple[int, int] | None = None, **_: Any) -> Any:
        if max_version is None or _versioned is None:  # NumPy before 2.1, an older torch
            return torch._C._to_dlpack(self.tensor)
        return _versioned(self.tensor)

    def __dlpack_device__(self) -> tuple[int, int]:
        return arrays.CPU, 0


def numpy_of(tensor: Tensor) -> np.ndarray:
    """Return a CPU tensor's memory as NumPy's array, of a dtype that NumPy has.

    `torch.Tensor.numpy` would do, but leaves the tensor's storage unresizable for good.
    """
    if tensor.requires_grad:
        tensor = tensor.detach()
    if not tensor.data_ptr() and tensor.numel():
        raise RuntimeError("a tensor without memory: its storage was freed")
    return arrays.writeable(np.from_dlpack(_Export(tensor)))  # type: ignore[arg-type]


def view_of(tensor: Tensor) -> np.ndarray | None:
    """Return a CPU tensor's memory as NumPy's array of its storage type, or None where DLPack must try."""
    if tensor.device.type != "cpu" or tensor.layout is not torch.strided or tensor.is_neg():
        return None
    if tensor.dtype in _DENSE:
        view = numpy_of(tensor)
        return view.view(np.int16) if view.dtype == np.float16 else view
    if tensor.dtype is torch.bfloat16:
        return numpy_of(tensor.view(torch.int16)).view(np.uint16)
    return None


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


for kind in (torch.Tensor, torch.nn.Parameter):
    arrays.SHORT_WAYS[kind] = arrays.ShortWay(view_of, tensor_of)
