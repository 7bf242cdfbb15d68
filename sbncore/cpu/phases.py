"""What the CPU does in a call, in order: of checked arguments, over flat memory.

`sbncore.cuda.phases` has the same functions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from sbncore.arrays import PARAMETER, borrow, element_type, widen
from sbncore.checks import Parameters, Running
from sbncore.cpu import draws, engine
from sbncore.layout import Layout
from sbncore.plans import Plan, Runs
from sbncore.saved import ROWS, Kept, Saved
from sbncore.statistics import Given, Moments, unbiased

_ABSENT = {kind: np.zeros(0, kind) for kind in ("float32", "float64")}


@dataclass(eq=False)
class State:
    """What forward leaves for backward."""

    plan: Plan  # as drawn
    runs: Runs | None  # the same spelled out, where forward did it
    values: np.ndarray  # (ROWS, C) float64
    mask: np.ndarray | None
    count: float

    @property
    def moments(self) -> Moments:
        return self.values[0], self.values[1], self.count


def restored(x: np.ndarray, layout: Layout, plan: Plan, kept: Kept) -> State:
    """Return the state that a forward under this plan left in the caller's memory."""
    return State(plan.now(), None, kept.values, kept.mask, plan.effective_count)


def moments(x: np.ndarray, layout: Layout, plan: Plan, prior: Given | None) -> Moments:
    """Return the moments of the places drawn, mixed with the prior."""
    plan, values = plan.now(), np.empty((ROWS, layout.C))
    count = plan.count_beside(prior, x.size)
    channels, _ = _channels(x, plan, prior, Parameters(), 1.0, None, count)
    runs, weigh = _drawn(plan, x)
    engine.of(layout).forward(None, x, None, values, None, channels, False, runs, plan.full, weigh)
    return values[0], values[1], count


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
    values = np.empty((ROWS, layout.C)) if kept is None else kept.values
    mask = None
    if relu and given.residual is not None:
        mask = np.empty(engine.mask_size(layout), np.uint8) if kept is None else kept.mask
    count = plan.count_beside(prior, x.size)
    running = running if x.size else None  # an empty batch moves nothing
    runs = _normalize(y, x, layout, plan, prior, given, eps, relu, values, mask, running, count)
    return State(plan, runs, values, mask, count)


def normalize(
    y: np.ndarray, x: np.ndarray, layout: Layout, by: Given, given: Parameters, eps: float, relu: bool
) -> None:
    """Write y, normalized by given statistics."""
    plan, values = Plan((layout.N, *layout.spatial), (), 1.0), np.empty((ROWS, layout.C))
    _normalize(y, x, layout, plan, by, given, eps, relu, values, None, None, 0.0)


def backward(
    dx: np.ndarray | None, dresidual: np.ndarray | None, dy: np.ndarray, saved: Saved, gradient: str
) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Write dx and dresidual, and return dweight and dbias in their parameters' types.

    The exact gradient is one pass over dy and x and a repair of the places drawn; where all are drawn, the
    sums come first and the "repair" is the pass that writes.
    """
    x, layout, state, nothing = saved.x, saved.layout, saved.state, absent(saved.x)
    dweight, dbias = (
        nothing if p is None else np.zeros(layout.C, nothing.dtype) for p in (saved.weight, saved.bias)
    )
    if x.size:
        plan, runs, scale = state.plan, engine.NOWHERE, 0.0
        if gradient != "detached" and plan.parts:  # it flows through the statistics
            runs = state.runs or draws.runs_of(plan)
            scale = layout.N * layout.S / (1 - plan.prior) if gradient == "sampled" else 0.0
        engine.of(layout).backward(
            dx, dresidual, dy, x, state.mask, state.values, np.empty((2, layout.C)), dweight, dbias,
            saved.relu, runs, plan.full, scale,
        )  # fmt: skip
    return (
        None if saved.weight is None else narrow(dweight, borrow(saved.weight, "weight").dtype),
        None if saved.bias is None else narrow(dbias, borrow(saved.bias, "bias").dtype),
    )


def repair(
    dx: np.ndarray, dy: np.ndarray, saved: Saved, dweight: np.ndarray, dbias: np.ndarray
) -> None:
    """Write dx at the places drawn, from the given sums of g and g * xhat over everything."""
    state, x, nothing = saved.state, saved.x, absent(saved.x)
    if x.size and state.plan.parts:
        total = np.stack([widen(dbias), widen(dweight)])
        engine.of(saved.layout).backward(
            dx, None, dy, x, state.mask, state.values, total, nothing, nothing, saved.relu,
            state.runs or draws.runs_of(state.plan), state.plan.full, -1.0,
        )  # fmt: skip


def _normalize(
    y: np.ndarray,
    x: np.ndarray,
    layout: Layout,
    plan: Plan,
    prior: Given | None,
    given: Parameters,
    eps: float,
    relu: bool,
    values: np.ndarray,
    mask: np.ndarray | None,
    running: Running | None,
    count: float,
) -> Runs:
    channels, copies = _channels(x, plan, prior, given, eps, running, count)
    residual = None if given.residual is None else layout.flatten(given.residual)
    runs, weigh = _drawn(plan, x)
    engine.of(layout).forward(y, x, residual, values, mask, channels, relu, runs, plan.full, weigh)
    for array, copy in copies:
        array[...] = narrow(copy, array.dtype)
    return runs


def _drawn(plan: Plan, x: np.ndarray) -> tuple[Runs, float]:
    """The places the moments are of, and what makes their weights' sum 1."""
    return (draws.runs_of(plan), 1 / (1 - plan.prior)) if plan.prior < 1 and x.size else (engine.NOWHERE, 0.0)


def _channels(
    x: np.ndarray,
    plan: Plan,
    prior: Given | None,
    given: Parameters,
    eps: float,
    running: Running | None,
    count: float,
) -> tuple[engine.Channels, list[tuple[np.ndarray, np.ndarray]]]:
    """Parameters and statistics as the engine takes them; what is to be copied back after it."""
    nothing = absent(x)
    weight, bias = (nothing if p is None else _dense(p, nothing.dtype) for p in (given.weight, given.bias))
    before = (nothing, nothing) if prior is None else (_dense(prior.mean), _dense(prior.var))
    if running is None:
        return engine.Channels(weight, bias, *before, plan.prior, eps, nothing, nothing, 0.0, 1.0, False), []
    mean, var = (_dense(array, nothing.dtype) for array in (running.mean, running.var))
    copies = [pair for pair in ((running.mean, mean), (running.var, var)) if pair[0] is not pair[1]]
    channels = engine.Channels(
        weight, bias, *before, plan.prior, eps, mean, var, running.factor, unbiased(count),
        running.skip_nonfinite,
    )  # fmt: skip
    return channels, copies


def absent(x: np.ndarray) -> np.ndarray:
    return _ABSENT[PARAMETER[element_type(x)]]


def _dense(array: np.ndarray, dtype: Any = np.float64) -> np.ndarray:
    """The array as the engine takes it: itself, or a copy."""
    if array.dtype != dtype:
        return widen(array).astype(dtype)
    return array if array.flags.c_contiguous and array.flags.aligned else array.copy()


def narrow(values: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Return values in a storage type, rounded to nearest even; themselves where that is theirs."""
    if dtype == values.dtype:
        return values
    if dtype == np.int16:
        with np.errstate(over="ignore"):
            return values.astype(np.float16).view(np.int16)
    bits = values.view(np.uint32)
    nearest = bits + ((bits >> 16 & 1) + np.uint32(0x7FFF))
    return (np.where(np.isnan(values), bits | 0x400000, nearest) >> 16).astype(np.uint16)
