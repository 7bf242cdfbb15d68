"""Batch normalization over ranks: moments merge in one small all-gather, backward's sums in one all-reduce.

Each rank draws from its own batch, of any size, none too; it draws as layer ``layer + rank * 2**32``, so that
ranks' samples are independent. By the merge a rank's p_i are scaled by its share of all ranks' counts.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from sbncore import Statistics
from sbncore.adapters.torch import engine, ops
from sbncore.adapters.torch.engine import Sample
from sbncore.adapters.torch.function import Options
from sbncore.plans import Plan, Recipe
from sbncore.signature import Scalars

RANK = 2**32  # how far apart the ranks' layer numbers are


def group_of(process_group: Any) -> Any:
    """Return the ranks that share statistics, or None: "world" is all there are, if there are any."""
    if process_group is None or not dist.is_available() or not dist.is_initialized():
        return None
    group = dist.group.WORLD if process_group == "world" else process_group
    return group if dist.get_world_size(group) > 1 else None


def process_group(value: Any) -> Any:
    """Return the option of that name, which is checked when it is set."""
    fits = value is None or (dist.is_available() and isinstance(value, dist.ProcessGroup))
    if not (fits or (isinstance(value, str) and value == "world")):
        raise TypeError(f"process_group: expected None, 'world' or a ProcessGroup, got {value!r}")
    return value


class BatchNormOverRanks(torch.autograd.Function):
    """`sbncore.adapters.torch.function.BatchNorm` over a process group."""

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
        group: Any,
    ) -> tuple[Tensor, Tensor, Tensor]:
        layer = ops.word(options.layer + RANK * dist.get_rank(group))
        sample = Sample(options.sampler, options.seed, layer, fewest=1)
        plan = engine.plan_of(x, sample, step)
        prior = (running_mean, running_var) if plan.prior > 0 else (None, None)
        vectors = weight, bias, running_mean, running_var, *prior
        engine.prepared(x, vectors, residual, plan.recipe, options.eps, options.relu)
        _, local, _ = engine.forward(
            x, (None, None, None, None, *prior), None, plan, Scalars(1.0), False, writes=False
        )
        table = _gathered(local, _count(plan, x), x.shape[1], group)
        mean, var, count, shares = merged(table)
        if count.device.type == "cpu" and count == 1:
            raise ValueError("expected more than 1 value per channel when training, got one over all ranks")
        share = shares[dist.get_rank(group)]
        evaluation = Plan(Recipe(plan.shape, (), 1.0), plan.draw)
        y, state, mask = engine.forward(
            x, (weight, bias, None, None, mean, var), residual, evaluation, Scalars(options.eps), options.relu
        )
        assert y is not None
        ctx.save_for_backward(x, weight, bias, state, mask, share)
        ctx.sample, ctx.options, ctx.group = sample, options, group
        unbiased = var * torch.where(count > 1, 1 / (1 - 1 / count), 1.0)
        keep = count == 0  # an empty batch moves nothing
        if options.skip_nonfinite:
            keep = keep | ~(mean.isfinite() & var.isfinite())
        new_mean, new_var = (
            x.new_empty(0) if old is None else moved(old, new, keep, options.momentum)
            for old, new in ((running_mean, mean), (running_var, unbiased))
        )
        ctx.mark_non_differentiable(new_mean, new_var)
        ctx.set_materialize_grads(False)
        return y, new_mean, new_var

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        nothing = (None,) * 9
        if dy is None:
            return nothing
        if torch.is_grad_enabled():
            raise RuntimeError("batch normalization over ranks cannot be differentiated twice")
        x, weight, bias, values, mask, share = ctx.saved_tensors
        options, needs = ctx.options, ctx.needs_input_grad[:4]
        state, relu = (values, mask), options.relu
        plan = engine.plan_of(x, ctx.sample, engine.step_in(values))
        through = needs[0] and options.gradient != "detached"
        from_sample = options.gradient == "sampled" and not plan.full
        sums_wanted = through or needs[1] or needs[2]
        # where everything is drawn, the repair writes all of dx
        wanted = [needs[0], *[sums_wanted and not from_sample] * 2, needs[3]]
        dx, dweight, dbias, dresidual = engine.backward(dy, x, state, plan, "detached", relu, wanted)
        if from_sample:
            dweight, dbias = engine.backward(dy, x, state, plan, "sampled", relu, [False, True, True, False])[
                1:3
            ]
        if through:
            assert dx is not None and dweight is not None and dbias is not None  # all of them were wanted
            total = torch.cat([dweight, dbias]).to(torch.float64)
            dist.all_reduce(total, group=ctx.group)
            engine.repair(dx, dy, x, state, plan, relu, (total * share).chunk(2))
        likes = (x, weight, bias, x)
        gradients = [
            one.to(like.dtype) if needed and one is not None and like is not None else None
            for one, like, needed in zip((dx, dweight, dbias, dresidual), likes, needs, strict=True)
        ]
        return *gradients, *nothing[4:]


over_ranks = torch.compiler.disable(BatchNormOverRanks.apply)  # Dynamo cannot trace a group's collectives


def _count(plan: Plan, x: Tensor) -> float:
    """Return the count of a rank's statistics, as `sbncore.plans.Plan.count_with` running ones."""
    return plan.count_with(Statistics(None, None) if plan.prior > 0 else None, x.numel())


def _gathered(state: Tensor, count: float, channels: int, group: Any) -> Tensor:
    """Return mean, var and count of each rank's values, a row each."""
    mine = torch.cat([state[: 2 * channels], state.new_tensor([count])])
    everyones = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(everyones, mine, group=group)
    return torch.stack(everyones)


def merged(table: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return mean, var and count of all ranks' values, and each rank's share of them.

    It is `sbncore.merge` of a table's rows, on the device and read by no host.
    """
    infinite = table[:, -1:].isinf()  # all of them: the prior alone
    counts = torch.where(infinite, 1.0, table[:, -1:])
    shares = counts / counts.sum().clamp(min=torch.finfo(torch.float64).tiny)
    mean, var = table[:, :-1].chunk(2, dim=1)
    mixed = (shares * mean).sum(0)
    spread = (shares * (var + (mean - mixed) ** 2)).sum(0)
    inverse = torch.where(counts > 0, shares**2 / counts, 0.0).sum()
    total = torch.where(infinite.any(), torch.inf, torch.where(inverse > 0, 1 / inverse, 0.0))
    return mixed, spread, total, shares[:, 0]


def moved(old: Tensor, new: Tensor, keep: Tensor, momentum: float) -> Tensor:
    """Return running statistics that approach new ones, as the engines move theirs, but those to keep."""
    wide = old.to(torch.float64)
    return torch.where(keep, wide, wide + momentum * (new - wide)).to(old.dtype)
