"""Runs a Call over views: allocates the results, hands over addresses, writes back what was copied."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from sbncore.arguments import Arguments, Prepared, dense_vectors
from sbncore.arrays import (
    PARAMETER,
    address,
    assign,
    computable,
    element_type,
    narrow,
    new,
    stream_of,
    viewed,
    widen,
)
from sbncore.layout import Layout
from sbncore.plans import Plan
from sbncore.saved import Saved, State
from sbncore.signature import ROWS, Pointers, Scalars
from sbncore.statistics import unbiased


class Moving(NamedTuple):
    """How a training call moves the running statistics."""

    momentum: float = 0.0
    skip_nonfinite: bool = False


NOTHING_MOVES = Moving()


def forward(
    ready: Prepared, views: Arguments, x: np.ndarray, plan: Plan, count: float,
    moving: Moving = NOTHING_MOVES, writes: bool = True, masks: bool = True,
) -> tuple[Any, State]:  # fmt: skip
    """Run a forward over x, flat; return y, flat, if it writes one, and the state."""
    call, layout, copied = ready.call, ready.layout, ready.copied
    values = new(x, ROWS * layout.C + 1, "f8")
    if call is None:
        return x, _state_of_nothing(values, views, layout, count)
    y = None
    if writes:
        y = new(x, x.size, x.dtype) if views.out is None or "out" in copied else layout.flatten(views.out)
    memory = new(x, call.memory, "u1") if call.memory else None
    mask = new(x, call.mask, "u1") if masks and call.mask else None
    residual = None if views.residual is None else layout.flatten(views.residual)
    held = dense_vectors(views, ready) if copied else views
    draw, step = call.drawn(plan)
    at = Pointers(
        y=_at(y),
        x=address(x),
        residual=_at(residual),
        mask=_at(mask),
        state=address(values),
        memory=_at(memory),
        weight=_at(held.weight),
        bias=_at(held.bias),
        step=_at(viewed(step)),
        running_mean=_at(held.running_mean),
        running_var=_at(held.running_var),
        prior_mean=_at(held.prior_mean),
        prior_var=_at(held.prior_var),
    )
    scalars = Scalars(ready.eps, moving.momentum, unbiased(count), moving.skip_nonfinite)
    call.forward(at, draw, scalars, stream_of(x))
    if copied:
        _write_back(ready, views, y, held)
    state = State(values, mask, count, layout.C, draw, step is not None)
    if call.memory:
        state.memory["forward"] = memory, residual, held[1:]
    return y, state


def _write_back(ready: Prepared, views: Arguments, y: Any, held: Arguments) -> None:
    """Copy what was written to arrays that the engine cannot take as they lie."""
    if "out" in ready.copied and y is not None:
        assign(views.out, ready.layout.restore(y))
    for name in ("running_mean", "running_var"):
        if name in ready.copied:
            view = getattr(views, name)
            assign(view, narrow(getattr(held, name), view.dtype))


def _state_of_nothing(values: Any, views: Arguments, layout: Layout, count: float) -> State:
    """Return the state of an array without elements: the prior's moments, if there is one."""
    rows = computable(values)
    rows[...] = 0
    if views.prior_mean is not None:
        rows[: layout.C] = widen(views.prior_mean)
        rows[layout.C : 2 * layout.C] = widen(views.prior_var)
    return State(values, None, count, layout.C, None, False)


def backward(
    saved: Saved, dy: np.ndarray, wanted: tuple[str, ...], gradient: str, out: Any
) -> tuple[Any, Any, Any, Any]:
    """Return dx and dresidual, flat, and dweight and dbias in their parameters' types.

    None is what is not wanted, and a residual's gradient that is dy itself.
    """
    call, layout, x, state = saved.call, saved.layout, saved.x, saved.state
    direct = out is not None and layout.lies(out)
    dx = None if "x" not in wanted else layout.flatten(out) if direct else new(x, x.size, x.dtype)
    dresidual = new(x, x.size, x.dtype) if "residual" in wanted and saved.relu else None
    kind = PARAMETER[element_type(x)]
    sums = [new(x, layout.C, kind) if name in wanted else None for name in ("weight", "bias")]
    if call is None:
        for each in sums:
            if each is not None:
                computable(each)[...] = 0
    elif dx is not None or dresidual is not None or "weight" in wanted or "bias" in wanted:
        memory, flat = new(x, call.memory, "u1") if call.memory else None, layout.flatten(dy)
        at = Pointers(
            dx=_at(dx),
            dresidual=_at(dresidual),
            dweight=_at(sums[0]),
            dbias=_at(sums[1]),
            x=address(x),
            dy=address(flat),
            state=address(state.values),
            mask=_at(state.mask),
            memory=_at(memory),
            step=state.step_address,
        )
        call.backward(at, state.draw, gradient, stream_of(x))
        if call.memory:
            state.memory["backward"] = memory, flat
        if out is not None and dx is not None and not direct:
            assign(out, layout.restore(dx))
    dweight, dbias = (
        None if each is None else narrow(each, dtype) for each, dtype in zip(sums, saved.kinds, strict=True)
    )
    return dx, dresidual, dweight, dbias


def repair(saved: Saved, dx: np.ndarray, dy: np.ndarray, sums: list[np.ndarray]) -> None:
    """Write dx at the sampled elements, from dweight and dbias."""
    call, layout, state = saved.call, saved.layout, saved.state
    if call is None:
        return
    flat, gradients, C = layout.flatten(dx), layout.flatten(dy), layout.C
    memory = new(flat, call.memory, "u1") if call.memory else None
    total = new(flat, 2 * C, call.sums_element)
    for k, each in enumerate(call.sums_to_repair_by(widen(sums[0]), widen(sums[1]), state.rows)):
        computable(total)[k * C : (k + 1) * C] = each
    at = Pointers(
        dx=address(flat),
        dy=address(gradients),
        x=address(saved.x),
        state=address(state.values),
        mask=_at(state.mask),
        memory=_at(memory),
        sums=address(total),
        step=state.step_address,
    )
    call.repair(at, state.draw, stream_of(saved.x))
    if call.memory:
        state.memory["repair"] = memory, total, gradients
    if not layout.lies(dx):
        assign(dx, layout.restore(flat))


def _at(array: Any) -> int:
    """Return an array's address, 0 of None."""
    return 0 if array is None else address(array)
