"""forward, backward and their phases over any array: check, call the engine, hand back.

Nothing is written, and no running statistic moves, before every argument has been checked.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from sbncore import checks
from sbncore.arrays import ELEMENT, PARAMETER, Array, give, on_device
from sbncore.layout import Result, layout_of
from sbncore.plans import Plan
from sbncore.samplers import Full
from sbncore.saved import Kept, Saved, probe
from sbncore.statistics import Statistics, public

REMEMBERED = 1024  # kinds of arguments
_known: dict[Any, Any] = {}  # what `Plan.known` is to `normalize`


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
    return forward_in_place(
        x, weight, bias, plan, prior, eps, channel_axis, activation, residual, gradient, out
    )


def forward_in_place(
    x: Array,
    weight: Array | None,
    bias: Array | None,
    plan: Plan | None,
    prior: Statistics | None,
    eps: float,
    channel_axis: int,
    activation: str | None,
    residual: Array | None,
    gradient: str,
    out: Array | None,
    running: checks.Running | None = None,
    kept: Kept | None = None,
) -> tuple[Any, Saved]:
    """`forward` that also moves running statistics, and leaves what backward needs in the caller's memory."""
    alike, call = None, None
    if prior is None and kept is None:
        alike = checks.likeness((x, weight, bias, residual, out), eps, channel_axis, activation, gradient)
    if plan is None and type(x) is np.ndarray and x.ndim > 1:
        plan = Full().plan(x.shape, channel_axis=channel_axis)
    known = plan.known if isinstance(plan, Plan) else {}
    if alike is not None:
        call = known.get(alike)
        if running is not None and not checks.separate(running, (x, weight, bias, residual)):
            call = None
        done = call.forward(x, weight, bias, residual, out, plan, eps, running) if call else None
        if done is not None:
            done[1].probe = probe(done[1].x)
            return done  # type: ignore[no-any-return]
    view = checks.array(x, "x", channel_axis)
    layout = layout_of(view, channel_axis)
    if plan is None:
        plan = Full().plan(view.shape, channel_axis=channel_axis)
    checks.plan_for(plan, layout, prior)
    checks.gradient_of(gradient, plan)
    checks.choice(activation, "activation", (None, "relu"))
    eps = checks.epsilon(eps, statistics_are_given=plan.prior == 1)
    given = checks.parameters(view, layout, weight, bias, residual)
    by = None if prior is None else checks.given(prior, layout.C, view)
    if running is not None and not checks.separate(running, (view, *given)):
        raise ValueError(
            "running_mean, running_var: expected memory of their own, got arrays that repeat it, or overlap "
            "each other or another argument"
        )
    target = None
    if out is not None:
        read = () if by is None else (by.mean, by.var)
        moved = () if running is None else (running.mean, running.var)
        apart = view, given.weight, given.bias, *read, *moved
        target = checks.output(out, view, apart, (given.residual,))
    if alike is not None and call is None:
        relu, calls = activation == "relu", _calls(view)
        remember(known, alike, calls.call_of(view, layout, given, out, relu, gradient, plan=plan))
    with on_device(view):
        flat = layout.flatten(view)
        y = Result(flat, layout, x, out, target)
        relu = activation == "relu"
        state = phases_for(view).forward(y.flat, flat, layout, plan, by, given, eps, relu, running, kept)
        saved = Saved(x, flat, layout, plan, state, weight, bias, residual is not None, relu, gradient)
        saved.probe = probe(flat)
        return y.hand_back(), saved


