"""The arrays and options of a forward: borrowed, checked once for each signature, and the Call they lead to.

What depends on memory (overlap, alignment, writability) is looked at in every call; all else was decided when
the Call was found.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from sbncore import checks
from sbncore.arrays import ELEMENT, PARAMETER, borrow, look, vector
from sbncore.call import call_for
from sbncore.layout import Layout, layout_of
from sbncore.plans import Plan
from sbncore.signature import Call, Signature

SIGNATURES = 4096  # that are remembered
VECTORS = ("running_mean", "running_var", "weight", "bias", "prior_mean", "prior_var")


class Arguments(NamedTuple):
    """The arrays of a forward: the caller's, or the engines' views of them. None where absent."""

    x: Any
    weight: Any = None
    bias: Any = None
    residual: Any = None
    out: Any = None
    running_mean: Any = None
    running_var: Any = None
    prior_mean: Any = None
    prior_var: Any = None


class Options(NamedTuple):
    """The options of a forward."""

    eps: Any = 1e-5
    channel_axis: Any = 1
    activation: Any = None
    gradient: Any = "exact"
    fewest: int = 2  # values per channel
    in_place: bool = False  # whether out may be x itself


class Prepared(NamedTuple):
    """What a signature's checks have found."""

    call: Call | None  # None for arrays without elements
    layout: Layout
    parameter: str  # element type of parameters
    eps: float
    copied: frozenset[str]  # arguments that the engine cannot take as they lie


NAMES = tuple(name.removeprefix("prior_") for name in Arguments._fields)
WRITTEN = tuple(name in ("out", "running_mean", "running_var") for name in Arguments._fields)
_prepared: dict[Any, Prepared] = {}


def borrowed(arguments: Arguments) -> Arguments:
    """Return views of the caller's arrays, in their storage types.

    Raises:
        TypeError, ValueError: as `sbncore.arrays.borrow`.
    """
    return Arguments(
        *[
            borrow(array, name, written) if array is not None or name == "x" else None
            for array, name, written in zip(arguments, NAMES, WRITTEN, strict=True)
        ]
    )


def prepared(views: Arguments, plan: Plan, options: Options) -> Prepared:
    """Return what is decided for arrays such as these, a plan's recipe and options: found, or checked.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    looks = [None if view is None else look(view) for view in views]
    # 1.0 is equal to 1, and 1 to True
    key = (options, type(options.eps), type(options.channel_axis), plan.recipe, *looks)
    try:
        found = _prepared.get(key)
    except TypeError:  # an option that nothing is found by, and that is refused
        return checked(views, plan, options)
    if found is None:
        found = checked(views, plan, options)
        if len(_prepared) >= SIGNATURES:
            _prepared.clear()
        _prepared[key] = found
    return found


def checked(views: Arguments, plan: Plan, options: Options) -> Prepared:
    """Do what `prepared` does where nothing is found."""
    x, has_prior = views.x, views.prior_mean is not None
    checks.rank(x, options.channel_axis)
    layout = layout_of(x, options.channel_axis)
    checks.plan_for(plan, layout, has_prior, options.fewest)
    checks.gradient_of(options.gradient, plan.recipe)
    checks.choice(options.activation, "activation", checks.ACTIVATIONS)
    eps = checks.epsilon(options.eps, statistics_are_given=plan.prior == 1)
    for name in VECTORS:
        view = getattr(views, name)
        if view is not None:
            wide = ("float64",) if name.startswith("prior") else ()
            checks.channels(view, name.removeprefix("prior_"), layout.C, x, *wide)
    if views.residual is not None:
        checks.same_as(views.residual, "residual", x)
    if views.out is not None:
        checks.output(views.out, x)
    element, call = ELEMENT[x.dtype], None
    if x.size:
        device = None if isinstance(x, np.ndarray) else x.index
        relu, residual = options.activation == "relu", views.residual is not None
        call = call_for(Signature(layout, element, device, plan.recipe, relu, residual))
    parameter = PARAMETER[element]
    arrays = (name for name in ("x", "residual", "out") if getattr(views, name) is not None)
    copied = [name for name in arrays if not layout.lies(getattr(views, name))]
    for name in VECTORS:
        view, wanted = getattr(views, name), parameter
        if name.startswith("prior") and call is not None:
            wanted = call.prior_element
        if view is not None and vector(view, wanted) is not view:
            copied.append(name)
    return Prepared(call, layout, parameter, eps, frozenset(copied))


def check_memory(views: Arguments, in_place: bool) -> None:
    """Complain about arrays to be written that overlap others.

    Raises:
        ValueError: naming what is to be written.
    """
    x, weight, bias, residual, out, mean, var, *prior = views
    if mean is not None:
        checks.no_overlap_of_running((mean, var), (x, weight, bias, residual))
    if out is not None:
        same = (x, residual) if in_place else (residual,)
        inputs = weight, bias, *prior, mean, var
        checks.no_overlap(out, inputs if in_place else (x, *inputs), same)


def dense_vectors(views: Arguments, prepared: Prepared) -> Arguments:
    """Return the arguments with vectors as the engine takes them."""
    call, copies = prepared.call, {}
    for name in prepared.copied.intersection(VECTORS):
        kind = prepared.parameter
        if name.startswith("prior") and call is not None:
            kind = call.prior_element
        copies[name] = vector(getattr(views, name), kind)
    return views._replace(**copies)
