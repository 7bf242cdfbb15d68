"""Every complaint about an argument: what was expected, what came. All run before anything is written."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np

from sbncore.arrays import PARAMETER, address, borrow, element_type, place
from sbncore.drawing import Sampler, batch_shape, integer, is_array
from sbncore.interchange import LOOKS
from sbncore.layout import Layout
from sbncore.plans import Plan
from sbncore.statistics import Given, Statistics

GRADIENTS = ("exact", "sampled", "detached")
ACTIVATIONS = (None, "relu")
OUTPUTS = ("x", "weight", "bias", "residual")
USUAL = (float, int, str, type(None))  # types of options


def array(value: Any, name: str, channel_axis: int) -> np.ndarray:
    """Return x in its storage type; its rank, axis and dtype are right."""
    view = borrow(value, name)
    if view.ndim < 2:
        raise ValueError(f"{name}: expected (N, C, *spatial), at least 2 axes, got shape {view.shape}")
    batch_shape(view.shape, channel_axis)
    return view


def beside(value: Any, name: str, x: np.ndarray, written: bool = False) -> np.ndarray:
    """Return an array of x's shape and dtype: dy, residual, out."""
    view = _with(x, value, name, written)
    if view.shape != x.shape:
        raise ValueError(f"{name}: expected shape {x.shape} as x, got {view.shape}")
    if view.dtype != x.dtype:
        raise TypeError(f"{name}: expected dtype {element_type(x)} as x, got {element_type(view)}")
    return view


def _with(x: np.ndarray, value: Any, name: str, written: bool = False) -> np.ndarray:
    view = borrow(value, name, written)
    here, there = place(x), place(view)
    if here != there:
        raise TypeError(f"{name}: expected an array on {here} as x, got one on {there}")
    return view


def channels(
    value: Any, name: str, C: int, x: np.ndarray, *others: str, written: bool = False
) -> np.ndarray:
    """Return an array (C,) in the parameters' dtype, in x's own, or in another that may be."""
    view = _with(x, value, name, written)
    if view.shape != (C,):
        raise ValueError(f"{name}: expected shape ({C},) for {C} channels, got {view.shape}")
    kind = element_type(x)
    if element_type(view) not in (PARAMETER[kind], kind, *others):
        allowed = dict.fromkeys((PARAMETER[kind], kind, *others))
        expected = f"{' or '.join(allowed)} beside {element_type(x)}"
        raise TypeError(f"{name}: expected dtype {expected}, got {element_type(view)}")
    return view


def output(
    value: Any,
    x: np.ndarray,
    apart: Iterable[np.ndarray | None],
    same: Iterable[np.ndarray | None] = (),
    name: str = "out",
) -> np.ndarray:
    """Return out, which is as x, writeable and apart from the inputs, but for being one of ``same``."""
    view = beside(value, name, x, written=True)
    if 0 in view.strides and view.size:
        if any(stride == 0 and size > 1 for stride, size in zip(view.strides, view.shape, strict=True)):
            raise ValueError(f"{name}: expected distinct elements, got an array that repeats its memory")
    others = [other for other in same if other is not None and _place(other) != _place(view)]
    if any(_overlap(view, other) for other in (*apart, *others) if other is not None):
        raise ValueError(f"{name}: expected memory apart from the inputs', got an array that overlaps them")
    return view


def separate(running: Running, others: tuple[np.ndarray | None, ...]) -> bool:
    """Return whether running statistics that are to be moved overlap neither one another nor the others."""
    if any(0 in one.strides and one.size > 1 for one in running[:2]):
        return False
    pairs = [(one, other) for one in running[:2] for other in others if other is not None]
    return not any(_overlap(*pair) for pair in ((running.mean, running.var), *pairs))


