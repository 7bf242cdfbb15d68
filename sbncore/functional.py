"""forward, backward and their phases over any array: borrow, find the Call, run it, hand back.

Nothing is written, and no running statistic moves, before every argument has been checked.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from sbncore import checks, run
from sbncore.arguments import (
    Arguments,
    Options,
    borrowed,
    check_memory,
    prepared,
)
from sbncore.arrays import (
    PARAMETER,
    Array,
    borrow,
    element_type,
    give,
    giver,
    on_device,
)
from sbncore.layout import Layout, layout_of
from sbncore.plans import Plan, Recipe
from sbncore.samplers import Full
from sbncore.saved import Saved, probe
from sbncore.statistics import Moments, Statistics, public


class Grads(NamedTuple):
    """The gradients of forward's arguments, None where not needed or not given."""

    x: Any
    weight: Any
    bias: Any
    residual: Any


def forward(
    x: Array,
    weight: Array | None = None,
    bias: Array | None = None,
    *,
    plan: Plan | None = None,
    prior: Statistics | None = None,
    eps: float = 1e-5,
    channel_axis: int = 1,
    activation: str | None = None,
    residual: Array | None = None,
    gradient: str = "exact",
    out: Array | None = None,
) -> tuple[Any, Saved]:
    """Normalize x by the statistics of the places that the plan drew.

    ``mean = sum p_i x_i``, ``var = sum p_i (x_i - mean)**2``, ``rstd = 1 / sqrt(var + eps)``,
    ``y = act(weight * (x - mean) * rstd + bias + residual)``.

    Args:
        x: (N, C, *spatial), float64, float32, float16 or bfloat16; NumPy's, CuPy's, or any array
            with DLPack on the CPU or a CUDA device, where all others then are too.
        weight, bias: (C,), float32 (float64 for float64 x) or x's own dtype; None is 1 and 0.
        plan: from ``sampler.plan(x.shape, ...)``; None is full batch normalization.
        prior: Statistics that the plan's prior stands for; wanted if and only if it has one.
        eps: added to the variance; positive, in x's units squared.
        channel_axis: axis of x that counts channels; -1 for channels-last arrays.
        activation: None or "relu", fused.
        residual: as x, added before the activation, fused.
        gradient: what backward will compute: "exact", "sampled" (the two sums estimated from the sample;
            not with virtual samples) or "detached" (statistics as constants).
        out: as x, where to write y; may be the residual itself, and overlap nothing else. Read-only memory,
            arrays of frameworks that never change theirs, and exporters that copy are refused.

    Returns:
        y, of x's own array type, shape, dtype and memory layout, and what `backward` needs. A type whose
        module has no ``from_dlpack`` gets NumPy's arrays.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came, before any write; for a
            tensor that requires grad outside ``no_grad`` too.

    Source: Chen et al., IEEE TNNLS 32(1), 2021, section III; full: Ioffe and Szegedy, arXiv 1502.03167.
    """
    options = Options(eps, channel_axis, activation, gradient)
    return run_forward(Arguments(x, weight, bias, residual, out), plan, prior, options)


def run_forward(
    arguments: Arguments,
    plan: Plan | None,
    prior: Statistics | None,
    options: Options,
    moving: run.Moving = run.NOTHING_MOVES,
) -> tuple[Any, Saved]:
    """`forward` that also moves running statistics, if they are among the arguments."""
    views = borrowed(_with_prior(arguments, prior))
    plan = plan_or_full(plan, views.x, options.channel_axis, options.fewest)
    ready = prepared(views, plan, options)
    check_memory(views, options.in_place)
    back = giver(arguments.x, views.x)
    with on_device(*views):
        x = ready.layout.flatten(views.x)
        y, state = run.forward(ready, views, x, plan, plan.count_with(prior, x.size), moving)
        kinds = tuple(None if p is None else p.dtype for p in (views.weight, views.bias))
        saved = Saved(
            arguments.x,
            x,
            ready.layout,
            plan,
            state,
            arguments.weight,
            arguments.bias,
            kinds,
            arguments.residual is not None,
            options.activation == "relu",
            options.gradient,
            ready.call,
            probe(x),
        )
        return (back(ready.layout.restore(y)) if arguments.out is None else arguments.out), saved


