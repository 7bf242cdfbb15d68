"""What a GPU does in a call, in order: of checked arguments, over flat device memory.

`sbncore.cpu.phases` has the same functions. Nothing here waits for the device.
"""

from __future__ import annotations

from typing import Any

from sbncore.arrays import address, borrow, element_type, widen
from sbncore.checks import Parameters, Running
from sbncore.cuda import call, geometry
from sbncore.cuda.call import Call, Launch, Numbers, Pointers
from sbncore.cuda.device import Device, device_of
from sbncore.layout import Layout
from sbncore.plans import Plan
from sbncore.saved import ROWS, Kept, Saved
from sbncore.statistics import Given, Moments, unbiased

TYPES = {"float64": "double", "float32": "float", "float16": "float16", "bfloat16": "bfloat16"}
MASK_WORD = {8: 4, 4: 2, 2: 1, 1: 1}  # bytes for UNROLL rows of a column of so many elements
MOST_POSITIONS = 2**30  # of a map: kernels count them in 32 bits


class State:
    """What forward leaves for backward in device memory."""

    def __init__(self, values: Any, count: float, draws: Draws) -> None:
        self.values = values  # (ROWS, C) float64
        self.count = count
        self.draws = draws
        self.mask: Any = None
        self.aligned = True  # the mask's columns: of 16 bytes
        self.memory: dict[str, Any] = {}  # temporary: a captured graph uses it as long as it lives

    @property
    def moments(self) -> Moments:
        return self.values[0], self.values[1], self.count


class Draws:
    """What a plan's parts need in device memory: the step as it was, the few values that are sorted."""

    def __init__(self, device: Device, plan: Plan, kept: Any = None) -> None:
        step = plan.step
        self.step = None if step is None else device.step(step)
        self.kept = None if step is None else device.empty(1, "int64") if kept is None else kept
        self.memory: Any = None
        self.tables: dict[int, int] = {}  # their addresses, by part
        counts = [call.table_size(part, plan.S) for part in plan.parts]
        if any(counts):
            self.memory = device.empty(sum(counts), "int32")
            begin = address(self.memory)
            for k, count in enumerate(counts):
                if count:
                    self.tables[k] = begin
                begin += 4 * count


def moments(x: Any, layout: Layout, plan: Plan, prior: Given | None) -> Moments:
    """Return the moments of the places drawn, mixed with the prior."""
    _check(plan)
    device = device_of(x)
    values = device.empty((ROWS, layout.C), "float64")
    if x.size:
        state = State(values, 0.0, Draws(device, plan))
        prepared = _call(device, x, layout, plan, ())
        _run_forward(device, prepared, [], Pointers(x=address(x)), state, plan, prior, Parameters(), 1.0, x)
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
    state = State(kept.values, plan.count_beside(prior, x.size), Draws(device, plan, kept.step))
    if not x.size:
        _of_nothing(kept.values, plan, prior)
        return state
    residual = None if given.residual is None else layout.flatten(given.residual)
    prepared = _call(device, x, layout, plan, (y, residual))
    if relu and residual is not None:
        size = _mask_size(prepared.writing)
        state.mask = device.empty(size, "uint8") if kept.mask is None else kept.mask
        assert state.mask.size >= size, "the caller's mask is that of an aligned array, and this one is not"
        state.aligned = prepared.sizes.aligned
    pointers = Pointers(y=address(y), x=address(x), residual=_at(residual), mask=_at(state.mask))
    write = [prepared.normalize(relu, residual is not None)]
    _run_forward(device, prepared, write, pointers, state, plan, prior, given, eps, x, running)
    return state


def restored(x: Any, layout: Layout, plan: Plan, kept: Kept) -> State:
    """Return the state that a forward under this plan left in the caller's memory."""
    device = device_of(x)
    draws = Draws(device, plan, kept.step)
    state = State(kept.values, plan.effective_count, draws)
    state.mask = kept.mask
    if draws.tables:
        draws.step = draws.kept
        prepared = _call(device, x, layout, plan, ())
        pointers, keys = Pointers(step=_at(draws.kept)), call.keys_of(plan.parts)
        record = prepared.record(pointers, Numbers(), keys, draws.tables)
        device.launch([call.draw(plan.parts, plan.S)], record)
    return state


def mask_size(layout: Layout, itemsize: int) -> int:
    """Return the bytes of a mask for an aligned array."""
    sizes = geometry.Sizes(layout.N, layout.C, layout.S, layout.last, itemsize, True)
    return _mask_size(geometry.sweep(sizes, 1))


