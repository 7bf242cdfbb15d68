"""Every complaint about an argument: what was expected, what came. All run before anything is written."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import Any

import numpy as np

from sbncore.arrays import PARAMETER, address, element_type, place
from sbncore.drawing import Sampler, batch_shape, integer, is_array
from sbncore.layout import Layout
from sbncore.plans import Plan, Recipe

GRADIENTS = ("exact", "sampled", "detached")
ACTIVATIONS = (None, "relu")
OUTPUTS = ("x", "weight", "bias", "residual")


def rank(x: np.ndarray, channel_axis: int, name: str = "x") -> None:
    """Complain unless x has axes for samples and channels."""
    if x.ndim < 2:
        raise ValueError(f"{name}: expected (N, C, *spatial), at least 2 axes, got shape {x.shape}")
    batch_shape(x.shape, channel_axis)


def same_as(view: np.ndarray, name: str, x: np.ndarray) -> None:
    """Complain unless an array is of x's shape, dtype and device: dy, residual, out."""
    _on_device(view, name, x)
    if view.shape != x.shape:
        raise ValueError(f"{name}: expected shape {x.shape} as x, got {view.shape}")
    if view.dtype != x.dtype:
        raise TypeError(f"{name}: expected dtype {element_type(x)} as x, got {element_type(view)}")


def _on_device(view: np.ndarray, name: str, x: np.ndarray) -> None:
    here, there = place(x), place(view)
    if here != there:
        raise TypeError(f"{name}: expected an array on {here} as x, got one on {there}")


def channels(view: np.ndarray, name: str, C: int, x: np.ndarray, *others: str) -> None:
    """Complain unless an array is (C,), in the parameters' dtype, in x's own, or in another that may be."""
    _on_device(view, name, x)
    if view.shape != (C,):
        hint = ""
        if x.ndim > 2 and view.shape == x.shape[-1:]:
            hint = f"; x of shape {x.shape} has {x.shape[-1]} channels where channel_axis=-1"
        raise ValueError(f"{name}: expected shape ({C},) for {C} channels, got {view.shape}{hint}")
    kind = element_type(x)
    if element_type(view) not in (PARAMETER[kind], kind, *others):
        allowed = dict.fromkeys((PARAMETER[kind], kind, *others))
        expected = f"{' or '.join(allowed)} beside {element_type(x)}"
        raise TypeError(f"{name}: expected dtype {expected}, got {element_type(view)}")


def output(view: np.ndarray, x: np.ndarray, name: str = "out") -> None:
    """Complain unless an array to be written is as x, of distinct elements."""
    same_as(view, name, x)
    if 0 in view.strides and view.size:
        if any(stride == 0 and size > 1 for stride, size in zip(view.strides, view.shape, strict=True)):
            raise ValueError(f"{name}: expected distinct elements, got an array that repeats its memory")


def no_overlap(
    view: np.ndarray,
    inputs: Iterable[np.ndarray | None],
    same: Iterable[np.ndarray | None] = (),
    name: str = "out",
) -> None:
    """Complain if an array to be written overlaps inputs, but for being one of ``same``."""
    others = [other for other in same if other is not None and _place(other) != _place(view)]
    if any(_overlap(view, other) for other in (*inputs, *others) if other is not None):
        raise ValueError(f"{name}: expected memory apart from the inputs', got an array that overlaps them")


def no_overlap_of_running(moved: tuple[np.ndarray, np.ndarray], others: Iterable[np.ndarray | None]) -> None:
    """Complain if running statistics that are to be moved overlap one another or the others."""
    mean, var = moved
    pairs = [(one, other) for one in moved for other in others if other is not None]
    repeats = any(0 in one.strides and one.size > 1 for one in moved)
    if repeats or any(_overlap(*pair) for pair in ((mean, var), *pairs)):
        raise ValueError(
            "running_mean, running_var: expected memory of their own, got arrays that repeat it, or overlap "
            "each other or another argument"
        )


def _overlap(a: np.ndarray, b: np.ndarray) -> bool:
    if not isinstance(a, np.ndarray):
        (first, last), (begin, end) = _bounds(a), _bounds(b)
        return first < end and begin < last
    if not np.may_share_memory(a, b):  # ten times as quick
        return False
    try:
        return np.shares_memory(a, b, max_work=10_000)  # type: ignore[arg-type]
    except np.exceptions.TooHardError:
        return True


def _bounds(view: np.ndarray) -> tuple[int, int]:
    below, above = _reach(view.shape, view.strides, view.dtype.itemsize)
    begin = address(view)
    return begin + below, begin + above


@lru_cache(maxsize=4096)
def _reach(shape: tuple[int, ...], strides: tuple[int, ...], itemsize: int) -> tuple[int, int]:
    """Return the bytes before and behind an array's address that its elements reach."""
    if 0 in shape:
        return 0, 0
    reach = [stride * (size - 1) for stride, size in zip(strides, shape, strict=True)]
    return sum(min(0, each) for each in reach), sum(max(0, each) for each in reach) + itemsize


