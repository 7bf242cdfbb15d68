"""Cached calls of a layer on the CPU: what shape, sampler and options decide is worked out once.

For dense tensors and samplers that draw runs or whole samples; the long way (`sbncore.functional`) checks
everything at every call, takes whatever else there is, and gives the same bits.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from sbncore.adapters.torch.exchange import dense_layout, empty_like, numpy_of
from sbncore.adapters.torch.names import named
from sbncore.cpu import draws, engine
from sbncore.layout import Layout
from sbncore.plans import Plan
from sbncore.saved import ROWS
from sbncore.statistics import unbiased

DRAWS = 64  # layers of one shape between a forward and its backward
BITS = {torch.float16: np.int16, torch.bfloat16: np.uint16}


class Call:
    """Forward and backward for tensors of one shape, memory format and dtype, and one sampler."""

    def __init__(self, layout: Layout, dtype: torch.dtype, plan: Plan, masked: bool) -> None:
        self.layout, self.dtype, self.plan, self.engine = layout, dtype, plan, engine.of(layout)
        self.full, self.channels, self.order = plan.full, (layout.C,), layout.order
        self.masked, self.mask_size = masked, engine.mask_size(layout) if masked else 0
        self.parameter = torch.float64 if dtype == torch.float64 else torch.float32
        self.absent = np.zeros(0, np.float64 if dtype == torch.float64 else np.float32)
        self.unbiased = unbiased(plan.effective_count)
        self.weigh = 1 / (1 - plan.prior)
        # the last ones are kept, since backward asks for forward's again
        self.runs = lru_cache(maxsize=DRAWS)(draws.drawing(plan.recipe))

    def flat(self, tensor: Tensor) -> np.ndarray:
        """Return the memory of a tensor of this shape and format, as the engine takes it."""
        bits = BITS.get(self.dtype)
        if bits is not None:
            tensor = tensor.view(torch.int16)
        memory = numpy_of(tensor)
        flat = (memory if self.order is None else memory.transpose(self.order)).reshape(-1)
        return flat if bits is None else flat.view(bits)

    def vectors(self, *tensors: Tensor | None) -> list[np.ndarray] | None:
        """Return parameters' memory, or None unless all are dense, of C values, in the parameters' dtype."""
        views: list[np.ndarray] = []
        for t in tensors:
            if t is None:
                views.append(self.absent)
                continue
            if t.dtype is not self.parameter or not t.is_cpu or t.is_neg():
                return None
            view = numpy_of(t)
            if view.shape != self.channels or not view.flags.c_contiguous:
                return None
            views.append(view)
        return views

    def forward(
        self, x: Tensor, vectors: list[np.ndarray], residual: Tensor | None, running_mean: Tensor | None,
        running_var: Tensor | None, draw: tuple[int, int, int], momentum: float, eps: float, relu: bool,
        skip_nonfinite: bool, in_place: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        """The operator's results; the running statistics themselves, moved, if ``in_place``.

        ``vectors`` are weight, bias and the running statistics, by `vectors`.
        """
        weight, bias, *stored = vectors
        C, prior = self.layout.C, self.plan.prior
        y, state = empty_like(x), torch.empty(ROWS * C + 1, dtype=torch.float64)
        new = torch.zeros if self.masked else torch.empty  # between a mask's rows lie words nobody writes
        mask = new(self.mask_size, dtype=torch.uint8)
        before, after = [self.absent, self.absent] if prior == 0 else stored, stored
        if running_mean is None or running_var is None:
            mean, var = torch.empty(0), torch.empty(0)
        elif in_place:
            mean, var = running_mean, running_var
            torch.autograd.graph.increment_version((mean, var))
        else:
            mean, var = running_mean.clone(), running_var.clone()
            after = [numpy_of(mean), numpy_of(var)]
        kept = numpy_of(state)
        kept[-1:].view(np.int64)[0] = draw[2]
        parameters = engine.Channels(
            weight, bias, before[0], before[1], prior, eps, after[0], after[1], momentum, self.unbiased,
            skip_nonfinite,
        )  # fmt: skip
        self.engine.forward(
            self.flat(y), self.flat(x), None if residual is None else self.flat(residual),
            kept[:-1].reshape(ROWS, C), numpy_of(mask) if self.masked else None, parameters, relu,
            self.runs(*draw), self.full, self.weigh,
        )  # fmt: skip
        return y, state, mask, mean, var

    def backward(
        self, dy: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, state: Tensor, mask: Tensor,
        seed: int, layer: int, relu: bool, gradient: str, needs: list[bool],
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        """The operator's results."""
        C, kept = self.layout.C, numpy_of(state)
        dx, dresidual = (empty_like(x) if needed else None for needed in (needs[0], needs[3]))
        dweight, dbias = (
            torch.empty(C if needed else 0, dtype=self.parameter) for needed in needs[1:3]
        )
        runs, scale = engine.NOWHERE, 0.0
        if gradient != "detached":
            runs = self.runs(seed, layer, int(kept[-1:].view(np.int64)[0]))
            scale = x.numel() / C * self.weigh if gradient == "sampled" else 0.0
        self.engine.backward(
            None if dx is None else self.flat(dx), None if dresidual is None else self.flat(dresidual),
            self.flat(dy), self.flat(x), numpy_of(mask) if self.masked else None,
            kept[:-1].reshape(ROWS, C), np.empty((2, C)), numpy_of(dweight), numpy_of(dbias), relu, runs,
            self.full, scale,
        )  # fmt: skip
        dx, dresidual = (torch.empty(0, dtype=self.dtype) if d is None else d for d in (dx, dresidual))
        return dx, dweight, dbias, dresidual


@lru_cache(maxsize=1024)
def call_for(x: Shape, sampler: str, masked: bool) -> Call | None:
    """Return the call for such a tensor and a sampler's name, or None where the long way must be taken."""
    layout = dense_layout(*x)
    plan = layout and named(sampler).plan(layout.shape)
    if layout is None or plan is None or plan.words is None or not draws.takes(plan):
        return None
    return Call(layout, x[2], plan, masked)


Shape = tuple[torch.Size, tuple[int, ...], torch.dtype]


def fits(tensor: Tensor, shape: Shape) -> bool:
    """Whether a tensor lies as another of that shape."""
    return shape_of(tensor) == shape and tensor.is_cpu and not tensor.is_neg()


def shape_of(x: Tensor) -> Shape:
    """Return what `call_for` knows tensors by."""
    return x.shape, x.stride(), x.dtype
