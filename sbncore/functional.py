"""forward, backward and their phases over any CPU array: check, call the engine, hand back.

Nothing is written, and no running statistic moves, before every argument has been checked.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from sbncore import checks
from sbncore.arrays import ELEMENT, PARAMETER, Array, borrow, give, narrow, widen
from sbncore.layout import Layout, layout_of
from sbncore.plans import Plan
from sbncore.samplers import Full, Sampler
from sbncore.statistics import Moments, Statistics, merge_moments, public

if TYPE_CHECKING:
    from sbncore.cpu.engine import Coefficients


class Grads(NamedTuple):
    """The gradients of forward's arguments, None where not needed or not given."""

    x: Any
    weight: Any
    bias: Any
    residual: Any


@dataclass(frozen=True, eq=False, repr=False)
class Saved:
    """What backward needs: x itself (no copy where its memory is dense), the statistics, a bit per element.

    x must not change between forward and backward. ``statistics`` are those that normalized.
    """

    like: Any  # the caller's x
    x: np.ndarray  # its memory, flat
    layout: Layout
    plan: Plan
    moments: Moments
    rstd: np.ndarray
    coefficients: Coefficients
    weight: Any
    bias: Any
    residual: bool
    relu: bool
    mask: np.ndarray | None
    gradient: str

    @property
    def statistics(self) -> Statistics:
        """Mean and var (C,), and count, of the values that normalized."""
        return public(self.moments, PARAMETER[ELEMENT[self.x.dtype]], self.like)

    def __repr__(self) -> str:
        return f"Saved(shape={self.layout.shape}, gradient={self.gradient!r}, plan={self.plan!r})"


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
    given = _Parameters(view, layout, weight, bias, residual)
    prior_moments = None if prior is None else _moments_of(prior, layout.C, view)
    target = None
    if out is not None:
        target = checks.output(out, view, (view, given.weight, given.bias))
        checks.output(out, view, (given.residual,), same=True)
    flat = layout.flatten(view)
    statistics = _estimate(flat, layout, plan, prior_moments)
    rstd = 1 / np.sqrt(statistics[1] + eps)
    y, mask, coefficients = _normalize(flat, layout, statistics[0], rstd, given, activation, target, True)
    saved = Saved(x, flat, layout, plan, statistics, rstd, coefficients, weight, bias,
                  residual is not None, activation == "relu", mask, gradient)  # fmt: skip
    return (out if out is not None else give(y, x)), saved


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
    target = None
    if out is not None:
        if "x" not in wanted:
            raise ValueError("out: expected None, since needs leaves out 'x'")
        target = checks.output(out, view, (view, layout.restore(x)))
    dx = dresidual = None
    if "x" in wanted:
        dx = _memory(x, layout, target)
    if "residual" in wanted and saved.relu:
        dresidual = np.empty_like(x)
    dbias, dweight = np.zeros(layout.C), np.zeros(layout.C)
    if x.size:
        dbias, dweight = _differentiate(dx, dresidual, layout.flatten(view), saved, gradient)
    if dx is not None and target is not None:
        _deliver(dx, layout, target)
    return Grads(
        None if dx is None else out if out is not None else give(layout.restore(dx), saved.like),
        _parameter_gradient(dweight, saved.weight) if "weight" in wanted else None,
        _parameter_gradient(dbias, saved.bias) if "bias" in wanted else None,
        None if "residual" not in wanted
        else dy if dresidual is None else give(layout.restore(dresidual), saved.like),
    )  # fmt: skip


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
    prior_moments = None if prior is None else _moments_of(prior, layout.C, view)
    statistics = _estimate(layout.flatten(view), layout, plan, prior_moments)
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
    given = _Parameters(view, layout, weight, bias, residual)
    mean, var, _ = _moments_of(statistics, layout.C, view)
    target = None
    if out is not None:
        target = checks.output(out, view, (given.weight, given.bias))
        checks.output(out, view, (view, given.residual), same=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        rstd = 1 / np.sqrt(var + eps)
    y, _, _ = _normalize(layout.flatten(view), layout, mean, rstd, given, activation, target, False)
    return out if out is not None else give(y, x)


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
    step: int = 0,
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
        running_mean, running_var: (C,), parameters' dtype, writeable when training; or both None (then
            training must be true). They are the prior of a sampler that has one.
        training: whether to estimate statistics or use the running ones.
        momentum: weight of the new statistics in [0, 1]; None averages all steps alike (``1/(step+1)``).
        sampler, seed, layer, step: what to draw; ``step`` counts the training calls from 0.
        skip_nonfinite: leave the running statistics as they were where a mean or variance is not finite.

    Returns:
        y and what `backward` needs, in both modes.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came, before any write.
    """
    view = checks.array(x, "x", channel_axis)
    layout = layout_of(view, channel_axis)
    if not isinstance(sampler, Sampler):
        raise TypeError(f"sampler: expected a Sampler, got {type(sampler).__name__}")
    if (running_mean is None) != (running_var is None):
        raise ValueError("running_mean, running_var: expected both or neither, got one of them")
    if running_mean is None and not training:
        raise ValueError("running_mean, running_var: expected arrays when training is false, got None")
    factor = checks.momentum_of(momentum, step) if training else 0.0
    prior, stored = None, []
    if running_mean is not None:
        for value, name in ((running_mean, "running_mean"), (running_var, "running_var")):
            stored.append(checks.running(value, name, layout.C, view, training))
        prior = Statistics(running_mean, running_var)
    if training:
        plan = sampler.plan(view.shape, seed=seed, layer=layer, step=step, channel_axis=channel_axis)
        if plan.prior > 0 and prior is None:
            raise ValueError("running_mean, running_var: expected arrays for the sampler's prior, got None")
    else:
        plan = Plan((layout.N, *layout.spatial), (), 1.0)
    y, saved = forward(
        x, weight, bias, plan=plan, prior=prior if plan.prior > 0 else None, eps=eps,
        channel_axis=channel_axis, activation=activation, residual=residual, gradient=gradient, out=out,
    )  # fmt: skip
    if training and stored and view.size:
        mean, var, count = saved.moments
        if count > 1:
            var = var * (1 / (1 - 1 / count))
        if not skip_nonfinite or (np.isfinite(mean).all() and np.isfinite(var).all()):
            for array, value in zip(stored, (mean, var), strict=True):
                before = widen(array)
                array[...] = narrow(before + factor * (value - before), array.dtype)
    return y, saved


class _Parameters:
    """weight, bias and residual, checked against x, as views of their storage types."""

    def __init__(self, x: np.ndarray, layout: Layout, weight: Any, bias: Any, residual: Any) -> None:
        C = layout.C
        self.weight = None if weight is None else checks.channels(weight, "weight", C, x)
        self.bias = None if bias is None else checks.channels(bias, "bias", C, x)
        self.residual = None if residual is None else checks.beside(residual, "residual", x)


def _moments_of(statistics: Statistics, C: int, x: np.ndarray) -> Moments:
    mean = checks.channels(statistics.mean, "mean", C, x)
    return widen(mean), widen(checks.channels(statistics.var, "var", C, x)), statistics.count


def _estimate(x: np.ndarray, layout: Layout, plan: Plan, prior: Moments | None) -> Moments:
    from sbncore.cpu import engine

    if plan.prior == 1 and prior is not None:
        return prior
    if not x.size:
        return np.zeros(layout.C), np.zeros(layout.C), 0.0
    mean, var = engine.moments(x, layout, plan.runs)
    if prior is None:
        return mean, var, plan.effective_count
    alone = plan.effective_count * (1 - plan.prior) ** 2
    return merge_moments([(mean, var, alone), prior], (1 - plan.prior, plan.prior))


def _normalize(
    x: np.ndarray,
    layout: Layout,
    mean: np.ndarray,
    rstd: np.ndarray,
    given: _Parameters,
    activation: str | None,
    target: np.ndarray | None,
    training: bool,
) -> tuple[np.ndarray, np.ndarray | None, Coefficients]:
    from sbncore.cpu import engine

    weight, bias, residual = given.weight, given.bias, given.residual
    coefficients = engine.coefficients(
        mean, rstd, None if weight is None else widen(weight), None if bias is None else widen(bias),
        engine.compute_type(x),
    )  # fmt: skip
    relu = activation == "relu"
    mask = engine.mask_for(layout) if training and relu and residual is not None else None
    y = _memory(x, layout, target)
    if x.size:
        added = None if residual is None else layout.flatten(residual)
        engine.normalize(y, mask, x, added, coefficients, relu, layout)
    if target is not None:
        _deliver(y, layout, target)
    return layout.restore(y), mask, coefficients


def _differentiate(
    dx: np.ndarray | None,
    dresidual: np.ndarray | None,
    dy: np.ndarray,
    saved: Saved,
    gradient: str,
) -> tuple[np.ndarray, np.ndarray]:
    """Write dx and dresidual, and return dbias and dweight in float64.

    The exact gradient is one pass over dy and x and a repair of the places drawn; where all are drawn, the
    sums come first and the "repair" is the pass that writes.
    """
    from sbncore.cpu import engine

    x, layout, plan, relu, mask, c = (
        saved.x, saved.layout, saved.plan, saved.relu, saved.mask, saved.coefficients)  # fmt: skip
    everywhere, places = engine.everywhere(layout), plan.runs
    through = gradient != "detached" and len(places.begin) > 0  # the gradient flows through the statistics
    dense = through and plan.full and dx is not None  # the repair writes everything
    written = (None, None) if dense else (dx, dresidual)
    if gradient == "sampled" and through:
        scaled = places._replace(weight=places.weight * (layout.N * layout.S / (1 - plan.prior)))
        dbias, second = engine.sums(None, None, dy, x, mask, c, relu, layout, scaled)
        if any(array is not None for array in written):
            engine.sums(*written, dy, x, mask, c, relu, layout, everywhere)
    else:
        dbias, second = engine.sums(*written, dy, x, mask, c, relu, layout, everywhere)
    rounding = saved.moments[0] - c.shift
    dweight = (second - rounding * dbias) * saved.rstd
    if through and dx is not None:
        k1 = c.scale * saved.rstd * dweight
        k0 = c.scale * dbias - k1 * rounding
        engine.repair(dx, dresidual if dense else None, dy, x, mask, c, k0, k1, relu, layout, places)
    return dbias, dweight


def _memory(x: np.ndarray, layout: Layout, target: np.ndarray | None) -> np.ndarray:
    """Return flat memory for a result: the target's own where it lies in x's layout, else new."""
    view = None if target is None else layout.view(target)
    return np.empty_like(x) if view is None else view


def _deliver(flat: np.ndarray, layout: Layout, target: np.ndarray) -> None:
    if layout.view(target) is None:
        target[...] = layout.restore(flat)


def _parameter_gradient(values: np.ndarray, parameter: Any) -> Any:
    return give(narrow(values, borrow(parameter, "parameter").dtype), parameter)
