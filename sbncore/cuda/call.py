"""A GPU's Call: what shape, type and recipe of a plan decide for a forward and its backward.

Every kernel of a call takes one record, the struct Call in places.cu, of which a run fills in pointers,
numbers and the keys of the draw.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from sbncore.cuda import geometry
from sbncore.cuda.geometry import Pieces, Places, Runs, Sizes, Sweep
from sbncore.plans import Part, ScatteredPlaces, WholeSamples

PARTS = 8  # of a plan, at most
SORTED = 4096  # up to this size, distinct values are drawn by a kernel of its own
DRAWING = 128  # threads of a block of that kernel
OWN = {name: 1 << bit for bit, name in enumerate(
    ("weight", "bias", "prior_mean", "prior_var", "running_mean", "running_var"))}  # fmt: skip


class Pointers(NamedTuple):
    """Addresses, 0 of what is absent; fields as in places.cu's Call."""

    y: int = 0
    dx: int = 0
    dresidual: int = 0
    mask: int = 0
    dweight: int = 0
    dbias: int = 0
    running_mean: int = 0
    running_var: int = 0
    state: int = 0
    step_kept: int = 0
    partial: int = 0
    shift: int = 0
    slopes: int = 0
    x: int = 0
    dy: int = 0
    residual: int = 0
    weight: int = 0
    bias: int = 0
    prior_mean: int = 0
    prior_var: int = 0
    step: int = 0


class Numbers(NamedTuple):
    """What a run sets beside pointers; fields as in places.cu's Call."""

    prior: float = 0.0
    eps: float = 0.0
    momentum: float = 0.0
    unbiased: float = 0.0
    total_scale: float = 0.0
    skip_nonfinite: bool = False
    elements: int = 0
    from_places: bool = False
    from_blocks: int = 0
    onto: bool = False
    writes: bool = True


class Launch(NamedTuple):
    """A kernel, as its template's instance, and its grid."""

    kernel: str
    grid: tuple[int, int]
    threads: int


Keys = Sequence[tuple[int, int]]  # of each part: its key, or what comes before the step, and its stream
NO_TABLES: Mapping[int, int] = {}
_HEAD = struct.Struct("<21Q5d6q")
_GEOMETRY = struct.Struct("<13qq")  # and the number of parts
_KEY = struct.Struct("<QQ")
_PART = struct.Struct("<QQd15qQ")
_ONTO, _PARTS = _HEAD.size - 16, _HEAD.size + _GEOMETRY.size - 8  # where these fields begin
_FIRST_PART = _HEAD.size + _GEOMETRY.size
SIZE = _FIRST_PART + PARTS * _PART.size


