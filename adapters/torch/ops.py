"""The engine as torch's own operators, ``torch.ops.sbncore.forward`` and ``.backward``: private, functional.

What tensors cannot carry goes by value: a sampler by its name (its repr), a draw by (seed, layer) and by the
step, which forward leaves in ``state``. So an operator is all that torch.compile sees, and backward draws
anew what forward drew.
"""

from __future__ import annotations

import math
from functools import cache, lru_cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

import sbncore as sbn
from sbncore import functional
from sbncore.adapters.torch.exchange import empty_like, engine_stream, format_of, layout_of, memory_of
from sbncore.adapters.torch.names import named
from sbncore.arrays import borrow
from sbncore.checks import Running
from sbncore.saved import ROWS, Kept, Saved

PLAIN = (Tensor, torch.nn.Parameter)

_library = torch.library.Library("sbncore", "DEF")
Draw = tuple[str, int, int]  # the sampler's name, seed, layer


def word(number: int) -> int:
    """Return an integer modulo 2**64 as the signed one of an operator's schema."""
    return (number + 2**63) % 2**64 - 2**63


class _TorchsErrors:
    """A dtype or a device that does not fit is torch's RuntimeError."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, complaint: Any, trace: Any) -> None:
        if kind is TypeError:
            raise RuntimeError(str(complaint)) from None


torchs_errors = _TorchsErrors()


def plan_of(x: Tensor, draw: Draw, step: Any, fewest: int = 2) -> sbn.Plan:
    """Return the plan of a call; a step in a GPU's memory stays there, where the sampler allows it."""
    if x.is_cuda:
        sampler, seed, layer = draw
        plan = named(sampler).plan(x.shape, seed=seed, layer=layer, step=step, fewest=fewest)
        if plan.apart:
            return plan
    return _drawn(tuple(x.shape), *draw, int(step.item()), fewest)  # an array of one, or its element


@lru_cache(maxsize=512)  # backward finds what forward drew
def _drawn(
    shape: tuple[int, ...], sampler: str, seed: int, layer: int, step: int, fewest: int
) -> sbn.Plan:
    return named(sampler).plan(shape, seed=seed, layer=layer, step=step, fewest=fewest)


def saved_in(
    state: Tensor, mask: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None,
    draw: Draw, relu: bool, gradient: str, fewest: int = 2,
) -> Saved:  # fmt: skip
    """Return what the operator forward left, as `sbncore.backward` takes it.

    It always has a residual: its gradient is g, whatever there was.
    """
    x, kept = plain(x), kept_in(state, mask, x.shape[1])
    plan = plan_of(x, draw, kept.step if x.is_cuda else kept.step[0], fewest)
    activation = "relu" if relu else None
    return functional.saved_in(kept, x, plan, weight, bias, True, activation, gradient)


def plain(x: Tensor) -> Tensor:
    """Return a tensor whose memory is its values, a copy if need be.

    It is no negative view, whose bit the dispatcher would have seen, and on a GPU it begins at an address of
    16 bytes, which a mask's size supposes.
    """
    x = x.resolve_neg()
    return x.clone() if x.is_cuda and x.data_ptr() % 16 else x


def kept_in(state: Tensor, mask: Tensor, C: int) -> Kept:
    """Return the engine's views of the tensors that backward needs."""
    values, masked = memory_of(state), None if mask.numel() == 0 else memory_of(mask)
    return Kept(values[:-1].reshape(ROWS, C), masked, values[-1:].view("int64"))


_library.define(
    "forward(Tensor x, Tensor? weight, Tensor? bias, Tensor? residual, Tensor? running_mean,"
    " Tensor? running_var, Tensor step, str sampler, int seed, int layer, float momentum, float eps,"
    " bool relu, bool skip_nonfinite)"
    " -> (Tensor y, Tensor state, Tensor mask, Tensor mean, Tensor var)"
)