def normalize(
    y: Any, x: Any, layout: Layout, by: Given, given: Parameters, eps: float, relu: bool
) -> None:
    """Write y, normalized by given statistics."""
    if x.size:
        forward(y, x, layout, Plan((layout.N, *layout.spatial), (), 1.0), by, given, eps, relu)


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
        dy = dy if _is_aligned(dy) else dy.copy()
        dx, dresidual = (a if _is_aligned(a) else device.empty(a.shape, a.dtype) for a in asked)
    through = gradient != "detached" and plan.parts != () and dx is not None
    sampled = gradient == "sampled" and plan.parts != () and not plan.full
    prepared = _call(device, x, layout, plan, (dy, dx, dresidual), state.aligned)
    mode = "MASKED" if masked else "RELU" if saved.relu else "PLAIN"
    launches = prepared.sums(mode, over_places=sampled)
    if sampled and dx is None and dresidual is None:
        del launches[1:]
    pointers, numbers = _between(device, prepared, sampled, state, "backward")
    scale = layout.N * layout.S / (1 - plan.prior) if sampled else 1.0
    pointers = pointers._replace(
        dx=_at(dx), dresidual=_at(dresidual), mask=_at(state.mask), x=address(x), dy=address(dy),
        dweight=_at(dweight), dbias=_at(dbias), step=_at(state.draws.kept),
    )  # fmt: skip
    numbers = numbers._replace(
        total_scale=scale, writes=not (through and plan.full),
        elements=_elements({"weight": dweight, "bias": dbias}, x),
    )  # fmt: skip
    record = prepared.record(pointers, numbers, call.keys_of(plan.parts), state.draws.tables)
    launches.append(prepared.finish("backward"))
    _launch_repaired(device, prepared, launches, record, plan, mode if through else None)
    for array, wanted in zip((dx, dresidual), asked, strict=True):
        if array is not wanted:
            wanted[...] = array
    return dweight, dbias