def saved_in(
    kept: Kept,
    x: Array,
    plan: Plan,
    weight: Array | None,
    bias: Array | None,
    residual: bool,
    activation: str | None,
    gradient: str,
) -> Saved:
    """Return what `forward_in_place` saved, from the memory that kept it and forward's own arguments."""
    view = checks.array(x, "x", 1)
    layout = layout_of(view, 1)
    with on_device(view):
        flat = layout.flatten(view)
        state = phases_for(view).restored(flat, layout, plan, kept)
    return Saved(x, flat, layout, plan, state, weight, bias, residual, activation == "relu", gradient)


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
    if saved.call is not None and needs is None and gradient in (None, saved.gradient):
        done = saved.call.backward(dy, saved, out)
        if done is not None:
            return Grads(*done)
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
    with on_device(view):
        dx = Result(x, layout, saved.like, out, target) if "x" in wanted else None
        dresidual = Result(x, layout, saved.like) if "residual" in wanted and saved.relu else None
        dweight = dbias = np.zeros(0)
        if dx or dresidual or "weight" in wanted or "bias" in wanted:
            dweight, dbias = phases_for(view).backward(
                None if dx is None else dx.flat, None if dresidual is None else dresidual.flat,
                layout.flatten(view), saved, gradient,
            )  # fmt: skip
        return Grads(
            None if dx is None else dx.hand_back(),
            give(dweight, saved.weight) if "weight" in wanted else None,
            give(dbias, saved.bias) if "bias" in wanted else None,
            None if "residual" not in wanted else dy if dresidual is None else dresidual.hand_back(),
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
    layout, x = saved.layout, saved.x
    view = checks.beside(dy, "dy", layout.restore(x))
    sums = [checks.channels(dweight, "dweight", layout.C, view)]
    sums.append(checks.channels(dbias, "dbias", layout.C, view))
    target = checks.output(dx, view, (view, layout.restore(x), *sums), name="dx")
    with on_device(view):
        flat = layout.flatten(target)
        phases_for(view).repair(flat, layout.flatten(view), saved, *sums)
        if not layout.lies(target):
            target[...] = layout.restore(flat)


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
    view = checks.array(x, "x", channel_axis)
    layout = layout_of(view, channel_axis)
    if plan is None:
        plan = Full().plan(view.shape, channel_axis=channel_axis, fewest=1)
    checks.plan_for(plan, layout, prior, fewest=1)
    checks.choice(dtype, "dtype", (None, "float32", "float64"))
    by = None if prior is None else checks.given(prior, layout.C, view)
    with on_device(view):
        statistics = phases_for(view).moments(layout.flatten(view), layout, plan, by)
        return public(statistics, dtype or PARAMETER[ELEMENT[view.dtype]], x)


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
    alike, call = None, None
    if isinstance(statistics, Statistics):
        arrays = x, statistics.mean, statistics.var, weight, bias, residual, out
        alike = checks.likeness(arrays, eps, channel_axis, activation)
        call = None if alike is None else _known.get(alike)
        y = call.normalize(*arrays, eps) if call else None
        if y is not None:
            return y
    view = checks.array(x, "x", channel_axis)
    layout = layout_of(view, channel_axis)
    if not isinstance(statistics, Statistics):
        raise TypeError(f"statistics: expected Statistics, got {type(statistics).__name__}")
    checks.choice(activation, "activation", (None, "relu"))
    eps = checks.epsilon(eps, statistics_are_given=True)
    given = checks.parameters(view, layout, weight, bias, residual)
    by = checks.given(statistics, layout.C, view)
    target = None
    if out is not None:
        apart = given.weight, given.bias, by.mean, by.var
        target = checks.output(out, view, apart, (view, given.residual))
    if alike is not None and call is None:
        remember(_known, alike, _calls(view).call_of(view, layout, given, out, activation == "relu", by=by))
    with on_device(view):
        flat = layout.flatten(view)
        y = Result(flat, layout, x, out, target)
        phases_for(view).normalize(y.flat, flat, layout, by, given, eps, activation == "relu")
        return y.hand_back()


def remember(known: dict[Any, Any], alike: Any, call: Any) -> None:
    """Cache the call of arguments that have passed all checks, or that they have none."""
    if len(known) >= REMEMBERED:
        known.clear()
    known[alike] = call or False


def phases_for(view: np.ndarray) -> ModuleType:
    """Return the engine for an array: `sbncore.cpu.phases`, or for CuPy's `sbncore.cuda.phases`."""
    return _phases_for(isinstance(view, np.ndarray))


def _calls(view: np.ndarray) -> ModuleType:
    """Return the module of an engine's cached calls."""
    if isinstance(view, np.ndarray):
        from sbncore.cpu import calls
    else:
        from sbncore.cuda import calls  # type: ignore[no-redef]
    return calls


@cache
def _phases_for(cpu: bool) -> ModuleType:
    if cpu:
        from sbncore.cpu import phases
    else:
        from sbncore.cuda import phases  # type: ignore[no-redef]
    return phases
