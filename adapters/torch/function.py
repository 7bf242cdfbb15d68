"""Sampled batch normalization for torch's autograd: once by the engine, further by torch itself."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from sbncore.adapters.torch import ops
from sbncore.adapters.torch.engine import Sample, plan_of, step_in


class Options(NamedTuple):
    """What a call takes beside tensors."""

    sampler: str  # by `names.name_of`
    seed: int
    layer: int
    momentum: float
    eps: float
    relu: bool
    skip_nonfinite: bool
    gradient: str


class BatchNorm(torch.autograd.Function):
    """y and the moved running statistics, or None for those where they were moved ``in_place``."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        step: Tensor,
        options: Options,
        in_place: bool = False,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        tensors = (x, weight, bias, residual, running_mean, running_var, step)
        y, state, mask, mean, var = ops.forward(tensors, options[:-1], in_place)
        ctx.save_for_backward(x, weight, bias, state, mask)
        moved = None if mean is running_mean else (mean, var)
        if moved is not None:
            ctx.mark_non_differentiable(*moved)
        ctx.set_materialize_grads(False)
        ctx.options = options
        return y, *(moved or (None, None))

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        nothing = (None,) * 9
        if dy is None:
            return nothing
        x, weight, bias, state, mask = ctx.saved_tensors
        options, needs = ctx.options, list(ctx.needs_input_grad[:4])
        if torch.is_grad_enabled():  # somebody will differentiate the result
            return differentiable(dy, x, weight, bias, state, mask, options, needs) + nothing[4:]
        passes = needs[3] and not options.relu  # the residual's gradient is dy itself
        dx, dweight, dbias, dresidual = ops.backward(
            dy,
            x,
            weight,
            bias,
            state,
            mask,
            options.sampler,
            options.seed,
            options.layer,
            options.relu,
            options.gradient,
            [*needs[:3], needs[3] and not passes],
        )
        gradients = (dx, dweight, dbias, dy if passes else dresidual)
        return *(g if needed else None for g, needed in zip(gradients, needs, strict=True)), *nothing[4:]


def differentiable(
    dy: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, state: Tensor, mask: Tensor,
    options: Options, needs: list[bool],
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Return backward's gradients as a composition that torch can differentiate on: gradient penalties.

    The formulas of `sbncore.backward`, in which mean and var are functions of x. A prior's own moments
    follow from the saved ones.
    """
    sample = Sample(options.sampler, options.seed, options.layer)
    kind = torch.float64 if x.dtype == torch.float64 else torch.float32
    axes, along = [0, *range(2, x.ndim)], (1, -1, *[1] * (x.ndim - 2))
    with torch.no_grad():
        C, plan = x.shape[1], plan_of(x, sample, step_in(state))
        p = torch.from_numpy(plan.weights()).to(x.device, kind).unsqueeze(1)
        centre, var = (row.view(along) for row in state[: 2 * C].view(2, C).to(kind))
        needed = [False, False, False, True]
        gate = (
            ops.backward(
                torch.ones_like(x), x, None, None, state, mask, *sample[:3], options.relu, "detached", needed
            )[3].to(kind)
            if options.relu
            else None
        )
    total = lambda terms: terms.sum(axes, keepdim=True)  # noqa: E731
    offset = x.to(kind) - centre
    mean, square = total(p * offset), total(p * offset**2)
    if plan.prior > 0:
        mean0 = -mean.detach() / plan.prior
        var0 = (var - square.detach()) / plan.prior - mean0**2
        mean = mean + plan.prior * mean0
        prior = plan.prior * (var0 + (mean0 - mean) ** 2)
    else:
        prior = 0.0
    rstd = (total(p * (offset - mean) ** 2) + prior + options.eps).rsqrt()
    if options.gradient == "detached":
        mean, rstd = mean.detach(), rstd.detach()
    g = dy.to(kind) if gate is None else dy.to(kind) * gate
    xhat = (offset - mean) * rstd
    scale = rstd if weight is None else weight.to(kind).view(along) * rstd
    if options.gradient == "sampled":
        share = p * (x.numel() / C / (1 - plan.prior))
        dbias, dweight = total(share * g), total(share * g * xhat)
    else:
        dbias, dweight = total(g), total(g * xhat)
    dx = scale * (g if options.gradient == "detached" else g - p * (dbias + xhat * dweight))
    results = (dx, dweight.view(-1), dbias.view(-1), g)
    likes = (x, weight, bias, x)
    return tuple(
        one.to(like.dtype) if needed and like is not None else None
        for one, like, needed in zip(results, likes, needs, strict=True)
    )
