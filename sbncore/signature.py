"""What stands between framework code and an engine: the Signature of a call, its Call, addresses, numbers.

Framework code (`sbncore.functional`, the PyTorch adapter) checks its arrays, allocates the results and hands
over addresses. A Call of `sbncore.cpu` or `sbncore.cuda` holds the kernels and the record that they read; to
run it is to fill addresses and the draw into a copy of the record. Both have the same methods::

    forward(at, draw, scalars, stream)      y, state, mask, and the moved running statistics
    backward(at, draw, gradient, stream)    dx, dresidual, dweight, dbias
    repair(at, draw, stream)                dx at the sampled elements, from given sums
"""

from __future__ import annotations

import ctypes
from typing import Any, NamedTuple, Protocol

from sbncore.layout import Layout
from sbncore.plans import Draw, Plan, Recipe

ROWS = 6  # of a state: mean, var, rstd, shift, scale, offset of each channel, in float64


class Signature(NamedTuple):
    """What decides a call over dense arrays but for its memory and its draw."""

    layout: Layout
    element: str  # "float64", "float32", "float16" or "bfloat16"
    device: int | None  # the index of a GPU; None is the CPU
    recipe: Recipe
    relu: bool
    residual: bool


class Pointers(NamedTuple):
    """Addresses, 0 of what is absent: of dense arrays in the call's layout, and vectors of C values.

    Vectors are of the type of parameters, but the prior's, which are of the call's ``prior_element``.
    """

    y: int = 0
    dx: int = 0
    dresidual: int = 0
    mask: int = 0  # of the call's size, in bytes
    dweight: int = 0
    dbias: int = 0
    running_mean: int = 0
    running_var: int = 0
    state: int = 0  # (ROWS, C) float64, and the step drawn at in int64 behind it
    memory: int = 0  # of the call's size, in bytes: temporary
    x: int = 0
    dy: int = 0
    residual: int = 0
    weight: int = 0
    bias: int = 0
    prior_mean: int = 0
    prior_var: int = 0
    sums: int = 0  # (2, C), of the call's ``sums_element``: see `Call.sums_to_repair_by`
    step: int = 0  # int64 in device memory, where the draw's step is none


class Scalars(NamedTuple):
    """The numbers of a forward."""

    eps: float
    momentum: float = 0.0  # weight of the new statistics in the running ones
    unbiased: float = 1.0  # what makes the variance unbiased there
    skip_nonfinite: bool = False


class Call(Protocol):
    """What both engines' calls are to the code in front of them."""

    signature: Signature
    mask: int
    memory: int
    prior_element: str
    sums_element: str

    def drawn(self, plan: Plan) -> tuple[Draw | None, Any]:
        """Return a plan's draw, and the array in device memory that holds its step, if one does."""

    def forward(self, at: Pointers, draw: Draw | None, scalars: Scalars, stream: int | None = None) -> None:
        """Write y, where it has an address, and the state."""

    def backward(self, at: Pointers, draw: Draw | None, gradient: str, stream: int | None = None) -> None:
        """Write the gradients that have an address."""

    def repair(self, at: Pointers, draw: Draw | None, stream: int | None = None) -> None:
        """Write dx at the sampled elements, from the sums."""

    def sums_to_repair_by(self, dweight: Any, dbias: Any, rows: Any) -> tuple[Any, Any]:
        """Return the two sums that `repair` reads, of arrays in float64 and the state's rows."""


def step_at(address: int) -> ctypes.c_int64:
    """Return the step of a state in the CPU's memory."""
    return ctypes.c_int64.from_address(address)
