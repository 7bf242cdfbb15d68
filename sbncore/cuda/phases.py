"""What a GPU does in a call, in order: of checked arguments, over flat device memory.

`sbncore.cpu.phases` has the same functions. Nothing here waits for the device.
"""

from __future__ import annotations

from typing import Any

from sbncore.arrays import address, borrow, widen
from sbncore.checks import Parameters, Running
from sbncore.cuda import call, geometry
from sbncore.cuda.device import device_of
from sbncore.cuda.work import Draws, State, Work, at, is_aligned
from sbncore.layout import Layout
from sbncore.plans import Plan
from sbncore.saved import ROWS, Kept, Saved
from sbncore.statistics import Given, Moments, unbiased

MASK_WORD = {8: 4, 4: 2, 2: 1, 1: 1}  # bytes for UNROLL rows of a column of so many elements


def moments(x: Any, layout: Layout, plan: Plan, prior: Given | None) -> Moments:
    """Return the moments of the places drawn, mixed with the prior."""
    _check(plan)
    device = device_of(x)
    values = device.empty((ROWS, layout.C), "float64")
    if x.size:
        given = Parameters()
        draws = Draws(device, plan, layout.S)
        work = Work(device, x, layout, plan, (), fused=False)
        pointers = {"state": address(values), "x": address(x)}
        _launch_forward(work, pointers, draws, prior, given, 1.0, None, "false,false", write=False)
    else:
        _of_nothing(values, plan, prior)
    return values[0], values[1], plan.count_beside(prior, x.size)


