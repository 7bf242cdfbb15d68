"""A layer's calls on a GPU from its tensors' addresses: what `quick` is on the CPU, with the same interface.

Memory is torch's own, and so is the stream; nothing waits for the device.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from sbncore.adapters.torch.exchange import dense_layout
from sbncore.adapters.torch.names import named
from sbncore.cuda import dense
from sbncore.cuda.call import Pointers
from sbncore.cuda.device import device_at
from sbncore.hashing import layer_key
from sbncore.layout import Layout
from sbncore.plans import Plan
from sbncore.saved import ROWS

ELEMENTS = {
    torch.float64: "float64", torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16",
}  # fmt: skip

address = Tensor.data_ptr


class Call:
    """Forward and backward for tensors of one shape, memory format and dtype, and one sampler."""

    def __init__(self, layout: Layout, dtype: torch.dtype, plan: Plan, index: int) -> None:
        self.layout, self.dtype, self.plan, self.index = layout, dtype, plan, index
        self.parameter = torch.float64 if dtype == torch.float64 else torch.float32
        self.channels = (layout.C,)
        self._dense = lru_cache(maxsize=4)(self._prepare)
        self.streams = range(len(plan.parts))

    def _prepare(self, relu: bool, add: bool) -> dense.Dense:
        device = device_at(self.index)
        return dense.Dense(
            device, self.layout, ELEMENTS[self.dtype], self.dtype.itemsize, self.plan, relu, add
        )

    def vectors(self, *tensors: Tensor | None) -> list[int] | None:
        """Return parameters' addresses, 0 of None, unless they are of another dtype, shape or device."""
        addresses: list[int] = []
        for t in tensors:
            if t is None:
                addresses.append(0)
                continue
            if t.dtype is not self.parameter or t.get_device() != self.index or t.is_neg():
                return None
            if t.shape != self.channels or not t.is_contiguous():
                return None
            addresses.append(address(t))
        return addresses

    def forward(
        self, x: Tensor, vectors: list[int], residual: Tensor | None, running_mean: Tensor | None,
        running_var: Tensor | None, draw: tuple[int, int, Tensor], momentum: float, eps: float, relu: bool,
        skip_nonfinite: bool, in_place: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        """The operator's results; the running statistics themselves, moved, if ``in_place``."""
        weight, bias, *running = vectors
        prepared, new = self._dense(relu, residual is not None), x.new_empty
        y, state = torch.empty_like(x), new(ROWS * self.layout.C + 1, dtype=torch.float64)
        mask, memory = new(prepared.mask, dtype=torch.uint8), new(prepared.memory, dtype=torch.float64)
        if running_mean is None or running_var is None:
            mean = var = new(0)
        elif in_place:
            mean, var = running_mean, running_var
            torch.autograd.graph.increment_version((mean, var))
        else:
            mean, var = running_mean.clone(), running_var.clone()
            running = [address(mean), address(var)]
        seed, layer, step = draw
        pointers = Pointers(
            y=address(y), x=address(x), residual=0 if residual is None else address(residual),
            mask=address(mask), state=address(state), weight=weight, bias=bias, running_mean=running[0],
            running_var=running[1], step=address(step),
            step_kept=address(state) + 8 * ROWS * self.layout.C,
        )  # fmt: skip
        prepared.forward(
            self._stream(), address(memory), pointers, self._keys(seed, layer), eps, momentum,
            skip_nonfinite,
        )
        return y, state, mask, mean, var

    def backward(
        self, dy: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, state: Tensor, mask: Tensor,
        seed: int, layer: int, relu: bool, gradient: str, needs: list[bool],
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        """The operator's results."""
        C, new = self.layout.C, x.new_empty
        prepared = self._dense(relu, mask.numel() > 0)
        dx = torch.empty_like(x) if needs[0] else new(0)
        dresidual = torch.empty_like(x) if needs[3] and relu else dy.clone() if needs[3] else new(0)
        dweight, dbias = (new(C if needed else 0, dtype=self.parameter) for needed in needs[1:3])
        memory = new(prepared.memory, dtype=torch.float64)
        pointers = Pointers(
            dx=address(dx), dresidual=address(dresidual) if relu else 0, mask=address(mask),
            dweight=address(dweight), dbias=address(dbias), state=address(state), x=address(x),
            dy=address(dy), step=address(state) + 8 * ROWS * C,
        )  # fmt: skip
        prepared.backward(
            self._stream(), address(memory), pointers, self._keys(seed, layer), gradient
        )
        return dx, dweight, dbias, dresidual

    def _stream(self) -> int:
        return torch.cuda.current_stream(self.index).cuda_stream

    def _keys(self, seed: int, layer: int) -> list[tuple[int, int]]:
        before = layer_key(seed, layer)
        return [(before, stream) for stream in self.streams]


@lru_cache(maxsize=1024)
def call_for(x: Shape, sampler: str, masked: bool) -> Call | None:
    """Return the call for such a tensor and a sampler's name, or None where the general path is required."""
    *look, index = x
    layout = dense_layout(*look)
    plan = layout and named(sampler).plan(layout.shape)
    if layout is None or plan is None or plan.words is None or not dense.takes(plan):
        return None
    return Call(layout, x[2], plan, index)


Shape = tuple[torch.Size, tuple[int, ...], torch.dtype, int]


def fits(tensor: Tensor, shape: Shape) -> bool:
    """Whether a tensor lies as another of that shape, at an address that vectors may be read from."""
    return shape_of(tensor) == shape and not tensor.is_neg() and address(tensor) % 16 == 0


def shape_of(x: Tensor) -> Shape:
    """Return what `call_for` knows tensors by."""
    return x.shape, x.stride(), x.dtype, x.get_device()
