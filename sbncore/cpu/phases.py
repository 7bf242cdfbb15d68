"""What the CPU does in a call, in order: of checked arguments, over flat memory.

`sbncore.cuda.phases` has the same functions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from sbncore.arrays import PARAMETER, borrow, element_type, widen, writeable
from sbncore.checks import Parameters, Running
from sbncore.cpu import channels, engine
from sbncore.layout import Layout
from sbncore.plans import Plan
from sbncore.saved import ROWS, Kept, Saved
from sbncore.statistics import Given, Moments

_ABSENT = {kind: np.zeros(0, kind) for kind in ("float32", "float64")}


@dataclass(eq=False)
class State:
    """What forward leaves for backward."""

    plan: Plan  # as drawn
    values: np.ndarray  # (ROWS, C) float64
    mask: np.ndarray | None
    count: float

    @property
    def moments(self) -> Moments:
        return self.values[0], self.values[1], self.count


def restored(x: np.ndarray, layout: Layout, plan: Plan, kept: Kept) -> State:
    """Return the state that a forward under this plan left in the caller's memory."""
    return State(plan.now(), kept.values, kept.mask, plan.effective_count)


def moments(x: np.ndarray, layout: Layout, plan: Plan, prior: Given | None) -> Moments:
    """Return the moments of the places drawn, mixed with the prior."""
    plan, values = plan.now(), np.empty((ROWS, layout.C))
    count = plan.count_beside(prior, x.size)
    if plan.prior < 1 and x.size:
        places = engine.work_at(layout, plan.runs, masked=False)
        engine.draw_moments(values, x, places, 1 / (1 - plan.prior))
    else:
        values[:2] = 0
    parameters, _ = _parameters(x, plan, prior, Parameters(x, layout), 1.0, None, count)
    channels.finish_forward(values, x, *parameters, 1)
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
        mask = engine.mask_for(layout) if kept is None else kept.mask
    count = plan.count_beside(prior, x.size)
    running = running if x.size else None  # an empty batch moves nothing
    _normalize(y, x, layout, plan, prior, given, eps, relu, values, mask, running, count)
    return State(plan, values, mask, count)


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
    x, layout, state = saved.x, saved.layout, saved.state
    dweight, dbias = (
        _absent(x) if p is None else np.zeros(layout.C, borrow(p, "parameter").dtype)
        for p in (saved.weight, saved.bias)
    )
    if x.size:
        plan, masked = state.plan, state.mask is not None
        places = scale = None
        if gradient != "detached" and plan.parts:  # it flows through the statistics
            places = engine.work_at(layout, plan.runs, masked)
            scale = layout.N * layout.S / (1 - plan.prior) if gradient == "sampled" else None
        run_backward(
            dx, dresidual, dy, x, state.mask, state.values, dweight, dbias, saved.relu,
            engine.work_everywhere(layout, masked), places, plan.full, scale,
        )  # fmt: skip
    return None if saved.weight is None else dweight, None if saved.bias is None else dbias


def repair(
    dx: np.ndarray, dy: np.ndarray, saved: Saved, dweight: np.ndarray, dbias: np.ndarray
) -> None:
    """Write dx at the places drawn, from the given sums of g and g * xhat over everything."""
    state = saved.state
    if saved.x.size and state.plan.parts:
        work = engine.work_at(saved.layout, state.plan.runs, state.mask is not None)
        total = np.stack([widen(dbias), widen(dweight)])
        coefficients = channels.coefficients(state.values, saved.x, work.tile)
        slopes = channels.slopes(total, state.values, saved.x, work.tile)
        engine.repair(dx, None, dy, saved.x, state.mask, coefficients, slopes, saved.relu, work)


