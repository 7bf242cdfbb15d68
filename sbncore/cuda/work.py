"""One call's arrays on a GPU: what forward leaves, what the plan's draws need, geometry and launches."""

from __future__ import annotations

from typing import Any

from sbncore.arrays import address, element_type
from sbncore.cuda import call, geometry
from sbncore.cuda.device import Device
from sbncore.layout import Layout
from sbncore.plans import Part, Plan
from sbncore.statistics import Moments

TYPES = {"float64": "double", "float32": "float", "float16": "float16", "bfloat16": "bfloat16"}


class State:
    """What forward leaves for backward in device memory."""

    def __init__(self, values: Any, count: float, draws: Draws) -> None:
        self.values = values  # (ROWS, C) float64
        self.count = count
        self.draws = draws
        self.mask: Any = None
        self.aligned = True  # the mask's columns: of 16 bytes
        self.work: list[Work] = []  # temporary memory: a captured graph uses it as long as it lives

    @property
    def moments(self) -> Moments:
        return self.values[0], self.values[1], self.count


class Draws:
    """What a plan's parts need in device memory: the step as it was, the few values that are sorted."""

    def __init__(self, device: Device, plan: Plan, size: int, kept: Any = None) -> None:
        step = plan.step
        self.step = None if step is None else device.step(step)
        self.kept = None if step is None else device.empty(1, "int64") if kept is None else kept
        self.tables: Any = None
        self.addresses: dict[int, int] = {}
        counts = [call.table_size(part, size) for part in plan.parts]
        if any(counts):
            self.tables = device.empty(sum(counts), "int32")
            for k, count in enumerate(counts):
                if count:
                    self.addresses[k] = address(self.tables) + 4 * sum(counts[:k])

    def parts(self, parts: tuple[Part, ...], plan: Plan, walked: bool = True) -> bytes:
        tables = {k: self.addresses.get(plan.parts.index(part), 0) for k, part in enumerate(parts)}
        return call.pack_parts(parts, plan.S, tables, walked)


class Work:
    """One call's arrays, geometry and launches."""

    def __init__(
        self, device: Device, x: Any, layout: Layout, plan: Plan, arrays: tuple[Any, ...], fused: bool,
        aligned: bool = True,
    ) -> None:
        self.device, self.x, self.layout, self.plan = device, x, layout, plan
        aligned = aligned and all(is_aligned(array) for array in (x, *arrays))
        self.sizes = geometry.Sizes(layout.N, layout.C, layout.S, layout.last, x.dtype.itemsize, aligned)
        self.sweep, self.places, self.fused, self.geometry = geometry.cut(
            self.sizes, plan.count, device.multiprocessors, fused and device.clusters
        )
        self.type = TYPES[element_type(x)]
        self.partial: Any = None
        self.held: dict[str, Any] = {}

    def partial_for(self, blocks: int, slots: int) -> int:
        """Return the address of memory for the blocks' sums."""
        real = "float64" if self.type == "double" else "float32"
        self.partial = self.device.empty(blocks * 2 * slots, real)
        return address(self.partial)

    def everywhere(
        self, kernel: str, options: str, pointers: dict[str, int], parts: bytes = b"", **numbers: Any
    ) -> None:
        """Launch a kernel over everything."""
        self._launch(kernel, self.sweep, options, pointers, parts, numbers)

    def at_places(
        self, kernel: str, options: str, pointers: dict[str, int], parts: bytes, **numbers: Any
    ) -> None:
        """Launch a kernel over the places drawn."""
        self._launch(kernel, self.places, options, pointers, parts, numbers)

    def _launch(
        self,
        kernel: str,
        over: geometry.Sweep | geometry.Places,
        options: str,
        pointers: dict[str, int],
        parts: bytes,
        numbers: dict[str, Any],
    ) -> None:
        name = f"{kernel}<{self.type},{over.vector},{over.layout},{options}>"
        packed = call.pack(pointers, self.geometry, parts, **numbers)
        self.device.launch(name, over.grid, over.threads, packed)


def at(array: Any) -> int:
    """Return an array's address, 0 of none."""
    return 0 if array is None else address(array)


def is_aligned(array: Any) -> bool:
    """Whether an array allows accesses of 16 bytes; none does."""
    return array is None or address(array) % 16 == 0