def repair(dx: Any, dy: Any, saved: Saved, dweight: Any, dbias: Any) -> None:
    """Write dx at the places drawn, from the given sums of g and g * xhat over everything."""
    x, layout, plan, state = saved.x, saved.layout, saved.plan, saved.state
    if not x.size or not plan.parts:
        return
    device, C = device_of(x), layout.C
    masked = state.mask is not None
    written = dx
    if masked and state.aligned:  # the mask is read in the columns it was written in
        dy = dy if _is_aligned(dy) else dy.copy()
        written = dx if _is_aligned(dx) else dx.copy()
    prepared = _call(device, x, layout, plan, (dy, written), state.aligned)
    pointers, _ = _between(device, prepared, True, state, "backward")
    mean, _, rstd, shift = state.values[:4]
    sums = state.memory["backward"][16 * C // prepared.real :]
    sums[:C] = widen(dbias)
    sums[C : 2 * C] = widen(dweight) / rstd + (mean - shift) * widen(dbias)
    pointers = pointers._replace(
        dx=address(written), mask=_at(state.mask), x=address(x), dy=address(dy), step=_at(state.draws.kept)
    )
    numbers = Numbers(total_scale=1.0, from_places=True, from_blocks=1)
    record = prepared.record(pointers, numbers, call.keys_of(plan.parts), state.draws.tables)
    mode = "MASKED" if masked else "RELU" if saved.relu else "PLAIN"
    _launch_repaired(device, prepared, [prepared.finish("backward")], record, plan, mode)
    if written is not dx:
        dx[...] = written


def _launch_repaired(
    device: Device, prepared: Call, launches: list[Launch], record: bytes, plan: Plan, mode: str | None
) -> None:
    """Launch what leaves the sums, then the repair in this mode, if any; parts that overlap one by one."""
    if mode is None:
        device.launch(launches, record)
    elif plan.full or plan.apart:
        device.launch([*launches, prepared.repair(mode)], record)
    else:
        device.launch(launches, record)
        for k in range(len(plan.parts)):
            device.launch([prepared.repair(mode)], prepared.of_part(record, k))


def _run_forward(
    device: Device,
    prepared: Call,
    write: list[Launch],
    pointers: Pointers,
    state: State,
    plan: Plan,
    prior: Given | None,
    given: Parameters,
    eps: float,
    x: Any,
    running: Running | None = None,
) -> None:
    """Leave the state of each channel, move the running statistics, and write."""
    arrays: dict[str, Any] = {"weight": given.weight, "bias": given.bias}
    if prior is not None:
        arrays |= {"prior_mean": _at_most(prior.mean, x), "prior_var": _at_most(prior.var, x)}
    if running is not None:
        arrays |= {"running_mean": running.mean, "running_var": running.var}
    held = {name: _dense(array) for name, array in arrays.items() if array is not None}
    state.memory |= held
    draws, launches = state.draws, []
    if draws.tables:
        launches.append(call.draw(plan.parts, plan.S))
    between, numbers = Pointers(), Numbers()
    if plan.prior < 1:
        launches.append(prepared.moments())
        between, numbers = _between(device, prepared, not plan.full, state, "forward")
    total = prepared.sizes.N * prepared.sizes.S if plan.full else sum(part.weight for part in plan.parts)
    numbers = numbers._replace(
        prior=plan.prior, eps=eps, total_scale=1 / total if total else 0.0, elements=_elements(held, x)
    )
    if running is not None:
        numbers = numbers._replace(
            momentum=running.factor, skip_nonfinite=running.skip_nonfinite, unbiased=unbiased(state.count)
        )
    pointers = pointers._replace(
        state=address(state.values), step=_at(draws.step), step_kept=_at(draws.kept),
        partial=between.partial, shift=between.shift, **{name: address(a) for name, a in held.items()},
    )  # fmt: skip
    record = prepared.record(pointers, numbers, call.keys_of(plan.parts), draws.tables)
    device.launch([*launches, prepared.finish("forward"), *write], record)
    for name in ("running_mean", "running_var"):
        if name in held and held[name] is not arrays[name]:
            arrays[name][...] = held[name]


def _call(
    device: Device, x: Any, layout: Layout, plan: Plan, arrays: tuple[Any, ...], aligned: bool = True
) -> Call:
    aligned = aligned and all(map(_is_aligned, (x, *arrays)))
    sizes = geometry.Sizes(layout.N, layout.C, layout.S, layout.last, x.dtype.itemsize, aligned)
    runs = tuple([geometry.runs_of(part, plan.S) for part in plan.parts])
    return call.call_of(sizes, TYPES[element_type(x)], runs, plan.full, device.multiprocessors)


def _between(
    device: Device, prepared: Call, over_places: bool, state: State, direction: str
) -> tuple[Pointers, Numbers]:
    """Allocate what kernels leave for those behind them; return where it is, and how to read it."""
    memory = device.empty(prepared.memory(over_places) // prepared.real, f"float{8 * prepared.real}")
    state.memory[direction] = memory
    pointers = prepared.between(Pointers(state=address(state.values)), address(memory), over_places)
    blocks, _ = prepared.sums_left(over_places)
    return pointers, Numbers(from_places=over_places, from_blocks=blocks)


def _elements(arrays: dict[str, Any], x: Any) -> int:
    """Return the bits of the arrays that are in x's own type."""
    own = [name for name, array in arrays.items() if array is not None and array.dtype == x.dtype]
    return sum(map(call.OWN.__getitem__, own))


def _mask_size(sweep: geometry.Sweep) -> int:
    return -(-sweep.rows // geometry.UNROLL) * sweep.columns * MASK_WORD[sweep.vector]


def _of_nothing(values: Any, plan: Plan, prior: Given | None) -> None:
    values[...] = 0
    if prior is not None and plan.prior == 1:
        values[0], values[1] = widen(prior.mean), widen(prior.var)


def _check(plan: Plan) -> None:
    if len(plan.parts) > call.PARTS:
        raise ValueError(f"plan: expected at most {call.PARTS} parts on a GPU, got {len(plan.parts)}")
    if not plan.apart and plan.step is not None:
        raise ValueError("plan: expected parts that share no samples where an array holds the step")
    if plan.S > MOST_POSITIONS or plan.count >= 2**32:
        raise ValueError(
            "plan: expected at most 2**30 positions of a map and 2**32 values a channel on a GPU, got "
            f"{plan.S} and {plan.count}"
        )


def _at_most(array: Any, x: Any) -> Any:
    """Statistics in float64 beside other elements: the kernels read them in float32."""
    return array.astype("float32") if array.dtype == "float64" and x.dtype != "float64" else array


def _dense(array: Any) -> Any:
    return array if array.strides == (array.itemsize,) or array.size == 1 else array.copy()


def _at(array: Any) -> int:
    """Return an array's address, 0 of none."""
    return 0 if array is None else address(array)


def _is_aligned(array: Any) -> bool:
    """Whether an array allows accesses of 16 bytes; none does."""
    return array is None or address(array) % 16 == 0
