"""The engine as torch's own operators, ``torch.ops.sbncore.forward`` and ``.backward``: private, functional.

What tensors cannot carry goes by value: a sampler by its name (its repr), a draw by (seed, layer) and by the
step, which forward leaves in ``state``. So an operator is all that torch.compile sees, and backward draws
anew what forward drew.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

import sbncore as sbn
from sbncore import functional
from sbncore.adapters.torch.exchange import engine_stream, layout_of, memory_of
from sbncore.arrays import borrow
from sbncore.checks import Running
from sbncore.saved import ROWS, Kept, Saved

_library = torch.library.Library("sbncore", "DEF")
_samplers: dict[str, sbn.Sampler] = {}
Draw = tuple[str, int, int]  # the sampler's name, seed, layer


def name_of(sampler: sbn.Sampler) -> str:
    """Return the name by which the operators know a sampler in this process."""
    name = repr(sampler)
    _samplers[name] = sampler
    return name


def word(number: int) -> int:
    """Return an integer modulo 2**64 as the signed one of an operator's schema."""
    return (number + 2**63) % 2**64 - 2**63


def plan_of(x: Tensor, draw: Draw, step: Any) -> sbn.Plan:
    """Return the plan of a call; a step in a GPU's memory stays there, where the sampler allows it."""
    if x.is_cuda:
        sampler, seed, layer = draw
        plan = _samplers[sampler].plan(x.shape, seed=seed, layer=layer, step=step)
        if plan.apart:
            return plan
    return _drawn(tuple(x.shape), *draw, int(step))


@lru_cache(maxsize=512)  # backward finds what forward drew
def _drawn(shape: tuple[int, ...], sampler: str, seed: int, layer: int, step: int) -> sbn.Plan:
    return _samplers[sampler].plan(shape, seed=seed, layer=layer, step=step)


def saved_in(
    state: Tensor, mask: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None,
    draw: Draw, relu: bool, gradient: str,
) -> Saved:  # fmt: skip
    """Return what the operator forward left, as `sbncore.backward` takes it.

    It always has a residual: its gradient is g, whatever there was.
    """
    kept = _kept(state, mask, x.shape[1])
    plan = plan_of(x, draw, kept.step if x.is_cuda else kept.step[0])
    activation = "relu" if relu else None
    return functional.saved_in(kept, x, plan, weight, bias, True, activation, gradient)


def _kept(state: Tensor, mask: Tensor, C: int) -> Kept:
    values, masked = memory_of(state), None if mask.numel() == 0 else memory_of(mask)
    return Kept(values[:-1].reshape(ROWS, C), masked, values[-1:].view("int64"))


_library.define(
    "forward(Tensor x, Tensor? weight, Tensor? bias, Tensor? residual, Tensor? running_mean,"
    " Tensor? running_var, Tensor step, str sampler, int seed, int layer, float momentum, float eps,"
    " bool relu, bool skip_nonfinite)"
    " -> (Tensor y, Tensor state, Tensor mask, Tensor mean, Tensor var)"
)


def _outputs(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None,
    running_mean: Tensor | None, running_var: Tensor | None, step: Tensor, sampler: str, seed: int,
    layer: int, momentum: float, eps: float, relu: bool, skip_nonfinite: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    state = x.new_empty(ROWS * x.shape[1] + 1, dtype=torch.float64)
    mask = x.new_empty(_mask_size(x) if relu and residual is not None else 0, dtype=torch.uint8)
    mean = x.new_empty(0) if running_mean is None else running_mean.clone()
    var = x.new_empty(0) if running_var is None else running_var.clone()
    return torch.empty_like(x), state, mask, mean, var


def _forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None,
    running_mean: Tensor | None, running_var: Tensor | None, step: Tensor, sampler: str, seed: int,
    layer: int, momentum: float, eps: float, relu: bool, skip_nonfinite: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    y, state, mask, mean, var = results = _outputs(
        x, weight, bias, residual, running_mean, running_var, step, sampler, seed, layer, momentum, eps,
        relu, skip_nonfinite,
    )  # fmt: skip
    with engine_stream(x):
        plan = plan_of(x, (sampler, seed, layer), step)
        kept = _kept(state, mask, x.shape[1])
        if plan.step is None:
            kept.step[0] = int(step)
        running = prior = None
        if running_mean is not None:
            running = Running(borrow(mean, "running_mean"), borrow(var, "running_var"), momentum, skip_nonfinite)
            if plan.prior > 0:
                prior = sbn.Statistics(running_mean, running_var)
        try:
            functional.forward_in_place(
                x, weight, bias, plan, prior, eps, 1, "relu" if relu else None, residual, "exact", y, running,
                kept,
            )  # fmt: skip
        except TypeError as complaint:  # torch's class for a dtype or a device that does not fit
            raise RuntimeError(str(complaint)) from None
    return results


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
    wanted = [name for name, needed in zip(GRADIENTS, needs, strict=True) if needed]
    with engine_stream(x):
        draw = sampler, seed, layer
        saved = saved_in(state, mask, x, weight, bias, draw, relu, gradient)
        dx = torch.empty_like(x) if needs[0] else None
        grads = sbn.backward(dy, saved, needs=wanted, out=dx)
    dresidual = grads.residual
    if dresidual is dy:  # an operator's result is memory of its own
        dresidual = dy.clone()
    results = (dx, grads.weight, grads.bias, dresidual)
    return tuple(x.new_empty(0) if one is None else one for one in results)  # type: ignore[return-value]


def _gradients(
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


for name, real, fake in (("forward", _forward, _outputs), ("backward", _backward, _gradients)):
    for key in ("CPU", "CUDA"):
        _library.impl(name, real, key)
    torch.library.register_fake(f"sbncore::{name}", fake, lib=_library)

forward = torch.ops.sbncore.forward.default
backward = torch.ops.sbncore.backward.default