def _place(view: np.ndarray) -> tuple[Any, ...]:
    return address(view), view.shape, view.strides


def epsilon(value: Any, statistics_are_given: bool) -> float:
    """Return eps as a float: positive, or at least not negative where no variance is estimated."""
    if isinstance(value, bool) or not isinstance(value, int | float | np.floating):
        raise TypeError(f"eps: expected a number, got {value!r}")
    if not math.isfinite(value) or value < 0 or (value == 0 and not statistics_are_given):
        raise ValueError(f"eps: expected a positive number, got {value!r}")
    return float(value)


def choice(value: Any, name: str, choices: tuple[Any, ...]) -> None:
    """Complain unless value is one of the choices."""
    if value not in choices:
        raise ValueError(f"{name}: expected one of {choices}, got {value!r}")


def plan_for(plan: Plan, layout: Layout, prior: bool, fewest: int = 2) -> None:
    """Complain unless the plan was drawn for this shape, with values enough, and has the prior it wants."""
    outer = (layout.N, *layout.spatial)
    if plan.shape != outer:
        raise ValueError(f"plan: expected one drawn for (N, *spatial) = {outer}, got one for {plan.shape}")
    if plan.prior > 0 and not prior:
        raise ValueError(f"prior: expected Statistics, since the plan gives a prior weight {plan.prior:g}")
    if plan.prior == 0 and prior:
        raise ValueError("prior: expected None, since the plan has no prior (sampler Prior(weight, ...))")
    if layout.N * layout.S and abs(plan.recipe.total - 1) > 1e-6:
        raise ValueError(
            f"plan: expected weights of parts and prior that sum to 1, got {plan.recipe.total:g}"
        )
    if 0 < plan.count < fewest and plan.prior == 0:
        raise ValueError("plan: expected more than 1 value per channel when training, got a single one")


def gradient_of(gradient: Any, recipe: Recipe) -> None:
    """Complain about an unknown gradient, and about sums estimated from virtual samples."""
    choice(gradient, "gradient", GRADIENTS)
    if gradient == "sampled" and recipe.virtual:
        raise ValueError("gradient: 'sampled' expects a sample of the batch, got virtual samples beside it")


def needed(needs: Iterable[str] | None, allowed: tuple[str, ...]) -> tuple[str, ...]:
    """Return the gradients to compute: all that were given to forward, or those asked for."""
    if needs is None:
        return allowed
    if isinstance(needs, str):
        raise TypeError(f"needs: expected a collection of names, got the string {needs!r}")
    names = tuple(needs)
    for name in names:
        choice(name, "needs", OUTPUTS)
        if name not in allowed:
            raise ValueError(f"needs: {name!r} was not given to forward")
    return names


def momentum_of(momentum: Any, step: Any) -> float:
    """Return the weight of the new statistics; None averages all steps so far alike."""
    if momentum is None:
        if is_array(step):
            raise ValueError("momentum: expected a number where an array holds the step, got None")
        if integer("step", step) < 0:
            raise ValueError(f"step: expected at least 0 for a cumulative average, got {step}")
        return 1 / (step + 1)
    return _fraction(momentum)


def _fraction(momentum: Any) -> float:
    if isinstance(momentum, bool) or not isinstance(momentum, int | float | np.floating):
        raise TypeError(f"momentum: expected a number or None, got {momentum!r}")
    if not 0 <= momentum <= 1:
        raise ValueError(f"momentum: expected a number in [0, 1], got {momentum!r}")
    return float(momentum)


def _sampler(value: Any) -> Sampler:
    if not isinstance(value, Sampler):
        raise TypeError(f"sampler: expected a Sampler, got {type(value).__name__}")
    return value


def _chosen(value: Any, name: str, choices: tuple[Any, ...]) -> Any:
    choice(value, name, choices)
    return value


def flag(value: Any, name: str) -> bool:
    """Return a yes or no; 1 and "no" are none."""
    if not isinstance(value, bool | np.bool_):
        raise TypeError(f"{name}: expected True or False, got {value!r}")
    return bool(value)


# Each option's rule: it returns the value as the engine takes it, or raises ValueError or TypeError.
OPTIONS: dict[str, Callable[[Any], Any]] = {
    "eps": lambda value: epsilon(value, statistics_are_given=True),
    "momentum": lambda value: None if value is None else _fraction(value),
    "sampler": _sampler,
    "gradient": lambda value: _chosen(value, "gradient", GRADIENTS),
    "activation": lambda value: _chosen(value, "activation", ACTIVATIONS),
    "seed": lambda value: integer("seed", value),
    "layer": lambda value: integer("layer", value),
    "skip_nonfinite": lambda value: flag(value, "skip_nonfinite"),
}


def gradient_for(gradient: str, sampler: Sampler) -> None:
    """Complain about sums estimated from virtual samples."""
    if gradient == "sampled" and sampler.virtual:
        raise ValueError("gradient: 'sampled' expects a sample of the batch, got virtual samples too")
