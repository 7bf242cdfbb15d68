"""Calls on a GPU from addresses: dense, aligned arrays that have passed all checks, plans of one recipe.

What a recipe cannot tell ahead (drawn tables, a prior, parts that overlap) takes `sbncore.cuda.phases`, which
gives the same bits.
"""

from __future__ import annotations

from functools import lru_cache

from sbncore.cuda import call, geometry
from sbncore.cuda.call import Call, Numbers, Pointers
from sbncore.cuda.device import Device
from sbncore.cuda.phases import TYPES, mask_size
from sbncore.layout import Layout
from sbncore.plans import Plan
from sbncore.statistics import unbiased


def takes(plan: Plan) -> bool:
    """Whether plans of this recipe run from addresses alone."""
    if plan.prior or not plan.parts or len(plan.parts) > call.PARTS or not plan.apart:
        return False
    return not any(call.table_size(part, plan.S) for part in plan.parts)


class Dense:
    """Forward and backward over memory of one layout and element type, and a recipe that `takes` takes.

    Args:
        memory: doubles of temporary memory that each direction needs.
        mask: bytes of the mask.
    """

    def __init__(
        self, device: Device, layout: Layout, element: str, itemsize: int, plan: Plan, relu: bool, add: bool
    ) -> None:
        self.device, self.relu, self.add = device, relu, add
        sizes = geometry.Sizes(layout.N, layout.C, layout.S, layout.last, itemsize, True)
        runs = tuple([geometry.runs_of(part, plan.S) for part in plan.parts])
        self.call: Call = call.call_of(sizes, TYPES[element], runs, plan.full, device.multiprocessors)
        self.mask = mask_size(layout, itemsize) if relu and add else 0
        self.mode = "MASKED" if self.mask else "RELU" if relu else "PLAIN"
        self.unbiased = unbiased(plan.effective_count)
        self.values = layout.N * layout.S
        self.memory = max(-(-self.call.memory(over_places) // 8) for over_places in (False, True))
        total = self.values if plan.full else sum(part.weight for part in plan.parts)
        self._forward = (
            (self.call.moments(), self.call.finish("forward"), self.call.normalize(relu, add)),
            Numbers(
                total_scale=1 / total, from_places=not plan.full, from_blocks=self._blocks(not plan.full)
            ),
        )
        self._full = plan.full
        self._backward = lru_cache(maxsize=8)(self._prepare_backward)

    def forward(
        self, stream: int | None, memory: int, pointers: Pointers, keys: call.Keys, eps: float,
        momentum: float = 0.0, skip_nonfinite: bool = False, elements: int = 0,
    ) -> None:  # fmt: skip
        """Write y, the state, the mask and the running statistics; pointers into memory are filled in."""
        launches, numbers = self._forward
        numbers = numbers._replace(
            eps=eps, momentum=momentum, unbiased=self.unbiased, skip_nonfinite=skip_nonfinite,
            elements=elements,
        )  # fmt: skip
        record = self.call.record(self.call.between(pointers, memory, not self._full), numbers, keys)
        self.device.launch(launches, record, stream)

    def backward(
        self, stream: int | None, memory: int, pointers: Pointers, keys: call.Keys, gradient: str,
        elements: int = 0,
    ) -> None:
        """Write the gradients that have an address."""
        launches, numbers = self._backward(gradient, pointers.dx > 0)
        pointers = self.call.between(pointers, memory, numbers.from_places)
        record = self.call.record(pointers, numbers._replace(elements=elements), keys)
        self.device.launch(launches, record, stream)

    def _prepare_backward(self, gradient: str, dx: bool) -> tuple[list[call.Launch], Numbers]:
        through, sampled = dx and gradient != "detached", gradient == "sampled" and not self._full
        launches = [*self.call.sums(self.mode, sampled), self.call.finish("backward")]
        if through:
            launches.append(self.call.repair(self.mode))
        return launches, Numbers(
            total_scale=self.values if sampled else 1.0, from_places=sampled,
            from_blocks=self._blocks(sampled), writes=not (through and self._full),
        )  # fmt: skip

    def _blocks(self, over_places: bool) -> int:
        return self.call.sums_left(over_places)[0]