def run_forward(
    y: np.ndarray,
    x: np.ndarray,
    residual: np.ndarray | None,
    values: np.ndarray,
    mask: np.ndarray | None,
    parameters: tuple[Any, ...],
    relu: bool,
    everywhere: engine.Work,
    places: engine.Work | None,
    weigh: float,
) -> None:
    """Write y, values and the mask, of memory flat and ``parameters`` in the order of finish_forward's.

    ``places`` are those drawn, of weights that sum to 1 / ``weigh``; None where the statistics are given.
    """
    if places is None:
        values[:2] = 0
    else:
        engine.draw_moments(values, x, places, weigh)
    coefficients = channels.finish_forward(values, x, *parameters, everywhere.tile)
    engine.normalize(y, mask, x, residual, coefficients, relu, everywhere)


def run_backward(
    dx: np.ndarray | None,
    dresidual: np.ndarray | None,
    dy: np.ndarray,
    x: np.ndarray,
    mask: np.ndarray | None,
    values: np.ndarray,
    dweight: np.ndarray,
    dbias: np.ndarray,
    relu: bool,
    everywhere: engine.Work,
    places: engine.Work | None,
    full: bool,
    scale: float | None,
) -> None:
    """Write dx, dresidual, dweight and dbias.

    ``places`` are those drawn, ``full`` where all are; None where no gradient flows through the statistics.
    ``scale``: for sums estimated from these places, by how much; None for sums of all.
    """
    # the places' rows are as long as the others
    coefficients = channels.coefficients(values, x, everywhere.tile)
    inputs: tuple[Any, Any, Any, Any] = dy, x, mask, coefficients
    dense = places is not None and full and dx is not None  # the repair writes everything
    written = (None, None) if dense else (dx, dresidual)
    if places is not None and scale is not None:
        sums = engine.sums(None, None, *inputs, relu, places._replace(weight=places.weight * scale))
        if any(array is not None for array in written):
            engine.sums(*written, *inputs, relu, everywhere)
    else:
        sums = engine.sums(*written, *inputs, relu, everywhere)
    total = channels.finish_backward(sums, values, dweight, dbias)
    if places is not None and dx is not None:
        slopes = channels.slopes(total, values, x, places.tile)
        engine.repair(dx, dresidual if dense else None, *inputs, slopes, relu, places)


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
) -> None:
    places = engine.work_at(layout, plan.runs, masked=False) if plan.prior < 1 and x.size else None
    parameters, copies = _parameters(x, plan, prior, given, eps, running, count)
    weigh = 1 / (1 - plan.prior) if places is not None else 0.0
    residual = None if given.residual is None else layout.flatten(given.residual)
    everywhere = engine.work_everywhere(layout, mask is not None)
    run_forward(y, x, residual, values, mask, parameters, relu, everywhere, places, weigh)
    for array, copy in copies:
        array[...] = copy


def _parameters(
    x: np.ndarray,
    plan: Plan,
    prior: Given | None,
    given: Parameters,
    eps: float,
    running: Running | None,
    count: float,
) -> tuple[tuple[Any, ...], list[tuple[np.ndarray, np.ndarray]]]:
    """The arguments of finish_forward, dense; what is to be copied back after it."""
    absent = _absent(x)
    weight, bias = (absent if p is None else _dense(p) for p in (given.weight, given.bias))
    before = (absent, absent) if prior is None else (_dense(prior.mean), _dense(prior.var))
    after, moved = (absent, absent), (0.0, 1.0, False)
    if running is not None:
        after = running.mean, running.var
        unbiased = 1 / (1 - 1 / count) if count > 1 else 1.0
        moved = running.factor, unbiased, running.skip_nonfinite
    dense = tuple(array if array.flags.c_contiguous else array.copy() for array in after)
    copies = [(array, copy) for array, copy in zip(after, dense, strict=True) if array is not copy]
    return (weight, bias, *before, plan.prior, eps, *dense, *moved), copies


def _absent(x: np.ndarray) -> np.ndarray:
    return _ABSENT[PARAMETER[element_type(x)]]


def _dense(array: np.ndarray) -> np.ndarray:
    return writeable(array if array.flags.c_contiguous else array.copy())