class Call:
    """The kernels' launches and record, for arrays of one layout and plans that differ in keys alone."""

    def __init__(
        self, sizes: Sizes, kind: str, runs: tuple[Runs, ...], full: bool, multiprocessors: int
    ) -> None:
        self.sizes, self.kind, self.full, self.runs = sizes, kind, full, runs
        self.ends = "LAST" if sizes.last else "FIRST"
        self.writing = geometry.sweep(sizes, multiprocessors)
        self.summing = geometry.sweep(sizes, multiprocessors, sums=True)
        self.places = geometry.places(sizes, runs, self.writing.vector, multiprocessors)
        self.real = 8 if kind == "double" else 4
        record = bytearray(SIZE)
        numbers = geometry.fields(sizes, self.writing, self.summing, self.places)
        _GEOMETRY.pack_into(record, _HEAD.size, *numbers, 0 if full else len(runs))
        for k, (each, pieces) in enumerate(zip(runs, self.places.pieces, strict=True)):
            _pack_part(record, k, each, pieces)
        self._template = record

    def record(
        self, pointers: Pointers, numbers: Numbers, keys: Keys, tables: Mapping[int, int] = NO_TABLES
    ) -> bytes:
        """Return the bytes of a run; ``tables`` holds the addresses of drawn values, by part."""
        record = bytearray(self._template)
        _HEAD.pack_into(record, 0, *pointers, *numbers)
        for k, words in enumerate(keys):
            _KEY.pack_into(record, _FIRST_PART + k * _PART.size, *words)
        for k, table in tables.items():
            struct.pack_into("<Q", record, _FIRST_PART + (k + 1) * _PART.size - 8, table)
        return bytes(record)

    def of_part(self, record: bytes, k: int) -> bytes:
        """Return the record of the repair of part k alone, onto that of the parts before it."""
        single = bytearray(record)
        begin = _FIRST_PART + k * _PART.size
        single[_FIRST_PART : _FIRST_PART + _PART.size] = record[begin : begin + _PART.size]
        struct.pack_into("<q", single, _PARTS, 1)
        struct.pack_into("<q", single, _ONTO, k > 0)
        return bytes(single)

    def moments(self) -> Launch:
        """Return the pass that leaves the sums of a forward."""
        if self.full:
            return self._over("sums", self.summing, "MOMENTS,true")
        return self._over("sums_of_places", self.places, "MOMENTS")

    def sums(self, mode: str, over_places: bool) -> list[Launch]:
        """Return the passes that leave the sums of a backward, and write dx and dresidual."""
        if not over_places:
            return [self._over("sums", self.summing, f"{mode},true")]
        return [
            self._over("sums_of_places", self.places, mode), self._over("sums", self.summing, f"{mode},false")
        ]  # fmt: skip

    def normalize(self, relu: bool, residual: bool) -> Launch:
        """Return the pass that writes y."""
        flags = ",".join("true" if flag else "false" for flag in (relu, residual))
        return self._over("normalize", self.writing, flags)

    def repair(self, mode: str) -> Launch:
        """Return the pass that takes the statistics' part from dx."""
        if self.full:
            return self._over("repair", self.writing, mode)
        return self._over("repair_places", self.places, mode)

    def finish(self, direction: str) -> Launch:
        """Return the pass over channels behind the sums."""
        blocks = -(-self.sizes.C // geometry.FINISHED)
        return Launch(f"finish_{direction}<{self.kind},{self.ends}>", (blocks, 1), geometry.THREADS)

    def sums_left(self, over_places: bool) -> tuple[int, int]:
        """Return how many blocks leave sums, and how many each."""
        if over_places:
            return self.places.blocks, self.sizes.C
        return self.summing.blocks, self.summing.slots

    def memory(self, over_places: bool) -> int:
        """Return the bytes that kernels leave for those behind them: slopes, the blocks' sums, shifts."""
        blocks, slots = self.sums_left(over_places)
        return 16 * self.sizes.C + (2 * blocks * slots + self.sizes.C) * self.real

    def between(self, pointers: Pointers, memory: int, over_places: bool) -> Pointers:
        """Return pointers into that memory, at an address."""
        blocks, slots = self.sums_left(over_places)
        partial = memory + 16 * self.sizes.C
        return pointers._replace(
            slopes=memory, partial=partial, shift=partial + 2 * blocks * slots * self.real
        )

    def _over(self, kernel: str, over: Sweep | Places, options: str) -> Launch:
        return Launch(f"{kernel}<{self.kind},{over.vector},{over.layout},{options}>", over.grid, over.threads)


call_of = lru_cache(maxsize=1024)(Call)


def keys_of(parts: tuple[Part, ...]) -> Keys:
    """Return the words of the parts' keys, as in places.cu's Part."""
    keys = [part.key for part in parts]
    return [(key, 0) if isinstance(key, int) else (key.before, key.stream) for key in keys]


def table_size(part: Part, size: int) -> int:
    """Return how many drawn values a part keeps in device memory: none where the kernels hash them."""
    if isinstance(part, ScatteredPlaces) and part.rows * size <= SORTED:
        return part.positions
    if isinstance(part, WholeSamples) and not part.stride and part.rows <= SORTED:
        return part.samples
    return 0


def draw(parts: tuple[Part, ...], size: int) -> Launch:
    """Return the launch that fills the tables of some parts."""
    most = max(_range(part, size) for part in parts if table_size(part, size))
    return Launch("draw", (-(-most // DRAWING), 1), DRAWING)


def _range(part: Part, size: int) -> int:
    """Return of how many values a part draws."""
    return part.rows * size if isinstance(part, ScatteredPlaces) else part.rows


def _pack_part(record: bytearray, k: int, runs: Runs, pieces: Pieces) -> None:
    weight, *sizes = runs
    numbers: list[Any] = [*sizes, runs.number, *pieces]
    _PART.pack_into(record, _FIRST_PART + k * _PART.size, 0, 0, weight, *numbers, 0)
