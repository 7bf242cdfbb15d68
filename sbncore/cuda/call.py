"""Calls on a GPU: the launches of each direction, and the record that all of their kernels read.

Nothing here waits for the device. The exact gradient is one pass over dy and x and a correction of dx at the
sampled elements (`repair_places`); where everything is sampled, a second pass (`repair`) writes dx.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from sbncore.arrays import PARAMETER, STORAGE
from sbncore.cuda import geometry, record
from sbncore.cuda.device import device_at
from sbncore.cuda.driver import Launch
from sbncore.cuda.geometry import Places, Sizes, Sweep
from sbncore.cuda.record import PARTS, Between, Keys, Numbers
from sbncore.hashing import layer_key, stream_key
from sbncore.plans import Draw, Part, Plan, Recipe, ScatteredPlaces, WholeSamples
from sbncore.signature import ROWS, Pointers, Scalars, Signature

TYPES = {"float64": "double", "float32": "float", "float16": "float16", "bfloat16": "bfloat16"}
MASK_WORD = {8: 4, 4: 2, 2: 1, 1: 1}  # bytes for UNROLL rows of a column of so many elements
MOST_POSITIONS = 2**30  # of a map: kernels count them in 32 bits
SORTED = 4096  # up to this size, distinct values are drawn by a kernel of its own
DRAWING = 128  # threads of a block of that kernel


class Call:
    """Forward and backward of one signature; see `sbncore.call`.

    Temporary memory holds the slopes, the blocks' sums, the shifts and the tables of drawn values.

    Raises:
        ValueError: for a recipe of too many parts, or of too many values.
    """

    def __init__(self, signature: Signature) -> None:
        self.signature = signature
        layout, element, index, recipe, relu, residual = signature
        _check(recipe)
        assert index is not None
        self.device = device_at(index)
        self.kind, self.prior_element, self.sums_element = TYPES[element], *[PARAMETER[element]] * 2
        self.real = 8 if element == "float64" else 4
        self.ends = "LAST" if layout.last else "FIRST"
        self.values, self.channels = layout.N * layout.S, layout.C
        sizes = Sizes(*layout.sizes, layout.last, STORAGE[element].itemsize, True)
        runs = tuple(geometry.runs_of(part, recipe.S) for part in recipe.parts)
        multiprocessors = self.device.multiprocessors
        self.writing = geometry.sweep(sizes, multiprocessors)
        self.summing = geometry.sweep(sizes, multiprocessors, sums=True)
        self.places = geometry.places(sizes, runs, self.writing.vector, multiprocessors)
        fields = geometry.fields(sizes, self.writing, self.summing, self.places)
        self.template = record.template(fields, runs, self.places, recipe.full)
        self.mask = mask_size(signature) if relu and residual else 0
        self.mode = "MASKED" if self.mask else "RELU" if relu else "PLAIN"
        self.tables = [table_size(part, recipe.S) for part in recipe.parts]
        self._offsets = {over_places: self._divide_memory(over_places) for over_places in (False, True)}
        self.memory = max(size for *_, size in self._offsets.values())
        self._forward = lru_cache(maxsize=2)(self._prepare_forward)
        self._backward = lru_cache(maxsize=16)(self._prepare_backward)

    def drawn(self, plan: Plan) -> tuple[Draw | None, Any]:
        return plan.draw, None if plan.step is None else self.device.step(plan.step)

    def forward(self, at: Pointers, draw: Draw | None, scalars: Scalars, stream: int | None = None) -> None:
        recipe = self.signature.recipe
        if not recipe.disjoint and draw is not None and at.step:
            raise ValueError("plan: expected parts that share no samples where an array holds the step")
        launches, total_scale, blocks = self._forward(at.y > 0)
        between = self._between(at.memory, not recipe.full)
        numbers = Numbers(
            recipe.prior,
            *scalars[:3],
            total_scale,
            scalars.skip_nonfinite,
            from_places=not recipe.full,
            from_blocks=blocks,
        )
        step_kept = at.state + 8 * ROWS * self.channels if at.step else 0
        filled = record.filled(self.template, at, between, numbers, step_kept, self._keys(draw, at.step))
        self.device.launch(launches, filled, stream)

    def backward(self, at: Pointers, draw: Draw | None, gradient: str, stream: int | None = None) -> None:
        recipe = self.signature.recipe
        launches, through, sampled = self._backward(gradient, at.dx > 0, at.dresidual > 0)
        between = self._between(at.memory, sampled)
        numbers = Numbers(
            total_scale=self.values / (1 - recipe.prior) if sampled else 1.0,
            from_places=sampled,
            from_blocks=self._sums_left(sampled)[0],
            writes=not (through and recipe.full),
        )
        filled = record.filled(self.template, at, between, numbers, 0, self._keys(draw, at.step))
        self._launch(launches, filled, through, stream)

    def repair(self, at: Pointers, draw: Draw | None, stream: int | None = None) -> None:
        if not self.signature.recipe.parts:
            return
        between = self._between(at.memory, True)._replace(partial=at.sums)
        numbers = Numbers(total_scale=1.0, from_places=True, from_blocks=1)
        filled = record.filled(self.template, at, between, numbers, 0, self._keys(draw, at.step))
        launches = [*self._tables(), self._finish("backward"), self._repair()]
        self._launch(launches, filled, True, stream)

    def sums_to_repair_by(self, dweight: Any, dbias: Any, rows: Any) -> tuple[Any, Any]:
        mean, _, rstd, shift = rows[:4]
        return dbias, dweight / rstd + (mean - shift) * dbias

    def _prepare_forward(self, writes: bool) -> tuple[list[Launch], float, int]:
        """Return the launches, what makes the weights sum to 1, and how many blocks leave sums."""
        recipe, launches, blocks = self.signature.recipe, [], 0
        if recipe.prior < 1:
            launches = [*self._tables(), self._moments()]
            blocks, _ = self._sums_left(not recipe.full)
        launches.append(self._finish("forward"))
        if writes:
            launches.append(self._normalize(self.signature.relu, self.signature.residual))
        total = self.values if recipe.full else sum(part.weight for part in recipe.parts)
        return launches, 1 / total if total else 0.0, blocks

    def _prepare_backward(
        self, gradient: str, writes: bool, residual: bool
    ) -> tuple[list[Launch], bool, bool]:
        """Return the launches, whether the last is a repair, and whether the sample is summed."""
        recipe = self.signature.recipe
        flows = gradient != "detached" and recipe.parts != ()
        through, sampled = flows and writes, flows and gradient == "sampled" and not recipe.full
        launches = self._tables() if through or sampled else []
        if sampled:
            launches.append(self._over("sums_of_places", self.places, self.mode))
        if not sampled or writes or residual:
            options = f"{self.mode},{'false' if sampled else 'true'}"
            launches.append(self._over("sums", self.summing, options))
        launches.append(self._finish("backward"))
        return [*launches, self._repair()] if through else launches, through, sampled

    def _repair(self) -> Launch:
        if self.signature.recipe.full:
            return self._over("repair", self.writing, self.mode)
        return self._over("repair_places", self.places, self.mode)

    def _launch(self, launches: list[Launch], filled: bytes, through: bool, stream: int | None) -> None:
        """Launch the kernels, the last of them, if it is a repair, for parts that overlap one by one."""
        recipe = self.signature.recipe
        if not through or recipe.full or recipe.disjoint:
            self.device.launch(launches, filled, stream)
            return
        self.device.launch(launches[:-1], filled, stream)
        for k in range(len(recipe.parts)):
            self.device.launch(launches[-1:], record.of_part(filled, k), stream)

    def _tables(self) -> list[Launch]:
        """Return the launch that fills the tables of drawn values, if there are any."""
        recipe = self.signature.recipe
        counts = [_range(part, recipe.S) for part, n in zip(recipe.parts, self.tables, strict=True) if n]
        return [Launch("draw", (-(-max(counts) // DRAWING), 1), DRAWING)] if counts else []

    def _moments(self) -> Launch:
        """Return the pass that leaves the sums of a forward."""
        if self.signature.recipe.full:
            return self._over("sums", self.summing, "MOMENTS,true")
        return self._over("sums_of_places", self.places, "MOMENTS")

    def _normalize(self, relu: bool, residual: bool) -> Launch:
        flags = ",".join("true" if flag else "false" for flag in (relu, residual))
        return self._over("normalize", self.writing, flags)

    def _finish(self, direction: str) -> Launch:
        """Return the pass over channels behind the sums."""
        blocks = -(-self.channels // geometry.FINISHED)
        return Launch(f"finish_{direction}<{self.kind},{self.ends}>", (blocks, 1), geometry.THREADS)

    def _over(self, kernel: str, over: Sweep | Places, options: str) -> Launch:
        return Launch(f"{kernel}<{self.kind},{over.vector},{over.layout},{options}>", over.grid, over.threads)

    def _sums_left(self, over_places: bool) -> tuple[int, int]:
        """Return how many blocks leave sums, and how many each."""
        if over_places:
            return self.places.blocks, self.channels
        return self.summing.blocks, self.summing.slots

    def _divide_memory(self, over_places: bool) -> tuple[int, int, dict[int, int], int]:
        """Return where in temporary memory sums, shifts and the tables of parts begin, and its size."""
        blocks, slots = self._sums_left(over_places)
        partial = 16 * self.channels  # behind the slopes
        shift = partial + 2 * blocks * slots * self.real
        size, tables = shift + -(-self.channels * self.real // 8) * 8, {}
        for k, count in enumerate(self.tables):
            if count:
                tables[k] = size
            size += 4 * count
        return partial, shift, tables, size

    def _between(self, memory: int, over_places: bool) -> Between:
        """Return the addresses within temporary memory."""
        partial, shift, tables, _ = self._offsets[over_places]
        return Between(
            memory + partial, memory + shift, memory, {k: memory + begin for k, begin in tables.items()}
        )

    def _keys(self, draw: Draw | None, step: int) -> Keys:
        streams = [part.key for part in self.signature.recipe.parts]
        if draw is None:
            return [(key, 0) for key in streams]
        if step:  # kernels read the step
            before = layer_key(draw.seed, draw.layer)
            return [(before, stream) for stream in streams]
        return [(stream_key(*draw, stream), 0) for stream in streams]


def mask_size(signature: Signature) -> int:
    """Return the bytes of a mask."""
    return mask_bytes(*signature.layout.sizes, signature.layout.last, STORAGE[signature.element].itemsize)


def mask_bytes(N: int, C: int, S: int, last: bool, itemsize: int) -> int:
    """Return the bytes of a mask for an array of these sizes."""
    sweep = geometry.sweep(Sizes(N, C, S, last, itemsize, True), 1)
    return -(-sweep.rows // geometry.UNROLL) * sweep.columns * MASK_WORD[sweep.vector]


def table_size(part: Part, size: int) -> int:
    """Return how many drawn values a part keeps in device memory: none where the kernels hash them."""
    if isinstance(part, ScatteredPlaces) and part.rows * size <= SORTED:
        return part.positions
    if isinstance(part, WholeSamples) and not part.stride and part.rows <= SORTED:
        return part.samples
    return 0


def _range(part: Part, size: int) -> int:
    """Return of how many values a part draws."""
    return part.rows * size if isinstance(part, ScatteredPlaces) else part.rows


def _check(recipe: Recipe) -> None:
    if len(recipe.parts) > PARTS:
        raise ValueError(f"plan: expected at most {PARTS} parts on a GPU, got {len(recipe.parts)}")
    if recipe.S > MOST_POSITIONS or recipe.count >= 2**32:
        raise ValueError(
            "plan: expected at most 2**30 positions of a map and 2**32 values a channel on a GPU, got "
            f"{recipe.S} and {recipe.count}"
        )
