"""Cached calls over CuPy's arrays: checked metadata is reused, only memory is looked at again.

`sbncore.cpu.calls` has the same interface. `sbncore.cuda.phases` takes all else, and gives the same bits.
"""

from __future__ import annotations

from typing import Any

from sbncore.arrays import element_type, give
from sbncore.checks import Parameters, Running
from sbncore.cuda import dense
from sbncore.cuda.call import OWN, Pointers, keys_of
from sbncore.cuda.device import device_of
from sbncore.cuda.phases import Draws, State
from sbncore.layout import Layout
from sbncore.plans import Plan
from sbncore.saved import ROWS, Saved
from sbncore.statistics import Given


def call_of(
    x: Any,
    layout: Layout,
    given: Parameters,
    out: Any,
    relu: bool,
    gradient: str = "exact",
    by: Given | None = None,
    plan: Plan | None = None,
) -> Call | None:
    """Return the call for arguments such as these, checked, or None if the general path is required."""
    same = [layout.lies(array) for array in (x, given.residual, out) if array is not None]
    vectors = [p.flags.c_contiguous for p in (given.weight, given.bias) if p is not None]
    if plan is None or by is not None or not x.size or not all(same + vectors) or not dense.takes(plan):
        return None
    return Call(x, layout, plan, given, relu, gradient)


class Call:
    """Forward and backward over dense arrays of one kind, under plans that differ in their keys alone."""

    def __init__(
        self, x: Any, layout: Layout, plan: Plan, given: Parameters, relu: bool, gradient: str
    ) -> None:
        self.device, self.layout, self.relu, self.gradient = device_of(x), layout, relu, gradient
        self.storage, self.shape, self.strides = x.dtype, x.shape, x.strides
        self.size, self.nbytes = x.size, x.size * x.dtype.itemsize
        self.dense = dense.Dense(
            self.device, layout, element_type(x), x.dtype.itemsize, plan, relu, given.residual is not None
        )
        self.count = plan.effective_count
        both = (("weight", given.weight), ("bias", given.bias))
        self.elements = sum(OWN[name] for name, p in both if p is not None and p.dtype == x.dtype)

    def forward(
        self, x: Any, weight: Any, bias: Any, residual: Any, out: Any, plan: Plan, eps: float,
        running: Running | None,
    ) -> tuple[Any, Saved] | None:  # fmt: skip
        """`sbncore.forward`, or None if the general path is required."""
        if plan.step is not None:
            return None
        dense, C, device = self.dense, self.layout.C, self.device
        y: Any = device.empty(self.size, self.storage) if out is None else out
        inputs = [0 if a is None else a.data.ptr for a in (x, residual, weight, bias)]
        at = y.data.ptr
        if (at | inputs[0] | inputs[1]) % 16:
            return None
        begin, end = at, at + self.nbytes
        if out is not None:  # the residual itself may be written over
            sizes = (self.nbytes, 0 if inputs[1] == at else self.nbytes, 8 * C, 8 * C)
            if any(a and a < end and a + size > begin for a, size in zip(inputs, sizes, strict=True)):
                return None
        moved = [0, 0]
        elements, momentum, skip = self.elements, 0.0, False
        if running is not None:
            arrays: Any = running[:2]
            if any(not a.flags.c_contiguous or a.dtype.kind != "f" for a in arrays):
                return None
            moved, momentum, skip = [a.data.ptr for a in arrays], running.factor, running.skip_nonfinite
            if out is not None and any(a < end and a + 8 * C > begin for a in moved):
                return None
        values = device.empty((ROWS, C), "float64")
        memory = device.empty(dense.memory, "float64")
        mask = device.empty(dense.mask, "uint8") if dense.mask else None
        pointers = Pointers(
            y=at, x=inputs[0], residual=inputs[1], weight=inputs[2], bias=inputs[3],
            mask=0 if mask is None else mask.data.ptr, state=values.data.ptr, running_mean=moved[0],
            running_var=moved[1],
        )  # fmt: skip
        dense.forward(
            None, memory.data.ptr, pointers, keys_of(plan.parts), float(eps), momentum, skip, elements
        )
        state = State(values, self.count, Draws(device, plan))
        state.mask, state.memory = mask, {"forward": memory}
        saved = Saved(
            x, self.layout.flatten(x.view(self.storage)), self.layout, plan, state, weight, bias,
            residual is not None, self.relu, self.gradient, self,
        )  # fmt: skip
        return (give(self.layout.restore(y), x) if out is None else out), saved

    def normalize(self, *arguments: Any) -> None:
        """`sbncore.normalize` takes the general path."""

    def backward(self, dy: Any, saved: Saved, out: Any) -> tuple[Any, Any, Any, Any] | None:
        """`sbncore.backward` of all that forward was given, or None if the general path is required."""
        for array in (dy, out):
            if array is None:
                continue
            if type(array) is not type(saved.like) or array.dtype != saved.like.dtype:
                return None
            if array.shape != self.shape or array.strides != self.strides or array.device != dy.device:
                return None
        if dy.device.id != saved.x.device.id:
            return None
        dense, C, device, state, at = self.dense, self.layout.C, self.device, saved.state, dy.data.ptr
        x = saved.x.data.ptr
        dx = device.empty(self.size, self.storage) if out is None else out
        written = dx.data.ptr
        if (at | x | written) % 16:
            return None
        if any(abs(written - other) < self.nbytes for other in (at, x)):
            return None
        masked = saved.residual and self.relu
        dresidual = device.empty(self.size, self.storage) if masked else None
        dweight, dbias = (None if p is None else device.empty(C, p.dtype) for p in (saved.weight, saved.bias))
        memory = device.empty(dense.memory, "float64")
        state.memory["backward"] = memory
        pointers = Pointers(
            dx=written, dy=at, x=x, state=state.values.data.ptr,
            dresidual=0 if dresidual is None else dresidual.data.ptr,
            mask=0 if state.mask is None else state.mask.data.ptr,
            dweight=0 if dweight is None else dweight.data.ptr, dbias=0 if dbias is None else dbias.data.ptr,
        )  # fmt: skip
        dense.backward(
            None, memory.data.ptr, pointers, keys_of(saved.plan.parts), self.gradient, self.elements
        )
        return (
            give(self.layout.restore(dx), saved.like) if out is None else out, dweight, dbias,
            None if not saved.residual
            else dy if dresidual is None else give(self.layout.restore(dresidual), saved.like),
        )  # fmt: skip