def backward(
    dy: Array,
    saved: Saved,
    *,
    needs: Iterable[str] | None = None,
    gradient: str | None = None,
    out: Array | None = None,
) -> Grads:
    """Differentiate `forward`.

    With g = dy behind the activation, and both sums over all places (from the sample alone, scaled, for
    "sampled"): ``dbias = sum g``, ``dweight = sum g * xhat``, ``dresidual = g``,
    ``dx_i = weight * rstd * (g_i - p_i * (dbias + xhat_i * dweight))``; "detached" leaves out the bracket's
    second term.

    Args:
        dy: as x, the gradient of y.
        saved: from `forward`; may be used again.
        needs: which of "x", "weight", "bias", "residual" to compute; by default all that forward was given.
        gradient: in place of forward's own.
        out: as x, where to write dx; overlaps neither x nor dy.

    Returns:
        Grads(x, weight, bias, residual), each of its argument's array type and dtype, else None. Without an
        activation the residual's is dy itself, not a copy.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came, before any write; of a
            large x that was seen to have changed since forward, too.

    Source: as `forward`; the sums for p_i other than 1/M follow from the chain rule.
    """
    if not isinstance(saved, Saved):
        raise TypeError(f"saved: expected what forward returned, got {type(saved).__name__}")
    saved.check()
    layout, x = saved.layout, saved.view
    view = borrow(dy, "dy")
    checks.same_as(view, "dy", x)
    gradient = saved.gradient if gradient is None else gradient
    checks.gradient_of(gradient, saved.plan.recipe)
    optional = (("weight", saved.weight), ("bias", saved.bias), ("residual", saved.residual or None))
    wanted = checks.needed(needs, ("x", *(name for name, value in optional if value is not None)))
    target = None
    if out is not None:
        if "x" not in wanted:
            raise ValueError("out: expected None, since needs leaves out 'x'")
        target = borrow(out, "out", written=True)
        checks.output(target, x)
        checks.no_overlap(target, (view, x))
    with on_device(saved.x, view, target):
        dx, dresidual, dweight, dbias = run.backward(saved, view, wanted, gradient, target)
        back = giver(saved.like, view)
        return Grads(
            None if "x" not in wanted else out if out is not None else back(layout.restore(dx)),
            None if dweight is None else give(dweight, saved.weight),
            None if dbias is None else give(dbias, saved.bias),
            None
            if "residual" not in wanted
            else dy
            if dresidual is None
            else back(layout.restore(dresidual)),
        )


def repair(dx: Array, dy: Array, saved: Saved, dweight: Array, dbias: Array) -> None:
    """Take the statistics' part from dx, in place: the exact `backward`'s second phase.

    At the places drawn ``dx_i = weight * rstd * (g_i - p_i * (dbias + xhat_i * dweight))``. Several processes
    call ``backward(dy, saved, gradient="detached")``, add up their dweight and dbias, each times its share
    of the merged statistics where theirs are, and repair by the sums.

    Args:
        dx: as x, from the first phase; of a plan that draws everything it may hold anything.
        dy: as the first phase's.
        saved: from `forward`.
        dweight, dbias: (C,), parameters' dtype, the sums of g * xhat and g over all places of all processes.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came, before any write.
    """
    if not isinstance(saved, Saved):
        raise TypeError(f"saved: expected what forward returned, got {type(saved).__name__}")
    saved.check()
    layout, x = saved.layout, saved.view
    view = borrow(dy, "dy")
    checks.same_as(view, "dy", x)
    sums = [borrow(dweight, "dweight"), borrow(dbias, "dbias")]
    for each, name in zip(sums, ("dweight", "dbias"), strict=True):
        checks.channels(each, name, layout.C, x)
    target = borrow(dx, "dx", written=True)
    checks.output(target, x, "dx")
    checks.no_overlap(target, (view, x, *sums), name="dx")
    with on_device(saved.x, view, target, *sums):
        run.repair(saved, target, view, sums)


