"""What backward needs of a forward, as plain arrays: for frameworks that keep nothing else in between."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from sbncore import checks
from sbncore.arrays import ELEMENT, address, borrow, bytes_in, computable, give, viewed
from sbncore.call import call_for
from sbncore.functional import plan_or_full
from sbncore.layout import layout_of
from sbncore.plans import Plan
from sbncore.saved import Saved, State
from sbncore.signature import ROWS, Signature

WORD = 8  # bytes of a state's values


class Residuals(NamedTuple):
    """A forward's `Saved` in arrays of x's own type, from ``Residuals.of(saved)``.

    Attributes:
        x, weight, bias: forward's own, None where there was none.
        state: (8 * (6 * C + 1),) uint8: the bytes of six float64 values of each channel, and of the step.
        mask: uint8, a bit for each element where an activation follows a residual, else empty.
    """

    x: Any
    weight: Any
    bias: Any
    state: Any
    mask: Any

    @classmethod
    def of(cls, saved: Saved) -> Residuals:
        """Return what a forward has kept; no copy of it where x's framework takes its memory by DLPack.

        Raises:
            TypeError: if it is not what `sbncore.forward` returned.
        """
        if not isinstance(saved, Saved):
            raise TypeError(f"saved: expected what forward returned, got {type(saved).__name__}")
        values, mask = computable(saved.state.values), computable(saved.state.mask)
        state = values.view("u1")
        mask = state[:0] if mask is None else mask
        return cls(saved.like, saved.weight, saved.bias, give(state, saved.like), give(mask, saved.like))

    def saved(
        self,
        *,
        plan: Plan | None = None,
        channel_axis: int = 1,
        activation: str | None = None,
        residual: bool = False,
        gradient: str = "exact",
    ) -> Saved:
        """Return what `sbncore.backward` takes.

        Args:
            plan, channel_axis, activation, gradient: as they were given to forward.
            residual: whether forward was given one.

        Raises:
            ValueError, TypeError: naming the argument, what was expected and what came.
        """
        x = borrow(self.x, "x")
        checks.rank(x, channel_axis)
        plan = plan_or_full(plan, x, channel_axis, fewest=1)
        layout = layout_of(x, channel_axis)
        checks.plan_for(plan, layout, plan.prior > 0, fewest=1)
        checks.gradient_of(gradient, plan.recipe)
        checks.choice(activation, "activation", checks.ACTIVATIONS)
        checks.flag(residual, "residual")
        vectors = {"weight": self.weight, "bias": self.bias}
        views = {name: None if each is None else borrow(each, name) for name, each in vectors.items()}
        for name, view in views.items():
            if view is not None:
                checks.channels(view, name, layout.C, x)
        device, relu, call = None if isinstance(x, np.ndarray) else x.index, activation == "relu", None
        if x.size:
            call = call_for(Signature(layout, ELEMENT[x.dtype], device, plan.recipe, relu, residual))
        state = _bytes(self.state, "state", state_bytes(layout.C)).view("f8")
        mask = _bytes(self.mask, "mask", 0 if call is None else call.mask)
        draw, step = (plan.draw, None) if call is None else call.drawn(plan)
        kept = State(viewed(state), viewed(mask), plan.count, layout.C, draw, step is not None)
        kinds = tuple(None if view is None else view.dtype for view in views.values())
        return Saved(
            self.x,
            layout.flatten(x),
            layout,
            plan,
            kept,
            self.weight,
            self.bias,
            kinds,
            residual,
            relu,
            gradient,
            call,
        )


def state_bytes(C: int) -> int:
    """Return the size of a state of so many channels."""
    return WORD * (ROWS * C + 1)


def _bytes(array: Any, name: str, size: int) -> Any:
    """Return bytes that begin at a multiple of a word's size."""
    found = bytes_in(array, name)
    if found.shape != (size,):
        raise ValueError(f"{name}: expected {size} bytes, as Residuals.of returned, got shape {found.shape}")
    return found.copy() if size and address(viewed(found)) % WORD else found
