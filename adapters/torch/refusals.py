"""What a sampled layer cannot do, said before anything has moved."""

from __future__ import annotations

import itertools
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, fx

from sbncore.adapters.torch import replay, rows
from sbncore.adapters.torch.ops import PLAIN

VECTORS = ("weight", "bias", "running_mean", "running_var")
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def check(
    layer: Any, input: Tensor, weight: Tensor | None, bias: Tensor | None, running_mean: Tensor | None,
    running_var: Tensor | None,
) -> None:  # fmt: skip
    """Complain about a call that estimates statistics, by torch's types of error where it has one.

    Raises:
        NotImplementedError: for the input's dtype, as torch.
        RuntimeError: for vectors that are not of the input's channels, as torch; under torch.jit.trace and
            torch.func's transforms.
        ValueError: for virtual samples that nobody has appended, and running statistics that share memory.
    """
    compiling = torch.compiler.is_compiling()
    if not compiling:
        _check_transforms(input, weight, bias)
    if input.dtype not in DTYPES:
        raise NotImplementedError(f"input: expected one of {DTYPES}, got {input.dtype}")
    if (running_mean is None) != (running_var is None):
        raise RuntimeError("running_mean, running_var: expected both or neither, got one of them")
    vectors, channels = (weight, bias, running_mean, running_var), input.shape[1:2]
    for vector in vectors:
        if vector is not None and vector.shape != channels:
            raise RuntimeError(_lengths(vectors, input))
    if input.is_meta and any(vector is not None and not vector.is_meta for vector in vectors):
        raise RuntimeError("input: expected a tensor on the layer's device, got one on the meta device")
    count = layer.sampler.virtual
    if count and not layer.own_rows:
        _check_rows(layer, count, input)
    if running_mean is None or running_var is None:
        return
    if running_mean is running_var:
        raise ValueError("running_var: expected memory apart from running_mean's, got the same tensor")
    if not compiling and type(running_mean) in PLAIN and not running_mean.is_meta:
        _check_apart(vectors, channels[0])


def leaf(layer: Any, input: fx.Proxy, residual: Any) -> Any:
    """Record the layer's call as torch.fx does its own layers': as one node."""
    tracer = input.tracer
    path = tracer.path_of_module(layer) if isinstance(tracer, fx.Tracer) else ""
    if not path:
        raise fx.proxy.TraceError("a layer by itself cannot be traced: trace a module that calls it")
    arguments = (input,) if residual is None else (input, residual)
    return tracer.create_proxy("call_module", path, arguments, {})


def _check_transforms(*tensors: Tensor | None) -> None:
    if torch._C._are_functorch_transforms_active():
        raise RuntimeError(
            "sampled batch normalization in training does not support torch.func's transforms (grad, vjp, "
            "jacrev, vmap, jvp): use torch.autograd.grad, or the layer in evaluation mode"
        )
    if torch._C._is_tracing():
        raise RuntimeError(
            "sampled batch normalization in training does not support torch.jit.trace, which would record "
            "one step's draw: trace the layer in evaluation mode, or use torch.compile"
        )
    forward = torch.autograd.forward_ad
    if forward._current_level >= 0 and any(
        t is not None and forward.unpack_dual(t).tangent is not None for t in tensors
    ):
        raise RuntimeError(
            "sampled batch normalization in training does not support forward mode: use torch.autograd.grad, "
            "or the layer in evaluation mode"
        )


def check_memory(*vectors: Tensor | None) -> None:
    """Complain about running statistics whose storage was freed, which torch's own evaluation would read.

    Raises:
        RuntimeError: naming the first of them.
    """
    if torch.compiler.is_compiling() or torch._C._is_tracing():  # which makes tensors of sizes
        return
    for name, vector in zip(VECTORS[2:], vectors, strict=True):
        if vector is None or type(vector) not in PLAIN:
            continue
        if not vector.is_meta and vector.numel() and not vector.data_ptr():
            raise RuntimeError(f"{name}: expected a tensor with memory, got one whose storage was freed")


def _lengths(vectors: tuple[Tensor | None, ...], input: Tensor) -> str:
    shapes = {name: tuple(v.shape) for name, v in zip(VECTORS, vectors, strict=True) if v is not None}
    C, different = input.shape[1], {*shapes.values()}
    if len(different) == 1 and len(shape := different.pop()) == 1:
        return f"input: expected {shape[0]} channels, got shape {tuple(input.shape)}"
    name, got = next(item for item in shapes.items() if item[1] != (C,))
    return f"{name}: expected shape ({C},) for the input's {C} channels, got {got}"


def _check_rows(layer: Any, count: int, input: Tensor) -> None:
    now = rows.now
    if now.virtual == count and now.rows == input.shape[0]:
        return
    if now.rows == 0:
        if not torch.compiler.is_compiling() and replay.recomputed():
            return  # a part of a VirtualBatch, recomputed
        got = "none"
    else:
        got = f"one of {now.virtual} in {now.rows} rows, and an input of {input.shape[0]}"
    raise ValueError(
        f"sampler: {layer.sampler} expects a VirtualBatch around the model, which appends {count} virtual "
        f"samples to each training batch, got {got}; own_rows=True says that the last rows are your own"
    )


def _check_apart(vectors: tuple[Tensor | None, ...], C: int) -> None:
    """Complain about running statistics that share memory with one another, weight or bias."""
    spans = [None if vector is None else _span(vector, C) for vector in vectors]
    *parameters, (a, a_end, a_stride), (b, b_end, b_stride) = spans  # type: ignore[misc]
    apart = (a_end <= b or b_end <= a) and a_stride and b_stride
    for span in parameters:
        if span is not None:
            first, last, _ = span
            apart = apart and (last <= a or a_end <= first) and (last <= b or b_end <= first)
    if apart:  # most often
        return
    named = {name: v for name, v in zip(VECTORS, vectors, strict=True) if v is not None}
    for name in VECTORS[2:]:
        if len(named[name]) > 1 and named[name].stride(0) == 0:
            raise ValueError(f"{name}: expected distinct elements, got a tensor that repeats its memory")
    for (name, one), (other, two) in itertools.combinations(named.items(), 2):
        if other.startswith("running") and _collide(two.data_ptr() - one.data_ptr(), _lie(one), _lie(two)):
            raise ValueError(f"{other}: expected memory apart from {name}'s, got a tensor that overlaps it")


def _span(vector: Tensor, C: int) -> tuple[int, int, int]:
    """Return where a vector's memory begins and ends, and its stride."""
    begin, stride, size = vector.data_ptr(), vector.stride(0), vector.itemsize
    return begin, begin + (stride * (C - 1) + 1) * size, stride


def _lie(vector: Tensor) -> tuple[int, int, int]:
    """Return a vector's length, and its stride and element in bytes."""
    size = vector.itemsize
    return len(vector), vector.stride(0) * size, size


@lru_cache(maxsize=4096)
def _collide(distance: int, one: tuple[int, int, int], two: tuple[int, int, int]) -> bool:
    """Return whether elements of two vectors overlap, whose memory begins so many bytes apart."""
    places = [
        {byte for k in range(length) for byte in range(begin + k * stride, begin + k * stride + size)}
        for begin, (length, stride, size) in ((0, one), (distance, two))
    ]
    return not places[0].isdisjoint(places[1])
