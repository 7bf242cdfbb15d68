"""Which C functions there are: the draws, and each kernel by memory layout, dtype and options."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import product
from typing import NamedTuple

DTYPES = {"float64": "d", "float32": "f", "float16": "h", "bfloat16": "H"}  # with NumPy's letter as stored
MEMORIES = "channels_first", "short_maps", "channels_last"
DRAWS = "map_places", "whole_samples"


class Kernel(NamedTuple):
    """What a kernel is compiled for; ``residual`` is in backward whether its gradient is written."""

    memory: str
    direction: str
    dtype: str
    relu: bool = False
    residual: bool = False
    mask: bool = False

    def __str__(self) -> str:
        options = (name for name in ("relu", "residual", "mask") if getattr(self, name))
        return "-".join((self.memory, self.direction, self.dtype, *options))

    @classmethod
    def named(cls, name: str) -> Kernel:
        """Return the kernel of a name."""
        memory, direction, dtype, *options = name.split("-")
        return cls(memory, direction, dtype, *(o in options for o in ("relu", "residual", "mask")))


def names(memories: Iterable[str] = MEMORIES, dtypes: Iterable[str] = tuple(DTYPES)) -> list[str]:
    """Return the names of all functions, or of those for some layouts of memory and some dtypes."""
    found = [*DRAWS]
    for memory, dtype in product(memories, dtypes):
        for relu, residual, mask in product((False, True), repeat=3):
            if not mask or (relu and residual):
                found.append(str(Kernel(memory, "forward", dtype, relu, residual, mask)))
        for relu, residual, mask in product((False, True), repeat=3):
            if mask <= relu and residual <= mask:
                found.append(str(Kernel(memory, "backward", dtype, relu, residual, mask)))
    return found