def likeness(arrays: tuple[Any, ...], *options: Any) -> Any:
    """Return all that checks look at but memory, to know again what passed them.

    None where an array is neither NumPy's own nor CuPy's, or an option of an unusual type.
    """
    looks: list[Any] = []
    for array in arrays:
        look = None if array is None else LOOKS.get(type(array))
        if look is not None:
            looks.append(look(array))
        elif array is not None:
            return None
        else:
            looks.append(None)
    for option in options:
        kind = type(option)
        if kind not in USUAL:
            return None
        looks += kind, option  # 1.0 is equal to 1
    return tuple(looks)


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
    reach = [stride * (size - 1) for stride, size in zip(view.strides, view.shape, strict=True)]
    first = address(view) + sum(min(0, each) for each in reach)
    return first, first + (sum(map(abs, reach)) + view.dtype.itemsize if view.size else 0)


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


def plan_for(plan: Any, layout: Layout, prior: Statistics | None, fewest: int = 2) -> None:
    """Complain unless the plan was drawn for this shape, with values enough, and has the prior it wants."""
    if not isinstance(plan, Plan):
        raise TypeError(f"plan: expected a Plan (sampler.plan(x.shape)), got {type(plan).__name__}")
    outer = (layout.N, *layout.spatial)
    if plan.shape != outer:
        raise ValueError(f"plan: expected one drawn for (N, *spatial) = {outer}, got one for {plan.shape}")
    if prior is not None and not isinstance(prior, Statistics):
        raise TypeError(f"prior: expected Statistics, got {type(prior).__name__}")
    if plan.prior > 0 and prior is None:
        raise ValueError(f"prior: expected Statistics, since the plan gives a prior weight {plan.prior:g}")
    if plan.prior == 0 and prior is not None:
        raise ValueError("prior: expected None, since the plan has no prior (sampler Prior(weight, ...))")
    if layout.N * layout.S and abs(plan.total - 1) > 1e-6:
        raise ValueError(f"plan: expected weights of parts and prior that sum to 1, got {plan.total:g}")
    if 0 < plan.count < fewest and plan.prior == 0:
        raise ValueError("plan: expected more than 1 value per channel when training, got a single one")


def gradient_of(gradient: Any, plan: Plan) -> None:
    """Complain about an unknown gradient, and about sums estimated from virtual samples."""
    choice(gradient, "gradient", GRADIENTS)
    if gradient == "sampled" and plan.virtual:
        raise ValueError("gradient: 'sampled' expects a sample of the batch, got virtual samples beside it")


def needed(needs: Iterable[str] | None, given: tuple[str, ...]) -> tuple[str, ...]:
    """Return the gradients to compute: all that were given to forward, or those asked for."""
    if needs is None:
        return given
    if isinstance(needs, str):
        raise TypeError(f"needs: expected a collection of names, got the string {needs!r}")
    names = tuple(needs)
    for name in names:
        choice(name, "needs", OUTPUTS)
        if name not in given:
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


class Running(NamedTuple):
    """Running statistics that a training call moves, checked, and how far."""

    mean: np.ndarray
    var: np.ndarray
    factor: float
    skip_nonfinite: bool


class Parameters(NamedTuple):
    """weight, bias and residual, checked against x: views of their storage types, or None."""

    weight: np.ndarray | None = None
    bias: np.ndarray | None = None
    residual: np.ndarray | None = None


def parameters(x: np.ndarray, layout: Layout, weight: Any, bias: Any, residual: Any) -> Parameters:
    """Return parameters and residual, checked against x."""
    return Parameters(
        None if weight is None else channels(weight, "weight", layout.C, x),
        None if bias is None else channels(bias, "bias", layout.C, x),
        None if residual is None else beside(residual, "residual", x),
    )


def given(statistics: Statistics, C: int, x: np.ndarray) -> Given:
    """Return given statistics, checked against x."""
    mean, var = (
        channels(value, name, C, x, "float64")
        for value, name in ((statistics.mean, "mean"), (statistics.var, "var"))
    )
    return Given(mean, var, statistics.count)