def forward(
    y: Any,
    x: Any,
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
    _check(plan)
    device = device_of(x)
    kept = kept or Kept(device.empty((ROWS, layout.C), "float64"), None)
    values = kept.values
    state = State(values, plan.count_beside(prior, x.size), Draws(device, plan, layout.S, kept.step))
    if not x.size:
        _of_nothing(values, plan, prior)
        return state
    residual = None if given.residual is None else layout.flatten(given.residual)
    work = Work(device, x, layout, plan, (y, residual), fused=plan.prior < 1)
    state.work = [work]
    if running is not None and prior is not None and plan.prior < 1:
        prior = Given(prior.mean.copy(), prior.var.copy(), prior.count)  # blocks read it while one moves it
    if relu and residual is not None:
        size = _mask_size(work.sweep)
        state.mask = device.empty(size, "uint8") if kept.mask is None else kept.mask
        assert state.mask.size >= size, "the caller's mask is that of an aligned array, and this one is not"
        state.aligned = work.sizes.aligned
    pointers = {
        "y": address(y), "x": address(x), "residual": at(residual), "mask": at(state.mask),
        "state": address(values),
    }  # fmt: skip
    options = f"{_flag(relu)},{_flag(residual is not None)}"
    _launch_forward(work, pointers, state.draws, prior, given, eps, running, options, state.count)
    return state


def restored(x: Any, layout: Layout, plan: Plan, kept: Kept) -> State:
    """Return the state that a forward under this plan left in the caller's memory."""
    device = device_of(x)
    draws = Draws(device, plan, layout.S, kept.step)
    state = State(kept.values, plan.effective_count, draws)
    state.mask = kept.mask
    if draws.addresses:
        draws.step = draws.kept
        work = Work(device, x, layout, plan, (), fused=False)
        _draw(work, {"step": at(draws.kept)}, draws, draws.parts(plan.parts, plan))
    return state


def mask_size(layout: Layout, itemsize: int) -> int:
    """Return the bytes of a mask for an aligned array."""
    sizes = geometry.Sizes(layout.N, layout.C, layout.S, layout.last, itemsize, True)
    return _mask_size(geometry.sweep(sizes, 1))


def _mask_size(sweep: geometry.Sweep) -> int:
    return -(-sweep.rows // geometry.UNROLL) * sweep.columns * MASK_WORD[sweep.vector]


def normalize(
    y: Any, x: Any, layout: Layout, by: Given, given: Parameters, eps: float, relu: bool
) -> None:
    """Write y, normalized by given statistics."""
    if not x.size:
        return
    device = device_of(x)
    plan = Plan((layout.N, *layout.spatial), (), 1.0)
    residual = None if given.residual is None else layout.flatten(given.residual)
    values = device.empty((ROWS, layout.C), "float64")
    work = Work(device, x, layout, plan, (y, residual), fused=False)
    pointers = {"y": address(y), "x": address(x), "residual": at(residual), "state": address(values)}
    options = f"{_flag(relu)},{_flag(residual is not None)}"
    draws = Draws(device, plan, layout.S)
    _launch_forward(work, pointers, draws, by, given, eps, None, options)


def backward(
    dx: Any, dresidual: Any, dy: Any, saved: Saved, gradient: str
) -> tuple[Any, Any]:
    """Write dx and dresidual, and return dweight and dbias in their parameters' types.

    The exact gradient is one pass over dy and x and a repair of the places drawn; where all are drawn, the
    sums come first and the "repair" is the pass that writes.
    """
    x, layout, plan, state = saved.x, saved.layout, saved.plan, saved.state
    device = device_of(x)
    dweight, dbias = (
        None if p is None else device.empty((layout.C,), borrow(p, "parameter").dtype)
        for p in (saved.weight, saved.bias)
    )
    if not x.size:
        for array in (dweight, dbias):
            if array is not None:
                array[...] = 0
        return dweight, dbias
    masked = state.mask is not None
    asked: tuple[Any, ...] = (dx, dresidual)
    if masked and state.aligned:  # the mask is read in the columns it was written in
        dy = dy if is_aligned(dy) else dy.copy()
        dx, dresidual = (a if is_aligned(a) else device.empty(a.shape, a.dtype) for a in asked)
    through = gradient != "detached" and plan.parts != () and dx is not None
    dense = through and plan.full
    sampled = gradient == "sampled" and plan.parts != () and not plan.full
    work = Work(
        device, x, layout, plan, (dy, dx, dresidual), not (dense or sampled) and plan.apart,
        aligned=state.aligned,
    )  # fmt: skip
    draws = state.draws
    state.work[1:] = [work]
    pointers = {
        "dx": at(dx), "dresidual": at(dresidual), "mask": at(state.mask), "x": address(x),
        "dy": address(dy), "dweight": at(dweight), "dbias": at(dbias), "state": address(state.values),
        "step": at(draws.kept),
    }  # fmt: skip
    elements = sum(
        call.OWN[name] for name, array in (("weight", dweight), ("bias", dbias))
        if array is not None and array.dtype == x.dtype
    )  # fmt: skip
    mode = "MASKED" if masked else "RELU" if saved.relu else "PLAIN"
    parts = draws.parts(plan.parts, plan) if through else call.pack_parts((), plan.S, {})
    if work.fused:
        work.everywhere("backward", mode, pointers, parts, total_scale=1.0, elements=elements)
    else:
        sweep = work.sweep
        read: dict[str, Any] = {"elements": elements, "total_scale": 1.0}
        if sampled:
            pointers["partial"] = work.partial_for(work.places.blocks, layout.C)
            work.at_places("sums_of_places", mode, pointers, draws.parts(plan.parts, plan))
            if dx is not None or dresidual is not None:
                work.everywhere("sums", f"{mode},false", pointers)
            scale = layout.N * layout.S / (1 - plan.prior)
            read |= {"from_places": True, "from_blocks": work.places.blocks, "total_scale": scale}
        else:
            pointers["partial"] = work.partial_for(sweep.blocks, sweep.slots)
            only_sums = pointers | {"dx": 0, "dresidual": 0} if dense else pointers
            work.everywhere("sums", f"{mode},true", only_sums)
            read["from_blocks"] = sweep.blocks
        _repair(work, mode, pointers, draws, parts, dense, plan.apart or not through, read)
    for array, wanted in zip((dx, dresidual), asked, strict=True):
        if array is not wanted:
            wanted[...] = array
    return dweight, dbias


def repair(dx: Any, dy: Any, saved: Saved, dweight: Any, dbias: Any) -> None:
    """Write dx at the places drawn, from the given sums of g and g * xhat over everything."""
    x, layout, plan, state = saved.x, saved.layout, saved.plan, saved.state
    if not x.size or not plan.parts:
        return
    device = device_of(x)
    masked = state.mask is not None
    written = dx
    if masked and state.aligned:  # the mask is read in the columns it was written in
        dy = dy if is_aligned(dy) else dy.copy()
        written = dx if is_aligned(dx) else dx.copy()
    work = Work(device, x, layout, plan, (dy, written), fused=False, aligned=state.aligned)
    draws = state.draws
    state.work[1:] = [work]
    mean, _, rstd, shift = state.values[:4]
    pointers = {
        "dx": address(written), "mask": at(state.mask), "x": address(x), "dy": address(dy),
        "state": address(state.values), "step": at(draws.kept), "partial": work.partial_for(1, layout.C),
    }  # fmt: skip
    work.partial[: layout.C] = widen(dbias)
    work.partial[layout.C :] = widen(dweight) / rstd + (mean - shift) * widen(dbias)
    mode = "MASKED" if masked else "RELU" if saved.relu else "PLAIN"
    read = {"from_places": True, "from_blocks": 1, "total_scale": 1.0}
    parts = draws.parts(plan.parts, plan)
    _repair(work, mode, pointers, draws, parts, plan.full, plan.apart, read)
    if written is not dx:
        dx[...] = written


def _repair(
    work: Work,
    mode: str,
    pointers: dict[str, int],
    draws: Draws,
    parts: bytes,
    dense: bool,
    at_once: bool,
    read: dict[str, Any],
) -> None:
    plan = work.plan
    if dense:
        work.everywhere("repair", mode, pointers, draws.parts(plan.parts, plan, walked=False), **read)
    elif at_once:
        work.at_places("repair_places", mode, pointers, parts, **read)
    else:
        for k, part in enumerate(plan.parts):
            work.at_places("repair_places", mode, pointers, draws.parts((part,), plan), onto=k > 0, **read)


def _launch_forward(
    work: Work,
    pointers: dict[str, int],
    draws: Draws,
    prior: Given | None,
    given: Parameters,
    eps: float,
    running: Running | None,
    options: str,
    count: float = 0.0,
    *,
    write: bool = True,
) -> None:
    plan, layout = work.plan, work.layout
    parameters: dict[str, Any] = {"weight": given.weight, "bias": given.bias}
    if prior is not None:
        parameters |= {"prior_mean": _at_most(prior.mean, work), "prior_var": _at_most(prior.var, work)}
    if running is not None:
        parameters |= {"running_mean": running.mean, "running_var": running.var}
    held = {name: _dense(array) for name, array in parameters.items() if array is not None}
    work.held = held
    for name, array in held.items():
        pointers[name] = address(array)
    elements = sum(call.OWN[name] for name, array in held.items() if array.dtype == work.x.dtype)
    pointers["step"], pointers["step_kept"] = at(draws.step), at(draws.kept)
    numbers: dict[str, Any] = {"prior": plan.prior, "eps": eps, "elements": elements}
    if running is not None:
        numbers |= {
            "momentum": running.factor, "skip_nonfinite": running.skip_nonfinite,
            "unbiased": unbiased(count),
        }  # fmt: skip
    walked = not plan.full
    parts = draws.parts(plan.parts, plan, walked) if plan.prior < 1 else call.pack_parts((), plan.S, {})
    if plan.full:
        numbers["total_scale"] = 1 / (layout.N * layout.S)
    elif plan.prior < 1:
        numbers["total_scale"] = 1 / sum(part.weight for part in plan.parts)
    if draws.addresses:
        _draw(work, pointers, draws, parts)
    if work.fused:
        work.everywhere("forward", options, pointers, parts, **numbers)
    else:
        if plan.prior < 1:
            if plan.full:
                pointers["partial"] = work.partial_for(work.sweep.blocks, work.sweep.slots)
                work.everywhere("sums", "MOMENTS,true", pointers, parts)
                numbers["from_blocks"] = work.sweep.blocks
            else:
                pointers["partial"] = work.partial_for(work.places.blocks, layout.C)
                work.at_places("sums_of_places", "MOMENTS", pointers, parts)
                numbers |= {"from_places": True, "from_blocks": work.places.blocks}
        if not write:  # no rows: what is before them remains
            work.sweep = work.sweep._replace(blocks=1)
            work.geometry = geometry.packed(work.sizes, work.sweep._replace(rows=0), work.places)
        work.everywhere("normalize", options, pointers, parts, **numbers)
    for name in ("running_mean", "running_var"):
        if name in held and held[name] is not parameters[name]:
            parameters[name][...] = held[name]


def _draw(work: Work, pointers: dict[str, int], draws: Draws, parts: bytes) -> None:
    plan = work.plan
    most = max(call.range_size(part, plan.S) for part in plan.parts if call.table_size(part, plan.S))
    work.device.launch("draw", -(-most // 128), 128, call.pack(pointers, work.geometry, parts))


def _of_nothing(values: Any, plan: Plan, prior: Given | None) -> None:
    values[...] = 0
    if prior is not None and plan.prior == 1:
        values[0], values[1] = widen(prior.mean), widen(prior.var)


def _check(plan: Plan) -> None:
    if len(plan.parts) > call.PARTS:
        raise ValueError(f"plan: expected at most {call.PARTS} parts on a GPU, got {len(plan.parts)}")
    if not plan.apart and plan.step is not None:
        raise ValueError("plan: expected parts that share no samples where an array holds the step")


def _at_most(array: Any, work: Work) -> Any:
    """Statistics in float64 beside other elements: the kernels read them in float32."""
    return array.astype("float32") if array.dtype == "float64" and work.type != "double" else array


def _dense(array: Any) -> Any:
    return array if array.strides == (array.itemsize,) or array.size == 1 else array.copy()


def _flag(value: bool) -> str:
    return "true" if value else "false"
