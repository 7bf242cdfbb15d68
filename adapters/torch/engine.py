"""The engine over tensors: memory is torch's own, and so is the stream.

Nothing here waits for a GPU but where a sampler's parts overlap.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sbncore import arguments
from sbncore.adapters.torch.names import named
from sbncore.adapters.torch.tensors import (
    ELEMENTS,
    PARAMETER,
    address,
    dense,
    dense_as,
    empty_like,
    raw_stream,
    vector,
)
from sbncore.arguments import SIGNATURES, Arguments, Options
from sbncore.call import call_for
from sbncore.layout import Layout
from sbncore.plans import Draw, Plan, Recipe
from sbncore.signature import ROWS, Call, Pointers, Scalars, Signature, step_at

Vectors = tuple[Tensor | None, ...]  # weight, bias, running_mean, running_var, prior_mean, prior_var
State = tuple[Tensor, Tensor | None]  # values and the step, the mask
_prepared: dict[Any, Prepared] = {}


class Sample(NamedTuple):
    """A sampler by its name, where it draws, and the fewest values of a channel."""

    sampler: str
    seed: int
    layer: int
    fewest: int = 2


def plan_of(x: Tensor, sample: Sample, step: Tensor | int) -> Plan:
    """Return the plan of a call; a step in a GPU's memory stays there, where the sampler allows it."""
    name, seed, layer, fewest = sample
    recipe = _recipe(name, x.shape, fewest)
    on_device = x.is_cuda and (recipe is None or recipe.disjoint)
    now = step if on_device or isinstance(step, int) else int(step.item())
    if recipe is not None:
        return Plan(recipe, Draw(seed, layer, now))
    plan = named(name).plan(x.shape, seed=seed, layer=layer, step=now, fewest=fewest)
    return plan if plan.recipe.disjoint else plan.now()


@lru_cache(maxsize=SIGNATURES)
def _recipe(sampler: str, shape: torch.Size, fewest: int) -> Recipe | None:
    """Return the recipe that all plans of a sampler and a shape have, or None if each has its own."""
    plan = named(sampler).plan(shape, fewest=fewest)
    return plan.recipe if named(sampler).settled else None


def step_in(state: Tensor) -> Tensor | int:
    """Return the step that a forward left in its state; a GPU's stays there."""
    if state.is_cuda:
        return state[-1:].view(torch.int64)
    return step_at(address(state) + 8 * (state.numel() - 1)).value


class Prepared(NamedTuple):
    """What the checks of tensors such as these have found."""

    call: Call | None  # None for tensors without elements
    layout: Layout  # of x, or of the copy that the engine takes
    direct: bool  # whether the engine takes all tensors as they lie


def prepared(
    x: Tensor, vectors: Vectors, residual: Tensor | None, recipe: Recipe, eps: float, relu: bool
) -> Prepared:
    """Return what is decided for a forward of tensors such as these: found, or checked.

    Raises:
        ValueError: naming the argument.
        RuntimeError: for a dtype or a device that does not fit, as torch.
    """
    tensors = x, residual, *vectors
    key = (recipe, relu, eps, type(eps), *[None if t is None else _look(t) for t in tensors])
    return _prepared.get(key) or _remembered(key, _checked(tensors, recipe, eps, relu))


def _look(tensor: Tensor) -> tuple[Any, ...]:
    """Return what tells a tensor from others, but for its memory."""
    unaligned = tensor.is_cuda and address(tensor) % 16 > 0
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.get_device(), tensor.is_neg(), unaligned


def _remembered(key: Any, found: Prepared) -> Prepared:
    if len(_prepared) >= SIGNATURES:
        _prepared.clear()
    _prepared[key] = found
    return found


def _checked(tensors: Vectors, recipe: Recipe, eps: float, relu: bool) -> Prepared:
    try:
        # a negative view is copied, and what was written to the copy is written back
        x, residual, weight, bias, *others = (None if t is None else t.resolve_neg() for t in tensors)
        views = arguments.borrowed(Arguments(x, weight, bias, residual, None, *others))
        options = Options(eps, activation="relu" if relu else None, fewest=1)
        arguments.checked(views, Plan(recipe), options)
    except TypeError as complaint:
        raise RuntimeError(str(complaint)) from None
    x, residual, *vectors = tensors
    assert x is not None
    held, layout = dense(x)
    call = _call(held, layout, recipe, relu, residual is not None)
    same = held is x and (residual is None or dense_as(residual, x) is residual)
    taken = call is None or all(a is b for a, b in zip(vectors, _taken(vectors, x, call), strict=True))
    return Prepared(call, layout, same and taken)


def _taken(vectors: Sequence[Tensor | None], x: Tensor, call: Call) -> Vectors:
    """Return vectors as the engine takes them, copies if need be."""
    kinds = (PARAMETER[x.dtype],) * 4 + (getattr(torch, call.prior_element),) * 2
    return tuple(vector(each, kind) for each, kind in zip(vectors, kinds, strict=True))


