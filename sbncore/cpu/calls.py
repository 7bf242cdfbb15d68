"""Cached calls over NumPy's arrays: checked metadata is reused, only memory is checked again.

A large call finds Python's own objects out of the caches, where each costs ten times what it does in a loop.
The long way (`sbncore.functional`, `sbncore.cpu.phases`) takes all else, and gives the same bits.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from sbncore.arrays import empty_like, give
from sbncore.checks import Parameters, Running
from sbncore.cpu import draws, engine
from sbncore.cpu.phases import State, absent
from sbncore.layout import Layout
from sbncore.plans import Plan, Runs
from sbncore.saved import ROWS, Saved
from sbncore.statistics import Given, unbiased


def call_of(
    x: np.ndarray,
    layout: Layout,
    given: Parameters,
    out: Any,
    relu: bool,
    gradient: str = "exact",
    by: Given | None = None,
    plan: Plan | None = None,
) -> Call | None:
    """Return the call for arguments such as these, checked, or None where each must go the long way."""
    likes = [layout.lies(array) for array in (x, given.residual, out) if array is not None]
    vectors = given.weight, given.bias, *((by.mean, by.var) if by else ())
    floats = [p.flags.c_contiguous and p.dtype.kind == "f" for p in vectors if p is not None]
    if not x.size or not all(likes + floats):
        return None
    return Call(x, layout, given.residual is not None, relu, gradient)


class Call:
    """Forward and backward over dense arrays alike, under plans that differ in their keys alone."""

    def __init__(
        self, x: np.ndarray, layout: Layout, residual: bool, relu: bool, gradient: str
    ) -> None:
        self.layout, self.relu, self.gradient = layout, relu, gradient
        self.engine, self.C = engine.of(layout), layout.C
        self.shape, self.strides, self.storage, self.order = x.shape, x.strides, x.dtype, layout.order
        self.mask_size = engine.mask_size(layout) if relu and residual else 0
        self.absent = absent(x)
        self.scale = float(layout.N * layout.S) if gradient == "sampled" else 0.0

    def flat(self, array: np.ndarray) -> np.ndarray:
        """Return the memory of an array of this call's, flat."""
        if array.dtype is not self.storage:
            array = array.view(self.storage)
        return (array if self.order is None else array.transpose(self.order)).reshape(-1)

    def forward(
        self,
        x: np.ndarray,
        weight: np.ndarray | None,
        bias: np.ndarray | None,
        residual: np.ndarray | None,
        out: np.ndarray | None,
        plan: Plan,
        eps: float,
        running: Running | None,
    ) -> tuple[Any, Saved] | None:
        """`sbncore.forward`, or None where the long way must look closer."""
        beside = () if running is None else running[:2]
        if plan.step is not None or not plain((x, weight, bias, residual, *beside), out):
            return None
        count, beside, moved = plan.effective_count, (self.absent, self.absent), (0.0, 1.0, False)
        if running is not None:
            beside, moved = running[:2], (running.factor, unbiased(count), running.skip_nonfinite)
            if not (beside[0].flags.carray and beside[1].flags.carray):
                return None
        flat, runs, values = self.flat(x), draws.runs_of(plan), np.empty((ROWS, self.C))
        mask = np.empty(self.mask_size, np.uint8) if self.mask_size else None
        y = self.write(
            x, flat, weight, bias, residual, out, values, mask,
            (self.absent, self.absent, 0.0, float(eps), *beside, *moved), runs, plan.full, 1.0,
        )  # fmt: skip
        saved = Saved(
            x, flat, self.layout, plan, State(plan, runs, values, mask, count), weight, bias,
            residual is not None, self.relu, self.gradient, self,
        )  # fmt: skip
        return y, saved

    def normalize(
        self,
        x: np.ndarray,
        mean: np.ndarray,
        var: np.ndarray,
        weight: np.ndarray | None,
        bias: np.ndarray | None,
        residual: np.ndarray | None,
        out: np.ndarray | None,
        eps: float,
    ) -> Any:
        """`sbncore.normalize`, or None where the long way must look closer."""
        if not plain((x, mean, var, weight, bias, residual), out):
            return None
        absent = self.absent
        return self.write(
            x, self.flat(x), weight, bias, residual, out, np.empty((ROWS, self.C)), None,
            (mean, var, 1.0, float(eps), absent, absent, 0.0, 1.0, False), engine.NOWHERE, False, 0.0,
        )  # fmt: skip

    def write(
        self,
        x: np.ndarray,
        flat: np.ndarray,
        weight: np.ndarray | None,
        bias: np.ndarray | None,
        residual: np.ndarray | None,
        out: np.ndarray | None,
        values: np.ndarray,
        mask: np.ndarray | None,
        rest: tuple[Any, ...],
        runs: Runs,
        full: bool,
        weigh: float,
    ) -> Any:
        """Run the engine's forward and return y; ``rest`` are its parameters behind weight and bias."""
        y, absent = empty_like(flat) if out is None else self.flat(out), self.absent
        weight, bias = (absent if p is None else p for p in (weight, bias))
        self.engine.forward(
            y, flat, None if residual is None else self.flat(residual), values, mask,
            engine.Channels(weight, bias, *rest), self.relu, runs, full, weigh,
        )  # fmt: skip
        return give(self.layout.restore(y), x) if out is None else out

    def backward(self, dy: Any, saved: Saved, out: Any) -> tuple[Any, Any, Any, Any] | None:
        """`sbncore.backward` of all that forward was given, or None where the long way must look closer."""
        for array in (dy, out):
            if array is None:
                continue
            if type(array) is not np.ndarray or array.dtype != saved.like.dtype or not array.flags.behaved:
                return None
            if array.shape != self.shape or array.strides != self.strides:
                return None
        if out is not None and (np.may_share_memory(out, dy) or np.may_share_memory(out, saved.x)):
            return None
        x, state, C = saved.x, saved.state, self.C
        dx = empty_like(x) if out is None else self.flat(out)
        dresidual = empty_like(x) if saved.residual and self.relu else None
        dweight, dbias = (
            self.absent if p is None else np.empty(C, p.dtype) for p in (saved.weight, saved.bias)
        )
        detached = self.gradient == "detached"
        self.engine.backward(
            dx, dresidual, self.flat(dy), x, state.mask, state.values, np.empty((2, C)), dweight, dbias,
            self.relu, engine.NOWHERE if detached else state.runs, saved.plan.full, self.scale,
        )  # fmt: skip
        return (
            give(self.layout.restore(dx), saved.like) if out is None else out,
            None if saved.weight is None else dweight,
            None if saved.bias is None else dbias,
            None if not saved.residual
            else dy if dresidual is None else give(self.layout.restore(dresidual), saved.like),
        )  # fmt: skip


def plain(inputs: tuple[np.ndarray | None, ...], out: np.ndarray | None) -> bool:
    """Whether all are aligned and writeable, and out overlaps none of them."""
    for array in inputs:
        if array is not None:
            if not array.flags.behaved or (out is not None and np.may_share_memory(array, out)):
                return False
    return out is None or bool(out.flags.behaved)
