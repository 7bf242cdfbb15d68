"""forward, backward and their phases over any CPU array: check, call the engine, hand back.

Nothing is written, and no running statistic moves, before every argument has been checked.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from sbncore import checks, phases
from sbncore.arrays import ELEMENT, PARAMETER, Array, borrow, give, narrow
from sbncore.layout import Result, layout_of
from sbncore.plans import Plan
from sbncore.samplers import Full
from sbncore.saved import Saved
from sbncore.statistics import Statistics, public


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
        x: (N, C, *spatial), float64, float32, float16 or bfloat16; NumPy's, or any CPU array with DLPack.
        weight, bias: (C,), float32 (float64 for float64 x) or x's own dtype; None is 1 and 0.
        plan: from ``sampler.plan(x.shape, ...)``; None is full batch normalization.
        prior: Statistics that the plan's prior stands for; wanted if and only if it has one.
        eps: added to the variance; positive, in x's units squared.
        channel_axis: axis of x that counts channels; -1 for channels-last arrays.
        activation: None or "relu", fused.
        residual: as x, added before the activation, fused.
        gradient: what backward will compute: "exact", "sampled" (the two sums estimated from the sample;
            not with virtual samples) or "detached" (statistics as constants).
        out: as x, where to write y; may be the residual itself, and overlap nothing else.

    Returns:
        y, of x's own array type, shape, dtype and memory layout, and what `backward` needs.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came, before any write.

    Source: Chen et al., IEEE TNNLS 32(1), 2021, section III; full: Ioffe and Szegedy, arXiv 1502.03167.
    """
    view = checks.array(x, "x", channel_axis)
    layout = layout_of(view, channel_axis)
    if plan is None:
        plan = Full().plan(view.shape, channel_axis=channel_axis)
    checks.plan_for(plan, layout, prior)
    checks.gradient_of(gradient, plan)
    checks.choice(activation, "activation", (None, "relu"))
    eps = checks.epsilon(eps, statistics_are_given=plan.prior == 1)
    given = checks.Parameters(view, layout, weight, bias, residual)
    prior_moments = None if prior is None else checks.moments(prior, layout.C, view)
    if out is not None:
        checks.output(out, view, (view, given.weight, given.bias), (given.residual,))
    flat = layout.flatten(view)
    statistics = phases.estimate(flat, layout, plan, prior_moments)
    rstd = phases.reciprocal_deviation(statistics[1], eps)
    relu = activation == "relu"
    y = Result(flat, layout, x, out)
    coefficients, mask = phases.normalize(
        y.flat, flat, layout, statistics[0], rstd, given, relu, relu and residual is not None
    )
    saved = Saved(x, flat, layout, plan, statistics, rstd, coefficients, weight, bias,
                  residual is not None, relu, mask, gradient)  # fmt: skip
    return y.hand_back(), saved


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
        ValueError, TypeError: naming the argument, what was expected and what came, before any write.

    Source: as `forward`; the sums for p_i other than 1/M follow from the chain rule.
    """
    if not isinstance(saved, Saved):
        raise TypeError(f"saved: expected what forward returned, got {type(saved).__name__}")
    layout, x = saved.layout, saved.x
    view = checks.beside(dy, "dy", layout.restore(x))
    gradient = saved.gradient if gradient is None else gradient
    checks.gradient_of(gradient, saved.plan)
    optional = (("weight", saved.weight), ("bias", saved.bias), ("residual", saved.residual or None))
    wanted = checks.needed(needs, ("x", *(name for name, value in optional if value is not None)))
    if out is not None:
        if "x" not in wanted:
            raise ValueError("out: expected None, since needs leaves out 'x'")
        checks.output(out, view, (view, layout.restore(x)))
    dx = Result(x, layout, saved.like, out) if "x" in wanted else None
    dresidual = Result(x, layout, saved.like) if "residual" in wanted and saved.relu else None
    dbias = dweight = np.zeros(0)
    if dx or dresidual or "weight" in wanted or "bias" in wanted:
        dbias, dweight = phases.differentiate(
            None if dx is None else dx.flat, None if dresidual is None else dresidual.flat,
            layout.flatten(view), saved, gradient,
        )  # fmt: skip
    return Grads(
        None if dx is None else dx.hand_back(),
        _parameter_gradient(dweight, saved.weight) if "weight" in wanted else None,
        _parameter_gradient(dbias, saved.bias) if "bias" in wanted else None,
        None if "residual" not in wanted else dy if dresidual is None else dresidual.hand_back(),
    )


def moments(
    x: Array, plan: Plan | None = None, *, prior: Statistics | None = None, channel_axis: int = 1
) -> Statistics:
    """Return the statistics that `forward` would normalize x by: its first phase.

    Args and errors as `forward`. Several processes `merge` theirs and `normalize` by the result. The mean
    is rounded to the parameters' dtype, which `forward` avoids: it matters for |mean|/std beyond 1e4.
    """
    view = checks.array(x, "x", channel_axis)
    layout = layout_of(view, channel_axis)
    if plan is None:
        plan = Full().plan(view.shape, channel_axis=channel_axis)
    checks.plan_for(plan, layout, prior)
    prior_moments = None if prior is None else checks.moments(prior, layout.C, view)
    statistics = phases.estimate(layout.flatten(view), layout, plan, prior_moments)
    return public(statistics, PARAMETER[ELEMENT[view.dtype]], x)


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
    view = checks.array(x, "x", channel_axis)
    layout = layout_of(view, channel_axis)
    if not isinstance(statistics, Statistics):
        raise TypeError(f"statistics: expected Statistics, got {type(statistics).__name__}")
    checks.choice(activation, "activation", (None, "relu"))
    eps = checks.epsilon(eps, statistics_are_given=True)
    given = checks.Parameters(view, layout, weight, bias, residual)
    mean, var, _ = checks.moments(statistics, layout.C, view)
    if out is not None:
        checks.output(out, view, (given.weight, given.bias), (view, given.residual))
    y = Result(layout.flatten(view), layout, x, out)
    rstd = phases.reciprocal_deviation(var, eps)
    phases.normalize(
        y.flat, layout.flatten(view), layout, mean, rstd, given, activation == "relu", masked=False
    )
    return y.hand_back()


def _parameter_gradient(values: np.ndarray, parameter: Any) -> Any:
    return give(narrow(values, borrow(parameter, "parameter").dtype), parameter)