def outputs(
    x: Tensor, residual: Tensor | None, relu: bool, running: tuple[Tensor | None, Tensor | None]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return forward's results, to be written; the moved running statistics are still as they were."""
    state = x.new_empty(ROWS * x.shape[1] + 1, dtype=torch.float64)
    mask = x.new_zeros(_mask_size(x) if relu and residual is not None else 0, dtype=torch.uint8)
    mean, var = (x.new_empty(0) if r is None else r.clone() for r in running)
    return torch.empty_like(x, memory_format=format_of(x)), state, mask, mean, var


@cache
def _quick(kind: str) -> ModuleType:
    """Return the module of a kind of device's calls from addresses."""
    if kind == "cuda":
        from sbncore.adapters.torch import gpu as quick
    else:
        from sbncore.adapters.torch import quick  # type: ignore[no-redef]
    return quick


def _forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None,
    running_mean: Tensor | None, running_var: Tensor | None, step: Tensor, sampler: str, seed: int,
    layer: int, momentum: float, eps: float, relu: bool, skip_nonfinite: bool, *, in_place: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    quick = _quick(x.device.type)
    shape = quick.shape_of(x)
    call = quick.call_for(shape, sampler, relu and residual is not None)
    fits = all(quick.fits(one, shape) for one in (x, residual) if one is not None) and 0 < eps < math.inf
    vectors = call and fits and call.vectors(weight, bias, running_mean, running_var)
    if vectors and (call.plan.prior == 0 or running_mean is not None):
        draw = seed, layer, step if x.is_cuda else int(step)  # a GPU's is read there
        return call.forward(
            x, vectors, residual, running_mean, running_var, draw, momentum, eps, relu, skip_nonfinite,
            in_place,
        )  # fmt: skip
    x, weight, bias, residual, running_mean, running_var = (
        None if one is None else plain(one) for one in (x, weight, bias, residual, running_mean, running_var)
    )
    y, state, mask, mean, var = results = outputs(x, residual, relu, (running_mean, running_var))
    with engine_stream(x), torchs_errors:
        plan = plan_of(x, (sampler, seed, layer), step)
        kept = kept_in(state, mask, x.shape[1])
        if plan.step is None:
            kept.step[0] = int(step)
        running = prior = None
        if running_mean is not None:
            moved = borrow(mean, "running_mean"), borrow(var, "running_var")
            running = Running(*moved, momentum, skip_nonfinite)
            if plan.prior > 0:
                prior = sbn.Statistics(running_mean, running_var)
        functional.forward_in_place(
            x, weight, bias, plan, prior, eps, 1, "relu" if relu else None, residual, "exact", y, running,
            kept,
        )  # fmt: skip
    return results


def _fake_forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None,
    running_mean: Tensor | None, running_var: Tensor | None, step: Tensor, sampler: str, seed: int,
    layer: int, momentum: float, eps: float, relu: bool, skip_nonfinite: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return outputs(x, residual, relu, (running_mean, running_var))


_library.define(
    "backward(Tensor dy, Tensor x, Tensor? weight, Tensor? bias, Tensor state, Tensor mask, str sampler,"
    " int seed, int layer, bool relu, str gradient, bool[] needs)"
    " -> (Tensor dx, Tensor dweight, Tensor dbias, Tensor dresidual)"
)
GRADIENTS = ("x", "weight", "bias", "residual")


def _backward(
    dy: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, state: Tensor, mask: Tensor,
    sampler: str, seed: int, layer: int, relu: bool, gradient: str, needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    quick = _quick(x.device.type)
    shape = quick.shape_of(x)
    call = quick.call_for(shape, sampler, mask.numel() > 0)
    suits = call and all(p is None or p.dtype is call.parameter for p in (weight, bias))
    if suits and quick.fits(x, shape) and quick.fits(dy, shape):
        return call.backward(dy, x, weight, bias, state, mask, seed, layer, relu, gradient, needs)
    dy, weight, bias = (None if one is None else one.resolve_neg() for one in (dy, weight, bias))
    wanted = [name for name, needed in zip(GRADIENTS, needs, strict=True) if needed]
    with engine_stream(x):
        draw = sampler, seed, layer
        saved = saved_in(state, mask, x, weight, bias, draw, relu, gradient)
        dx = empty_like(x) if needs[0] else None
        grads = sbn.backward(dy, saved, needs=wanted, out=dx)
    dresidual = grads.residual
    if dresidual is dy:  # an operator's result is memory of its own
        dresidual = dy.clone()
    vectors = (None if one is None else one.clone() for one in (grads.weight, grads.bias))  # torch's memory
    results = (dx, *vectors, dresidual)
    return tuple(x.new_empty(0) if one is None else one for one in results)  # type: ignore[return-value]


def _fake_backward(
    dy: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, state: Tensor, mask: Tensor,
    sampler: str, seed: int, layer: int, relu: bool, gradient: str, needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    likes = (x, weight, bias, x)
    return tuple(  # type: ignore[return-value]
        torch.empty_like(like) if needed and like is not None else x.new_empty(0)
        for like, needed in zip(likes, needs, strict=True)
    )


def _mask_size(x: Tensor) -> int:
    if x.is_cuda:
        from sbncore.cuda import phases

        return phases.mask_size(layout_of(x), x.itemsize)
    from sbncore.cpu import engine

    return engine.mask_size(layout_of(x))


for name, real, fake in (("forward", _forward, _fake_forward), ("backward", _backward, _fake_backward)):
    for key in ("CPU", "CUDA"):
        _library.impl(name, real, key)
    torch.library.register_fake(f"sbncore::{name}", fake, lib=_library)

FORWARD = torch.ops.sbncore.forward.default
BACKWARD = torch.ops.sbncore.backward.default


def forward(
    tensors: tuple[Any, ...], options: tuple[Any, ...], in_place: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Call the operator; by torch's dispatcher when a mode, compiler or profiler is active.

    ``in_place`` allows to move the running statistics themselves, which are then the results.
    """
    if unseen(tensors[0]):
        return _forward(*tensors, *options, in_place=in_place)
    return FORWARD(*tensors, *options)  # type: ignore[no-any-return]


def backward(dy: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `forward`."""
    if unseen(dy):
        return _backward(dy, *arguments)
    return BACKWARD(dy, *arguments)  # type: ignore[no-any-return]


def unseen(tensor: Tensor) -> bool:
    """Whether nobody would notice a call that goes past torch's dispatcher: no compiler, mode or profiler."""
    return (
        not torch.compiler.is_compiling()
        and type(tensor) in PLAIN
        and (tensor.is_cpu or tensor.is_cuda)
        and torch._C._len_torch_dispatch_stack() == 0
        and not torch.autograd._profiler_enabled()
    )
