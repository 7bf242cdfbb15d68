"""Calls of the engine from inside XLA: a function of NumPy's arrays as a function of JAX's."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental.buffer_callback import buffer_callback

import sbncore as sbn
from sbncore.call import mask_size
from sbncore.layout import layout_of
from sbncore.residuals import state_bytes

RANK = 2**32  # how far apart the devices' layer numbers are, as PyTorch's ranks' are


class Options(NamedTuple):
    """What a training call takes beside arrays."""

    sampler: sbn.Sampler
    seed: int
    layer: int
    momentum: float | None
    eps: float
    channel_axis: int
    activation: str | None
    gradient: str
    skip_nonfinite: bool


def plan_of(options: Options, shape: tuple[int, ...], step: int, device: int | None = None) -> sbn.Plan:
    """Return what a call draws, on one of several devices too little for statistics of its own, perhaps."""
    sampler, seed, layer, *_ = options
    layer, fewest = (layer, 2) if device is None else (layer + RANK * device, 1)
    axis = options.channel_axis
    return sampler.plan(shape, seed=seed, layer=layer, step=step, channel_axis=axis, fewest=fewest)


def like(array: Any) -> Any:
    """Return an array's shape and dtype as a result's, None of None."""
    return None if array is None else jax.ShapeDtypeStruct(array.shape, array.dtype)


@lru_cache(maxsize=1024)
def callback(run: Callable[..., None], options: Options, results: Any) -> Callable[..., Any]:
    """Return a function of JAX's arrays; the same one for the same arguments, or XLA would compile anew."""

    def called(_: Any, out: Any, *given: Any) -> None:
        run(options, *(jax.tree.map(_memory, arrays) for arrays in (out, given)))

    once = jax.custom_vjp(buffer_callback(called, results, vmap_method="sequential"))
    once.defvjp(_twice, _twice)
    return once


def _twice(*_: Any) -> Any:
    raise NotImplementedError("sbncore's batch_norm cannot be differentiated twice in JAX")


def _memory(buffer: Any) -> Any:
    """Return a buffer of XLA's as NumPy's array, no copy."""
    try:
        return np.asarray(buffer)
    except Exception as complaint:
        raise NotImplementedError(
            "sbncore.adapters.jax runs on JAX's CPU backend; sbncore's functions take arrays on a GPU"
        ) from complaint


def kept_of(options: Options, x: Any, residual: Any) -> tuple[Any, Any]:
    """Return the shapes of what a forward keeps: the state and the mask."""
    mask = 0
    if options.activation == "relu" and residual is not None and x.size:
        layout = layout_of(np.empty(x.shape, np.uint8), options.channel_axis)
        mask = mask_size(layout, False, x.dtype.itemsize)
    sizes = state_bytes(x.shape[options.channel_axis]), mask
    return tuple(jax.ShapeDtypeStruct((size,), np.uint8) for size in sizes)  # type: ignore[return-value]
