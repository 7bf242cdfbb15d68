"""Batch normalization over ranks: moments merge in one small all-gather, backward's sums in one all-reduce.

Each rank draws from its own batch, of any size, none too; it draws as layer ``layer + rank * 2**32``, so that
ranks' samples are independent. By the merge a rank's p_i are scaled by its share of all ranks' counts.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

import sbncore as sbn
from sbncore import functional
from sbncore.adapters.torch import ops
from sbncore.adapters.torch.exchange import empty_like, engine_stream
from sbncore.adapters.torch.function import Options
from sbncore.plans import Plan

RANK = 2**32  # how far apart the ranks' layer numbers are


def group_of(process_group: Any) -> Any:
    """Return the ranks that share statistics, or None: "world" is all there are, if there are any."""
    if process_group is None or not dist.is_available() or not dist.is_initialized():
        return None
    group = dist.group.WORLD if process_group == "world" else process_group
    return group if dist.get_world_size(group) > 1 else None


def process_group(value: Any) -> Any:
    """Return the option of that name, which is checked when it is set."""
    known = value is None or (dist.is_available() and isinstance(value, dist.ProcessGroup))
    if not (known or (isinstance(value, str) and value == "world")):
        raise TypeError(f"process_group: expected None, 'world' or a ProcessGroup, got {value!r}")
    return value


class BatchNormOverRanks(torch.autograd.Function):
    """`sbncore.adapters.torch.function.BatchNorm` over a process group."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None,
        running_mean: Tensor | None, running_var: Tensor | None, step: Tensor, options: Options, group: Any,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        x, weight, bias, residual, running_mean, running_var = (
            None if one is None else ops.plain(one)
            for one in (x, weight, bias, residual, running_mean, running_var)
        )
        draw = (options.sampler, options.seed, ops.word(options.layer + RANK * dist.get_rank(group)))
        y, state, mask, _, _ = ops.outputs(x, residual, options.relu, (None, None))
        activation = "relu" if options.relu else None
        with engine_stream(x), ops.torchs_errors:
            plan = ops.plan_of(x, draw, step, fewest=1)
            kept = ops.kept_in(state, mask, x.shape[1])
            if plan.step is None:
                kept.step[0] = int(step)
            prior = None
            if plan.prior > 0 and running_mean is not None:
                prior = sbn.Statistics(running_mean, running_var)
            local = functional.moments(x, plan, prior=prior, dtype="float64")
            mean, var, count, share = _merged(local, x, group)
            given = Plan(plan.shape, (), 1.0)
            functional.forward_in_place(
                x, weight, bias, given, sbn.Statistics(mean, var), options.eps, 1, activation, residual,
                "exact", y, kept=kept,
            )  # fmt: skip
        ctx.save_for_backward(x, weight, bias, state, mask, share)
        ctx.draw, ctx.options, ctx.group = draw, options, group
        unbiased = var * torch.where(count > 1, 1 / (1 - 1 / count), 1.0)
        keep = count == 0  # an empty batch moves nothing
        if options.skip_nonfinite:
            keep = keep | ~(mean.isfinite() & var.isfinite())
        moved = tuple(
            x.new_empty(0) if old is None else _moved(old, new, keep, options.momentum)
            for old, new in ((running_mean, mean), (running_var, unbiased))
        )
        ctx.mark_non_differentiable(*moved)
        ctx.set_materialize_grads(False)
        return y, *moved

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        nothing = (None,) * 9
        if dy is None:
            return nothing
        if torch.is_grad_enabled():
            raise RuntimeError("batch normalization over ranks cannot be differentiated twice")
        x, weight, bias, state, mask, share = ctx.saved_tensors
        dy = dy.resolve_neg()
        options, needs = ctx.options, ctx.needs_input_grad[:4]
        kind = torch.float64 if x.dtype == torch.float64 else torch.float32
        ones = x.new_ones(x.shape[1], dtype=kind)  # where there is no parameter, its sum is wanted still
        weight, bias = (ones if each is None else each for each in (weight, bias))
        with engine_stream(x):
            saved = ops.saved_in(state, mask, x, weight, bias, ctx.draw, options.relu, "exact", fewest=1)
            through = needs[0] and options.gradient != "detached"
            dx = empty_like(x) if needs[0] else None
            first = {"x": dx is not None and not (through and saved.plan.full), "residual": needs[3]}
            from_sample = options.gradient == "sampled" and not saved.plan.full
            first |= dict.fromkeys(("weight", "bias"), not from_sample)
            grads = sbn.backward(
                dy, saved, needs=[name for name, wanted in first.items() if wanted], gradient="detached",
                out=dx if first["x"] else None,
            )  # fmt: skip
            sums = grads
            if from_sample:
                sums = sbn.backward(dy, saved, needs=("weight", "bias"), gradient="sampled")
            if through:
                total = torch.cat([sums.weight, sums.bias]).to(torch.float64)
                dist.all_reduce(total, group=ctx.group)
                dweight, dbias = (total * share).to(kind).chunk(2)
                sbn.repair(dx, dy, saved, dweight, dbias)
        gradients = (dx, sums.weight, sums.bias, grads.residual)
        return *(g if needed else None for g, needed in zip(gradients, needs, strict=True)), *nothing[4:]


over_ranks = torch.compiler.disable(BatchNormOverRanks.apply)  # Dynamo cannot trace a group's collectives


def _merged(local: sbn.Statistics, x: Tensor, group: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return mean, var and count of all ranks' values, and this rank's share of them."""
    count = torch.tensor([local.count], dtype=torch.float64, device=x.device)
    mine = torch.cat([local.mean, local.var, count])
    everyones = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(everyones, mine, group=group)
    table = torch.stack(everyones)
    given = table[:, -1:].isinf()  # all of them: the prior alone
    counts = torch.where(given, 1.0, table[:, -1:])
    shares = counts / counts.sum().clamp(min=torch.finfo(torch.float64).tiny)
    mean, var = table[:, :-1].chunk(2, dim=1)
    merged = (shares * mean).sum(0)
    spread = (shares * (var + (mean - merged) ** 2)).sum(0)
    inverse = torch.where(counts > 0, shares**2 / counts, 0.0).sum()
    total = torch.where(given.any(), torch.inf, torch.where(inverse > 0, 1 / inverse, 0.0))
    if total.device.type == "cpu" and total == 1:
        raise ValueError("expected more than 1 value per channel when training, got one over all ranks")
    return merged, spread, total, shares[dist.get_rank(group), 0]


def _moved(old: Tensor, new: Tensor, keep: Tensor, momentum: float) -> Tensor:
    wide = old.to(torch.float64)
    return torch.where(keep, wide, wide + momentum * (new - wide)).to(old.dtype)
