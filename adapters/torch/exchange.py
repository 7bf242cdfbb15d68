"""Tensors to the engine and back: by DLPack, on the CPU without the framework's own checks around it."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format

from sbncore import arrays
from sbncore.cpu import pages
from sbncore.layout import Layout

_HERE: AbstractContextManager[None] = nullcontext()
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


def memory_of(tensor: Tensor) -> Any:
    """Return NumPy's or CuPy's view of a tensor of any real dtype that needs no gradient."""
    if tensor.is_cuda:
        from sbncore.cuda.device import cupy

        return cupy().from_dlpack(tensor)
    return numpy_of(tensor)


def format_of(x: Tensor) -> torch.memory_format:
    """Return the memory format that torch's batch_norm gives y."""
    return torch.contiguous_format if x.is_contiguous() else suggest_memory_format(x)


def empty_like(x: Tensor) -> Tensor:
    """Return new memory as x, by torch; on the CPU in large pages where it is large."""
    new = torch.empty_like(x)
    if new.is_cpu and new.nbytes >= pages.LARGE:
        pages.advise(new.data_ptr(), new.nbytes)
    return new


def layout_of(x: Tensor) -> Layout:
    """Return `sbncore.layout.layout_of` of a tensor (N, C, *spatial), real or a compiler's stand-in."""
    shape, strides = tuple(x.shape), x.stride()
    last, first = Layout(shape, 1, True), Layout(shape, 1, False)
    if first.S <= 1:
        return last
    if x.is_contiguous():
        return first
    if x.movedim(1, -1).is_contiguous():
        return last
    spatial = [strides[axis] for axis in range(2, x.ndim) if shape[axis] > 1]
    return last if strides[1] < min(spatial) else first


def dense_layout(
    shape: torch.Size, strides: tuple[int, ...], dtype: torch.dtype
) -> Layout | None:
    """Return the layout of tensors that are dense, and as whose y is to lie, or None of others."""
    x = torch.empty_strided(shape, strides, dtype=dtype, device="meta")
    alike = (torch.preserve_format, format_of(x))
    if x.numel() == 0 or any(torch.empty_like(x, memory_format=one).stride() != strides for one in alike):
        return None
    layout = layout_of(x)
    return layout if (x.movedim(1, -1) if layout.last else x).is_contiguous() else None


def engine_stream(x: Tensor) -> AbstractContextManager[Any]:
    """Return a context in which a GPU's kernels go to torch's current stream there."""
    if x.device.type != "cuda":
        return _HERE
    from sbncore.cuda.device import cupy

    return _CurrentStream(cupy(), torch.cuda.current_stream(x.device), x.device.index)


class Stream:
    """A stream's address as CuPy takes it; torch's own streams speak this protocol from 2.10 on."""

    def __init__(self, address: int) -> None:
        self._address = address

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self._address


class _CurrentStream:
    """CuPy's device and stream are torch's, within."""

    def __init__(self, xp: Any, stream: Any, device: int) -> None:
        self._device = xp.cuda.Device(device)
        self._make = lambda: xp.cuda.Stream.from_external(Stream(stream.cuda_stream))

    def __enter__(self) -> None:
        self._device.__enter__()
        self._stream = self._make()
        self._stream.__enter__()

    def __exit__(self, *reason: Any) -> None:
        self._stream.__exit__(*reason)
        self._device.__exit__(*reason)


for kind in (torch.Tensor, torch.nn.Parameter):
    arrays.SHORT_WAYS[kind] = arrays.ShortWay(view_of, tensor_of)
