"""The engine over tensors: memory is torch's own, and so is the stream.

Nothing here waits for a GPU but where a sampler's parts overlap.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sbncore import arguments
from sbncore.adapters.torch.names import named
from sbncore.adapters.torch.tensors import ELEMENTS, PARAMETER, address, dense, dense_as, empty_like, vector
from sbncore.arguments import SIGNATURES, Arguments, Options
from sbncore.call import call_for
from sbncore.layout import Layout
from sbncore.plans import Draw, Plan, Recipe
from sbncore.signature import ROWS, Call, Pointers, Scalars, Signature, step_at

Vectors = tuple[Tensor | None, ...]  # weight, bias, running_mean, running_var, prior_mean, prior_var
State = tuple[Tensor, Tensor]  # values and the step, the mask
_passed: set[Any] = set()


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
    on_device = x.is_cuda and (recipe is None or recipe.apart)
    now = step if on_device or isinstance(step, int) else int(step.item())
    if recipe is not None:
        return Plan(recipe, Draw(seed, layer, now))
    plan = named(name).plan(x.shape, seed=seed, layer=layer, step=now, fewest=fewest)
    return plan if plan.recipe.apart else plan.now()


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


def check(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None,
    running_mean: Tensor | None, running_var: Tensor | None, recipe: Recipe, eps: float, relu: bool,
) -> None:  # fmt: skip
    """Complain about what the engine does not take; what has passed once is not checked again.

    Raises:
        ValueError: naming the argument.
        RuntimeError: for a dtype or a device that does not fit, as torch.
    """
    tensors = x, weight, bias, residual, running_mean, running_var
    looks = [None if t is None else (t.shape, t.dtype, t.get_device()) for t in tensors]
    key = (*looks, recipe, type(eps), eps, relu)
    if key in _passed:
        return
    prior = (running_mean, running_var) if recipe.prior > 0 else (None, None)
    try:
        given = x, weight, bias, residual, None, running_mean, running_var, *prior
        # a negative view is copied, and what was written to the copy is written back
        views = arguments.borrowed(Arguments(*[None if t is None else t.resolve_neg() for t in given]))
        options = Options(eps, activation="relu" if relu else None, fewest=1)
        arguments.checked(views, Plan(recipe), options)
    except TypeError as complaint:
        raise RuntimeError(str(complaint)) from None
    if len(_passed) >= SIGNATURES:
        _passed.clear()
    _passed.add(key)


def forward(
    x: Tensor, vectors: Vectors, residual: Tensor | None, plan: Plan, scalars: Scalars, relu: bool,
    writes: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return y, the state and the mask; move the running statistics among the vectors."""
    x, layout = dense(x)
    new, C = x.new_empty, layout.C
    y, state = empty_like(x) if writes else new(0), new(ROWS * C + 1, dtype=torch.float64)
    if not x.numel():
        return y, _of_nothing(state, C, vectors[4:]), new(0, dtype=torch.uint8)
    call = _call(x, layout, plan.recipe, relu, residual is not None)
    added = None if residual is None else dense_as(residual, x)
    kinds = (PARAMETER[x.dtype],) * 4 + (getattr(torch, call.prior_element),) * 2
    held = [vector(each, kind) for each, kind in zip(vectors, kinds, strict=True)]
    memory = new(call.memory, dtype=torch.uint8) if call.memory else None
    # between a mask's rows lie bytes that nobody writes
    mask = (new if x.is_cuda else x.new_zeros)(call.mask, dtype=torch.uint8)
    weight, bias, *moved, prior_mean, prior_var = map(address, held)
    draw, step = plan.draw, 0 if plan.step is None else address(plan.step)
    at = Pointers(
        y=address(y), x=address(x), residual=address(added), mask=address(mask), state=address(state),
        memory=address(memory), weight=weight, bias=bias, running_mean=moved[0], running_var=moved[1],
        prior_mean=prior_mean, prior_var=prior_var, step=step,
    )  # fmt: skip
    call.forward(at, draw, scalars, stream_of(x))
    if x.is_cuda and draw is not None and not step:
        state[-1:].view(torch.int64).fill_(draw.step)
    for tensor, copy in zip(vectors[2:4], held[2:4], strict=True):
        if copy is not tensor and tensor is not None and copy is not None:
            tensor.copy_(copy)
    return y, state, mask


def backward(
    dy: Tensor, x: Tensor, state: State, plan: Plan, gradient: str, relu: bool, needs: list[bool]
) -> tuple[Tensor | None, ...]:
    """Return the gradients of x, weight, bias and the residual that are needed, else None.

    Those of the parameters are of the engine's type. The residual's is memory of its own.
    """
    x, layout = dense(x)
    dy = dense_as(dy, x)
    new, C, (values, mask) = x.new_empty, layout.C, state
    dx = empty_like(x) if needs[0] else None
    dresidual = None if not needs[3] else empty_like(x) if relu else dy.clone()
    sums = [new(C, dtype=PARAMETER[x.dtype]) if needed else None for needed in needs[1:3]]
    if not x.numel():
        return dx, *(None if each is None else each.zero_() for each in sums), dresidual
    call = _call(x, layout, plan.recipe, relu, mask.numel() > 0)
    memory = new(call.memory, dtype=torch.uint8) if call.memory else None
    at = Pointers(
        dx=address(dx), dresidual=address(dresidual) if relu else 0, dweight=address(sums[0]),
        dbias=address(sums[1]), x=address(x), dy=address(dy), mask=address(mask), state=address(values),
        memory=address(memory), step=0 if plan.step is None else address(plan.step),
    )  # fmt: skip
    call.backward(at, plan.draw, gradient, stream_of(x))
    return dx, *sums, dresidual


def repair(
    dx: Tensor, dy: Tensor, x: Tensor, state: State, plan: Plan, relu: bool, sums: tuple[Tensor, Tensor]
) -> None:
    """`sbncore.repair`, of a dx by `backward` and sums (dweight, dbias) in float64."""
    x, layout = dense(x)
    if not x.numel():
        return
    values, mask = state
    call = _call(x, layout, plan.recipe, relu, mask.numel() > 0)
    dy, memory = dense_as(dy, x), x.new_empty(call.memory, dtype=torch.uint8)
    given = call.given(*sums, values[:-1].view(ROWS, layout.C))
    total = torch.stack(given).to(getattr(torch, call.sums_element))
    at = Pointers(
        dx=address(dx), x=address(x), dy=address(dy), mask=address(mask), state=address(values),
        memory=address(memory), sums=address(total), step=0 if plan.step is None else address(plan.step),
    )  # fmt: skip
    call.repair(at, plan.draw, stream_of(x))


def stream_of(x: Tensor) -> int:
    """Return torch's current stream on a tensor's GPU, 0 on the CPU."""
    return torch.cuda.current_stream(x.device).cuda_stream if x.is_cuda else 0


def _call(x: Tensor, layout: Layout, recipe: Recipe, relu: bool, residual: bool) -> Call:
    device = x.get_device() if x.is_cuda else None
    return call_for(Signature(layout, ELEMENTS[x.dtype], device, recipe, relu, residual))


def _of_nothing(state: Tensor, C: int, prior: Vectors) -> Tensor:
    """Return the state of a tensor without elements: the prior's moments, if there is one."""
    state.zero_()
    for k, each in enumerate(prior):
        if each is not None:
            state[k * C : (k + 1) * C] = each
    return state