def moments(
    x: Array,
    plan: Plan | None = None,
    *,
    prior: Statistics | None = None,
    channel_axis: int = 1,
    dtype: str | None = None,
) -> Statistics:
    """Return the statistics that `forward` would normalize x by: its first phase.

    Args and errors as `forward`, but that a single value will do. Several processes `merge` theirs and
    `normalize` by the result. They come in ``dtype``: "float32", which rounds the mean as `forward` does not
    (it matters for |mean|/std beyond 1e4), or "float64"; by default that of parameters beside x.
    """
    views = borrowed(_with_prior(Arguments(x), prior))
    options = Options(channel_axis=channel_axis, fewest=1)
    plan = plan_or_full(plan, views.x, options.channel_axis, options.fewest)
    checks.choice(dtype, "dtype", (None, "float32", "float64"))
    kind = dtype or PARAMETER[element_type(views.x)]
    return public(moments_of(views, plan, options, prior), kind, x)


def moments_of(views: Arguments, plan: Plan, options: Options, prior: Statistics | None = None) -> Moments:
    """`moments` of views, in float64."""
    ready = prepared(views, plan, options)
    with on_device(*views):
        x = ready.layout.flatten(views.x)
        count = plan.count_with(prior, x.size)
        return run.forward(ready, views, x, plan, count, writes=False)[1].moments


def normalize(
    x: Array,
    statistics: Statistics,
    weight: Array | None = None,
    bias: Array | None = None,
    *,
    eps: float = 1e-5,
    channel_axis: int = 1,
    activation: str | None = None,
    residual: Array | None = None,
    out: Array | None = None,
) -> Any:
    """Return ``act(weight * (x - mean) / sqrt(var + eps) + bias + residual)``: `forward`'s second phase.

    Args and errors as `forward`, but that eps may be 0, and out may be x or the residual itself.
    """
    if not isinstance(statistics, Statistics):
        raise TypeError(f"statistics: expected Statistics, got {type(statistics).__name__}")
    arguments = _with_prior(Arguments(x, weight, bias, residual, out), statistics)
    views, options = borrowed(arguments), Options(eps, channel_axis, activation, in_place=True)
    checks.rank(views.x, channel_axis)
    plan = evaluation(layout_of(views.x, channel_axis))
    ready = prepared(views, plan, options)
    check_memory(views, options.in_place)
    back = giver(x, views.x)
    with on_device(*views):
        y, _ = run.forward(ready, views, ready.layout.flatten(views.x), plan, 0.0, masks=False)
        return back(ready.layout.restore(y)) if out is None else out


@lru_cache(maxsize=1024)
def evaluation(layout: Layout) -> Plan:
    """Return the plan of given statistics: a prior of weight 1."""
    return Plan(Recipe((layout.N, *layout.spatial), (), 1.0))


def _with_prior(arguments: Arguments, prior: Any) -> Arguments:
    if prior is None:
        return arguments
    if not isinstance(prior, Statistics):
        raise TypeError(f"prior: expected Statistics, got {type(prior).__name__}")
    return arguments._replace(prior_mean=prior.mean, prior_var=prior.var)


def plan_or_full(plan: Any, x: np.ndarray, channel_axis: int, fewest: int) -> Plan:
    """Return the plan, by default everything; x has been looked at no further than its type."""
    if plan is None:
        checks.rank(x, channel_axis)
        return Full().plan(x.shape, channel_axis=channel_axis, fewest=fewest)
    if not isinstance(plan, Plan):
        raise TypeError(f"plan: expected a Plan (sampler.plan(x.shape)), got {type(plan).__name__}")
    return plan
