"""Tensors as the engine takes them: their addresses, dense copies where need be, and new memory."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format

from sbncore.adapters.torch import pages
from sbncore.layout import Layout, nearest

ELEMENTS = {
    torch.float64: "float64", torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16",
}  # fmt: skip
PARAMETER = dict.fromkeys(ELEMENTS, torch.float32) | {torch.float64: torch.float64}


def address(tensor: Tensor | None) -> int:
    """Return where a tensor's memory begins, 0 of None and of an empty one.

    Raises:
        RuntimeError: if its storage was freed.
    """
    if tensor is None:
        return 0
    begin = tensor.data_ptr()
    if not begin and tensor.numel():
        raise RuntimeError("a tensor without memory: its storage was freed")
    return begin


def raw_stream(index: int) -> int:
    """Return torch's current stream on a GPU, as CUDA knows it.

    Torch's compiler calls the same; `torch.cuda.current_stream` makes objects, which takes ten times as long.
    """
    stream: int = torch._C._cuda_getCurrentRawStream(index)
    return stream


def dense(x: Tensor) -> tuple[Tensor, Layout]:
    """Return x as the engine takes it, a copy if need be, and its layout.

    A copy lies as torch's batch_norm would let y lie.
    """
    layout = _dense_layout(x.shape, x.stride(), x.dtype)
    if layout is None or x.is_neg() or (x.is_cuda and address(x) % 16):
        address(x)
        x = x.resolve_neg().clone(memory_format=format_of(x))
        layout = layout_of(x)
    return x, layout


def dense_as(tensor: Tensor, x: Tensor) -> Tensor:
    """Return a tensor of a dense x's shape and dtype that lies as x does, a copy if need be."""
    if tensor.stride() != x.stride() or tensor.is_neg() or (tensor.is_cuda and address(tensor) % 16):
        address(tensor)
        return torch.empty_like(x).copy_(tensor)
    return tensor


def vector(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Return a parameter as the engine takes it, a copy if need be."""
    if tensor is None or (tensor.dtype is dtype and tensor.is_contiguous() and not tensor.is_neg()):
        return tensor
    address(tensor)
    return tensor.to(dtype).resolve_neg().contiguous()


def empty_like(x: Tensor) -> Tensor:
    """Return new memory as x, by torch; on the CPU in large pages where it is large."""
    new = torch.empty_like(x)
    if new.is_cpu and new.nbytes >= pages.HUGE_PAGES_FROM:
        pages.advise(new.data_ptr(), new.nbytes)
    return new


def format_of(x: Tensor) -> torch.memory_format:
    """Return the memory format that torch's batch_norm gives y."""
    return torch.contiguous_format if x.is_contiguous() else suggest_memory_format(x)


def layout_of(x: Tensor) -> Layout:
    """Return `sbncore.layout.layout_of` of a tensor (N, C, *spatial), real or a compiler's stand-in."""
    return nearest(tuple(x.shape), x.stride(), 1)


@lru_cache(maxsize=4096)
def _dense_layout(shape: torch.Size, strides: tuple[int, ...], dtype: torch.dtype) -> Layout | None:
    """Return the layout of tensors that are dense, and as whose y is to lie, or None of others."""
    x = torch.empty_strided(shape, strides, dtype=dtype, device="meta")
    alike = (torch.preserve_format, format_of(x))
    if any(torch.empty_like(x, memory_format=one).stride() != strides for one in alike):
        return None
    layout = layout_of(x)
    return layout if (x.movedim(1, -1) if layout.last else x).is_contiguous() else None
