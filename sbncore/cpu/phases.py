"""What the CPU does in a call, in order: of checked arguments, over flat memory.

`sbncore.cuda.phases` has the same functions.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sbncore.arrays import borrow, narrow, widen
from sbncore.checks import Parameters, Running
from sbncore.cpu import engine
from sbncore.layout import Layout
from sbncore.plans import Plan
from sbncore.saved import ROWS, Kept, Saved
from sbncore.statistics import Given, Moments, merge_moments

# What is not finite shows in the result, as in every framework; it is no warning.
_quiet = np.errstate(all="ignore")


@dataclass(frozen=True, eq=False)
class State:
    """What forward leaves for backward."""

    plan: Plan  # as drawn
    values: np.ndarray  # (6, C) float64: mean, var, rstd, shift, scale, offset
    mask: np.ndarray | None
    count: float

    @property
    def moments(self) -> Moments:
        return self.values[0], self.values[1], self.count


def restored(x: np.ndarray, layout: Layout, plan: Plan, kept: Kept) -> State:
    """Return the state that a forward under this plan left in the caller's memory."""
    return State(plan.now(), kept.values, kept.mask, plan.effective_count)


@_quiet
def moments(x: np.ndarray, layout: Layout, plan: Plan, prior: Given | None) -> Moments:
    """Return the moments of the places drawn, mixed with the prior."""
    plan = plan.now()
    given = None if prior is None else _widened(prior)
    if plan.prior == 1 and given is not None:
        return given
    if not x.size:
        return np.zeros(layout.C), np.zeros(layout.C), 0.0
    mean, var = engine.moments(x, layout, plan.runs)
    if given is None:
        return mean, var, plan.effective_count
    alone = plan.effective_count * (1 - plan.prior) ** 2
    return merge_moments([(mean, var, alone), given], (1 - plan.prior, plan.prior))


def forward(
    y: np.ndarray,
    x: np.ndarray,
    layout: Layout,
    plan: Plan,
    prior: Given | None,
    given: Parameters,
    eps: float,
    relu: bool,
    running: Running | None = None,
    kept: Kept | None = None,
) -> State:
    """Write y and move the running statistics; where backward needs them, keep the bits of y > 0."""
    plan = plan.now()
    statistics = moments(x, layout, plan, prior)
    values = np.empty((ROWS, layout.C)) if kept is None else kept.values
    mask = None
    if relu and given.residual is not None:
        mask = engine.mask_for(layout) if kept is None else kept.mask
    _normalize(y, x, layout, statistics, given, eps, relu, values, mask)
    if running is not None and x.size:
        _move(running, statistics)
    return State(plan, values, mask, statistics[2])


def normalize(
    y: np.ndarray, x: np.ndarray, layout: Layout, by: Given, given: Parameters, eps: float, relu: bool
) -> None:
    """Write y, normalized by given statistics."""
    _normalize(y, x, layout, _widened(by), given, eps, relu, np.empty((ROWS, layout.C)), None)


@_quiet
def backward(
    dx: np.ndarray | None, dresidual: np.ndarray | None, dy: np.ndarray, saved: Saved, gradient: str
) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Write dx and dresidual, and return dweight and dbias in their parameters' types.

    The exact gradient is one pass over dy and x and a repair of the places drawn; where all are drawn, the
    sums come first and the "repair" is the pass that writes.
    """
    dweight, dbias = _differentiate(dx, dresidual, dy, saved, gradient)
    parameters = (saved.weight, saved.bias)
    dw, db = (
        None if parameter is None else narrow(values, borrow(parameter, "parameter").dtype)
        for values, parameter in zip((dweight, dbias), parameters, strict=True)
    )
    return dw, db


@_quiet
def repair(
    dx: np.ndarray, dy: np.ndarray, saved: Saved, dweight: np.ndarray, dbias: np.ndarray
) -> None:
    """Write dx at the places drawn, from the given sums of g and g * xhat over everything."""
    if saved.x.size and saved.state.plan.parts:
        c = _coefficients(saved)
        _repair(dx, None, dy, saved, c, widen(dweight), widen(dbias))


@_quiet
def _normalize(
    y: np.ndarray,
    x: np.ndarray,
    layout: Layout,
    statistics: Moments,
    given: Parameters,
    eps: float,
    relu: bool,
    values: np.ndarray,
    mask: np.ndarray | None,
) -> None:
    mean, var, _ = statistics
    rstd = 1 / np.sqrt(var + eps)  # infinite where a given variance and eps are 0
    weight, bias = (None if p is None else widen(p) for p in (given.weight, given.bias))
    coefficients = engine.coefficients(mean, rstd, weight, bias, engine.compute_type(x))
    for row, value in zip(values, (mean, var, rstd, *coefficients), strict=True):
        row[...] = value
    if x.size:
        residual = None if given.residual is None else layout.flatten(given.residual)
        engine.normalize(y, mask, x, residual, coefficients, relu, layout)


@_quiet
def _move(running: Running, statistics: Moments) -> None:
    mean, var, count = statistics
    if count > 1:
        var = var * (1 / (1 - 1 / count))
    kept = np.isfinite(mean) & np.isfinite(var) if running.skip_nonfinite else np.ones(mean.shape, bool)
    for array, value in ((running.mean, mean), (running.var, var)):
        before = widen(array)
        after = narrow(before + running.factor * (value - before), array.dtype)
        array[...] = np.where(kept, after, array)


def _differentiate(
    dx: np.ndarray | None, dresidual: np.ndarray | None, dy: np.ndarray, saved: Saved, gradient: str
) -> tuple[np.ndarray, np.ndarray]:
    if not saved.x.size:
        return np.zeros(saved.layout.C), np.zeros(saved.layout.C)
    x, layout, relu, state = saved.x, saved.layout, saved.relu, saved.state
    plan, mask = state.plan, state.mask
    c = _coefficients(saved)
    places = plan.runs
    through = gradient != "detached" and len(places.begin) > 0  # the gradient flows through the statistics
    dense = through and plan.full and dx is not None  # the repair writes everything
    written = (None, None) if dense else (dx, dresidual)
    if gradient == "sampled" and through:
        scaled = places._replace(weight=places.weight * (layout.N * layout.S / (1 - plan.prior)))
        dbias, second = engine.sums(None, None, dy, x, mask, c, relu, layout, scaled)
        if any(array is not None for array in written):
            engine.sums(*written, dy, x, mask, c, relu, layout)
    else:
        dbias, second = engine.sums(*written, dy, x, mask, c, relu, layout)
    mean, _, rstd = state.values[:3]
    dweight = (second - (mean - c.shift) * dbias) * rstd
    if through and dx is not None:
        _repair(dx, dresidual if dense else None, dy, saved, c, dweight, dbias)
    return dweight, dbias


def _coefficients(saved: Saved) -> engine.Coefficients:
    return engine.Coefficients(*saved.state.values[3:].astype(engine.compute_type(saved.x)))


def _repair(
    dx: np.ndarray,
    dresidual: np.ndarray | None,
    dy: np.ndarray,
    saved: Saved,
    c: engine.Coefficients,
    dweight: np.ndarray,
    dbias: np.ndarray,
) -> None:
    state = saved.state
    mean, _, rstd = state.values[:3]
    k1 = c.scale * rstd * dweight
    k0 = c.scale * dbias - k1 * (mean - c.shift)
    engine.repair(
        dx, dresidual, dy, saved.x, state.mask, c, k0, k1, saved.relu, saved.layout, state.plan.runs
    )


def _widened(given: Given) -> Moments:
    return widen(given.mean), widen(given.var), given.count
