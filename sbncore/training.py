"""batch_norm: the call of a training loop, with running statistics, in torch's argument order."""

from __future__ import annotations

from typing import Any

from sbncore import checks
from sbncore.arguments import Arguments, Options
from sbncore.arrays import Array, borrow
from sbncore.drawing import Sampler
from sbncore.functional import Saved, evaluation, run_forward
from sbncore.layout import layout_of
from sbncore.run import Moving
from sbncore.samplers import Full
from sbncore.statistics import Statistics


def batch_norm(
    x: Array,
    running_mean: Array | None,
    running_var: Array | None,
    weight: Array | None = None,
    bias: Array | None = None,
    training: bool = False,
    momentum: float | None = 0.1,
    eps: float = 1e-5,
    *,
    sampler: Sampler = Full(),  # noqa: B008 - a frozen value
    seed: int = 0,
    layer: int = 0,
    step: Any = 0,
    channel_axis: int = 1,
    activation: str | None = None,
    residual: Array | None = None,
    gradient: str = "exact",
    out: Array | None = None,
    skip_nonfinite: bool = False,
) -> tuple[Any, Saved]:
    """Normalize in training or evaluation and keep the running statistics, as torch's batch_norm does.

    Training: `forward` under ``sampler.plan(x.shape, seed, layer, step)``, then
    ``running += momentum * (statistic - running)`` in place, the variance unbiased
    (``var * count / (count - 1)``). Evaluation: ``y = act(weight * (x - running_mean) /
    sqrt(running_var + eps) + bias + residual)``. An empty batch moves nothing.

    Args:
        x, weight, bias, eps, channel_axis, activation, residual, gradient, out: as `forward`.
        running_mean, running_var: (C,), parameters' dtype, when training writeable and of memory that no
            other argument shares; or both None (then training must be true). They are the prior of a sampler
            that has one.
        training: whether to estimate statistics or use the running ones.
        momentum: weight of the new statistics in [0, 1]; None averages all steps alike (``1/(step+1)``).
        sampler, seed, layer, step: what to draw; ``step`` counts the training calls from 0, and may be an
            array (`Sampler.plan`) where momentum is a number.
        skip_nonfinite: leave a channel's running statistics as they were where its mean or variance is not
            finite.

    Returns:
        y and what `backward` needs, in both modes.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came, before any write.
    """
    checks.OPTIONS["sampler"](sampler)
    moving = Moving(
        checks.momentum_of(momentum, step) if training else 0.0,
        checks.OPTIONS["skip_nonfinite"](skip_nonfinite),
    )
    if (running_mean is None) != (running_var is None):
        raise ValueError("running_mean, running_var: expected both or neither, got one of them")
    if running_mean is None and not training:
        raise ValueError("running_mean, running_var: expected arrays when training is false, got None")
    view = borrow(x, "x")
    checks.rank(view, channel_axis)
    layout = layout_of(view, channel_axis)
    arguments = Arguments(x, weight, bias, residual, out)
    if training:
        arguments = arguments._replace(running_mean=running_mean, running_var=running_var)
        plan = sampler.plan(view.shape, seed=seed, layer=layer, step=step, channel_axis=channel_axis)
        if plan.prior > 0 and running_mean is None:
            raise ValueError("running_mean, running_var: expected arrays for the sampler's prior, got None")
    else:
        plan = evaluation(layout)
    prior = None
    if plan.prior > 0:
        prior = Statistics(running_mean, running_var)
        for value, name in ((running_mean, "running_mean"), (running_var, "running_var")):
            checks.channels(borrow(value, name), name, layout.C, view)
    return run_forward(arguments, plan, prior, Options(eps, channel_axis, activation, gradient), moving)