def forward(
    x: Tensor, vectors: Vectors, residual: Tensor | None, plan: Plan, scalars: Scalars, relu: bool,
    writes: bool = True,
) -> tuple[Tensor | None, Tensor, Tensor | None]:  # fmt: skip
    """Return y, the state and the mask, if there are any; move the running statistics among the vectors.

    Raises:
        As `prepared`, before any write.
    """
    ready, held = prepared(x, vectors, residual, plan.recipe, scalars.eps, relu), vectors
    call, C = ready.call, ready.layout.C
    if not ready.direct:
        x, _ = dense(x)
        residual = None if residual is None else dense_as(residual, x)
        held = vectors if call is None else _taken(vectors, x, call)
    new = x.new_empty
    y, state = empty_like(x) if writes else None, new(ROWS * C + 1, dtype=torch.float64)
    if call is None:
        mask = new(0, dtype=torch.uint8) if relu and residual is not None else None
        return y, _of_nothing(state, C, vectors[4:]), mask
    memory = new(call.memory, dtype=torch.uint8) if call.memory else None
    # between a mask's rows lie bytes that nobody writes
    mask = (new if x.is_cuda else x.new_zeros)(call.mask, dtype=torch.uint8) if call.mask else None
    weight, bias, mean, var, prior_mean, prior_var = map(address, held)
    draw, step = plan.draw, 0 if plan.step is None else address(plan.step)
    at = Pointers(
        y=address(y),
        x=address(x),
        residual=address(residual),
        mask=address(mask),
        state=address(state),
        memory=address(memory),
        weight=weight,
        bias=bias,
        running_mean=mean,
        running_var=var,
        prior_mean=prior_mean,
        prior_var=prior_var,
        step=step,
    )
    call.forward(at, draw, scalars, stream_of(x))
    if x.is_cuda and draw is not None and not step:
        state[-1:].view(torch.int64).fill_(draw.step)
    if held is not vectors:
        for tensor, copy in zip(vectors[2:4], held[2:4], strict=True):
            if copy is not tensor and tensor is not None and copy is not None:
                tensor.copy_(copy)
    return y, state, mask


def _differentiated(
    x: Tensor, dy: Tensor, mask: Tensor | None, recipe: Recipe, relu: bool
) -> tuple[Tensor, Tensor, Prepared]:
    """Return x and dy as the engine takes them, and what is decided for a backward of such tensors."""
    residual = mask is not None and mask.numel() > 0
    key = (recipe, relu, residual, _look(x), _look(dy))
    ready = _prepared.get(key)
    if ready is not None and ready.direct:
        return x, dy, ready
    held, layout = dense(x)
    like = dense_as(dy, held)
    call = _call(held, layout, recipe, relu, residual)
    return held, like, _remembered(key, Prepared(call, layout, held is x and like is dy))


def backward(
    dy: Tensor, x: Tensor, state: State, plan: Plan, gradient: str, relu: bool, needs: list[bool]
) -> tuple[Tensor | None, ...]:
    """Return the gradients of x, weight, bias and the residual that are needed, else None.

    Those of the parameters are of the engine's type. The residual's is memory of its own.
    """
    values, mask = state
    x, dy, ready = _differentiated(x, dy, mask, plan.recipe, relu)
    call, C, new, kind = ready.call, ready.layout.C, x.new_empty, PARAMETER[x.dtype]
    dx = empty_like(x) if needs[0] else None
    dresidual = None if not needs[3] else empty_like(x) if relu else dy.clone()
    dweight = new(C, dtype=kind) if needs[1] else None
    dbias = new(C, dtype=kind) if needs[2] else None
    if call is None:
        return dx, *(None if each is None else each.zero_() for each in (dweight, dbias)), dresidual
    memory = new(call.memory, dtype=torch.uint8) if call.memory else None
    at = Pointers(
        dx=address(dx),
        dresidual=address(dresidual) if relu else 0,
        dweight=address(dweight),
        dbias=address(dbias),
        x=address(x),
        dy=address(dy),
        mask=address(mask),
        state=address(values),
        memory=address(memory),
        step=0 if plan.step is None else address(plan.step),
    )
    call.backward(at, plan.draw, gradient, stream_of(x))
    return dx, dweight, dbias, dresidual


def repair(
    dx: Tensor, dy: Tensor, x: Tensor, state: State, plan: Plan, relu: bool, sums: tuple[Tensor, Tensor]
) -> None:
    """`sbncore.repair`, of a dx by `backward` and sums (dweight, dbias) in float64."""
    values, mask = state
    x, dy, ready = _differentiated(x, dy, mask, plan.recipe, relu)
    call = ready.call
    if call is None:
        return
    memory = x.new_empty(call.memory, dtype=torch.uint8)
    sums_ = call.sums_to_repair_by(*sums, values[:-1].view(ROWS, ready.layout.C))
    total = torch.stack(sums_).to(getattr(torch, call.sums_element))
    at = Pointers(
        dx=address(dx),
        x=address(x),
        dy=address(dy),
        mask=address(mask),
        state=address(values),
        memory=address(memory),
        sums=address(total),
        step=0 if plan.step is None else address(plan.step),
    )
    call.repair(at, plan.draw, stream_of(x))


def stream_of(x: Tensor) -> int:
    """Return torch's current stream on a tensor's GPU, 0 on the CPU."""
    return raw_stream(x.get_device()) if x.is_cuda else 0


def _call(x: Tensor, layout: Layout, recipe: Recipe, relu: bool, residual: bool) -> Call | None:
    if not x.numel():
        return None
    device = x.get_device() if x.is_cuda else None
    return call_for(Signature(layout, ELEMENTS[x.dtype], device, recipe, relu, residual))


def _of_nothing(state: Tensor, C: int, prior: Vectors) -> Tensor:
    """Return the state of a tensor without elements: the prior's moments, if there is one."""
    state.zero_()
    for k, each in enumerate(prior):
        if each is not None:
            state[k * C : (k + 1) * C] = each
    return state
