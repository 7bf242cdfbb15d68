"""The engine as torch's own operators, ``torch.ops.sbncore.forward`` and ``.backward``: private, functional.

What tensors cannot carry goes by value: a sampler by its name (its repr), a draw by (seed, layer) and by the
step, which forward leaves in ``state``. So an operator is all that torch.compile sees, and backward draws
anew what forward drew.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sbncore.adapters.torch import engine
from sbncore.adapters.torch.engine import Sample, plan_of
from sbncore.adapters.torch.tensors import format_of, layout_of
from sbncore.call import mask_size
from sbncore.signature import ROWS, Scalars
from sbncore.statistics import unbiased

PLAIN = (Tensor, torch.nn.Parameter)

_library = torch.library.Library("sbncore", "DEF")


def word(number: int) -> int:
    """Return an integer modulo 2**64 as the signed one of an operator's schema."""
    return (number + 2**63) % 2**64 - 2**63


_library.define(
    "forward(Tensor x, Tensor? weight, Tensor? bias, Tensor? residual, Tensor? running_mean,"
    " Tensor? running_var, Tensor step, str sampler, int seed, int layer, float momentum, float eps,"
    " bool relu, bool skip_nonfinite)"
    " -> (Tensor y, Tensor state, Tensor mask, Tensor mean, Tensor var)"
)


def outputs(
    x: Tensor, residual: Tensor | None, relu: bool, running: tuple[Tensor | None, Tensor | None]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return tensors of the shapes and strides of forward's results, for a compiler."""
    y = torch.empty_like(x, memory_format=format_of(x))
    state = x.new_empty(ROWS * x.shape[1] + 1, dtype=torch.float64)
    masked = relu and residual is not None
    nbytes = mask_size(layout_of(y), y.is_cuda, y.itemsize) if masked else 0
    mask = x.new_empty(nbytes, dtype=torch.uint8) if masked else x.new_empty(0)
    mean, var = (x.new_empty(0) if r is None else torch.empty_like(r) for r in running)
    return y, state, mask, mean, var


def _forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None,
    running_mean: Tensor | None, running_var: Tensor | None, step: Tensor, sampler: str, seed: int,
    layer: int, momentum: float, eps: float, relu: bool, skip_nonfinite: bool, *, in_place: bool = False,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    plan, mean, var = plan_of(x, Sample(sampler, seed, layer), step), running_mean, running_var
    if not in_place and mean is not None and var is not None:
        mean, var = mean.clone(), var.clone()
    prior = (running_mean, running_var) if plan.prior > 0 else (None, None)
    scalars = Scalars(eps, momentum, unbiased(plan.effective_count), skip_nonfinite)
    y, state, mask = engine.forward(x, (weight, bias, mean, var, *prior), residual, plan, scalars, relu)
    if in_place and mean is not None and var is not None:
        torch.autograd.graph.increment_version((mean, var))
    return y, state, mask, mean, var


def _fake_forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None,
    running_mean: Tensor | None, running_var: Tensor | None, step: Tensor, sampler: str, seed: int,
    layer: int, momentum: float, eps: float, relu: bool, skip_nonfinite: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return outputs(x, residual, relu, (running_mean, running_var))


_library.define(
    "backward(Tensor dy, Tensor x, Tensor? weight, Tensor? bias, Tensor state, Tensor? mask, str sampler,"
    " int seed, int layer, bool relu, str gradient, bool[] needs)"
    " -> (Tensor dx, Tensor dweight, Tensor dbias, Tensor dresidual)"
)


def _backward(
    dy: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, state: Tensor, mask: Tensor | None,
    sampler: str, seed: int, layer: int, relu: bool, gradient: str, needs: list[bool],
) -> tuple[Tensor | None, ...]:  # fmt: skip
    plan = plan_of(x, Sample(sampler, seed, layer), engine.step_in(state))
    dx, *sums, dresidual = engine.backward(dy, x, (state, mask), plan, gradient, relu, needs)
    for k, parameter in enumerate((weight, bias)):
        one = sums[k]
        if one is not None and parameter is not None and one.dtype is not parameter.dtype:
            sums[k] = one.to(parameter.dtype)
    return dx, *sums, dresidual


def _fake_backward(
    dy: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, state: Tensor, mask: Tensor | None,
    sampler: str, seed: int, layer: int, relu: bool, gradient: str, needs: list[bool],
) -> tuple[Tensor, ...]:  # fmt: skip
    likes = (x, weight, bias, x)
    return tuple(
        torch.empty_like(like) if needed and like is not None else x.new_empty(0)
        for like, needed in zip(likes, needs, strict=True)
    )


def _all_tensors(function: Callable[..., tuple[Tensor | None, ...]]) -> Callable[..., tuple[Tensor, ...]]:
    """Return an operator of a function: its schema knows no None among results."""

    def operator(first: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
        results = function(first, *arguments)
        return tuple(first.new_empty(0) if one is None else one for one in results)

    return operator


for name, real, fake in (("forward", _forward, _fake_forward), ("backward", _backward, _fake_backward)):
    for key in ("CPU", "CUDA"):
        _library.impl(name, _all_tensors(real), key)
    torch.library.register_fake(f"sbncore::{name}", fake, lib=_library)

FORWARD = torch.ops.sbncore.forward.default
BACKWARD = torch.ops.sbncore.backward.default


def forward(tensors: tuple[Any, ...], options: tuple[Any, ...], in_place: bool) -> tuple[Tensor, ...]:
    """Call the operator; by torch's dispatcher when a mode, compiler or profiler is active.

    ``in_place`` allows to move the running statistics themselves, which are then the results. What there is
    not is None, or by the dispatcher an empty tensor.
    """
    if unseen(tensors[0]):
        return _forward(*tensors, *options, in_place=in_place)  # type: ignore[return-value]
    return FORWARD(*tensors, *options)  # type: ignore[no-any-return]


def backward(dy: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    """As `forward`."""
    if unseen(dy):
        return _backward(dy, *arguments)  # type: ignore[return-value]
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
