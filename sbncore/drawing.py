"""From a sampler, a shape and a draw (seed, layer, step) to a Plan."""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

from sbncore.hashing import stream_key
from sbncore.plans import Draw, Part, Plan, Recipe


@dataclass(frozen=True)
class Batch:
    """The rows a sampler may draw from and the map of each, with the keys of its draws."""

    first: int
    rows: int
    spatial: tuple[int, ...]
    keys: Iterator[int]

    @property
    def S(self) -> int:
        return math.prod(self.spatial)


@dataclass(frozen=True, eq=False)  # each class that has fields compares them
class Sampler:
    """Base of all samplers: a comparable, hashable value with one public method, `plan`."""

    def plan(
        self,
        shape: Sequence[int],
        *,
        seed: int = 0,
        layer: int = 0,
        step: Any = 0,
        channel_axis: int = 1,
        fewest: int = 2,
    ) -> Plan:
        """Draw for one call: a pure function of the sampler and of these arguments.

        Args:
            shape: (N, C, *spatial) of the array to normalize, channels at ``channel_axis``.
            seed, layer, step: integers (modulo 2**64) that name the draw; layers that normalize in the
                same network should differ in ``layer``, calls of one layer in ``step``.
                ``step`` may also be an array of one int64, which is read whenever the plan is used: on a
                GPU by the kernels themselves, so that a captured graph draws anew at every replay.
            channel_axis: axis of ``shape`` that counts channels.
            fewest: values per channel; 1 where other processes add theirs (`sbncore.moments`).

        Returns:
            The Plan; without parts if the batch is empty.

        Raises:
            ValueError: if the sample is larger than what there is to draw from, or a single value.
            TypeError: if shape is no sequence of integers, or seed, layer or step no integer.
        """
        sizes, axis = _sizes(shape), integer("channel_axis", channel_axis)
        draw = Draw(seed, layer, step)
        if not type(seed) is type(layer) is type(step) is int:
            draw = Draw(integer("seed", seed), integer("layer", layer), _step(step))
        if self.settled:
            plan = Plan(_recipe(self, sizes, axis), draw)
        elif is_array(step):
            plan = Plan(_drawn(self, sizes, axis, itertools.count()), draw)
        else:
            plan = Plan(_drawn(self, sizes, axis, map(partial(stream_key, *draw), itertools.count())))
        if plan.count < fewest and plan.prior == 0 and 0 not in plan.shape:
            raise ValueError(
                "expected more than 1 value per channel when training, got a sample of a single "
                f"value: {self} of shape {tuple(shape)}; a count, a ratio or at_least can raise it"
            )
        return plan

    @property
    def settled(self) -> bool:
        """Whether all but keys follows from the sampler, as it compares, and the shape: of sbncore's own."""
        return type(self).__module__ == "sbncore.samplers"

    @property
    def virtual(self) -> int:
        """Number of trailing rows of the batch that are synthetic samples."""
        return 0

    def draw(self, batch: Batch, real: int) -> tuple[tuple[Part, ...], float]:
        """Return the parts and the prior's weight, together 1; ``real`` rows are no virtual samples."""
        raise NotImplementedError


@lru_cache(maxsize=1024)
def _recipe(sampler: Sampler, shape: tuple[int, ...], channel_axis: int) -> Recipe:
    return _drawn(sampler, shape, channel_axis, itertools.count())


def _drawn(sampler: Sampler, shape: tuple[int, ...], channel_axis: int, keys: Iterator[int]) -> Recipe:
    outer = batch_shape(shape, channel_axis)
    if 0 in outer:
        return Recipe(outer)
    virtual = sampler.virtual
    if virtual > outer[0]:
        raise ValueError(f"VirtualSamples: expected at most the batch's {outer[0]} samples, got {virtual}")
    return Recipe(outer, *sampler.draw(Batch(0, outer[0], outer[1:], keys), outer[0] - virtual), virtual)


def _step(step: Any) -> Any:
    """Return a step as an int, or the array of one that holds it."""
    if not is_array(step):
        return integer("step", step)
    if str(step.dtype).rpartition(".")[2] != "int64" or math.prod(step.shape) != 1:
        raise TypeError(
            f"step: expected an integer or an array of one int64, got {step.dtype} of shape "
            f"{tuple(step.shape)}"
        )
    return step


def batch_shape(shape: Sequence[int], channel_axis: int) -> tuple[int, ...]:
    """Return (N, *spatial) of a shape with channels at ``channel_axis``."""
    return _batch_shape(_sizes(shape), channel_axis)


def _sizes(shape: Sequence[int]) -> tuple[int, ...]:
    try:
        return tuple(map(operator.index, shape))
    except TypeError:
        came = f"{type(shape).__name__}; its .shape?" if hasattr(shape, "shape") else repr(shape)
        raise TypeError(f"shape: expected integers (N, C, *spatial), got {came}") from None


@lru_cache(maxsize=1024, typed=True)
def _batch_shape(sizes: tuple[int, ...], channel_axis: int) -> tuple[int, ...]:
    if len(sizes) < 2:
        raise ValueError(f"shape: expected (N, C, *spatial), at least 2 axes, got {sizes}")
    if min(sizes) < 0:
        raise ValueError(f"shape: expected sizes of 0 or more, got {sizes}")
    axis = integer("channel_axis", channel_axis)
    if not -len(sizes) <= axis < len(sizes) or axis % len(sizes) == 0:
        raise ValueError(
            f"channel_axis: expected an axis of {sizes} other than the batch's 0, got {channel_axis}"
        )
    axis %= len(sizes)
    outer = sizes[:axis] + sizes[axis + 1 :]
    if math.prod(outer[1:]) > 2**32 or outer[0] > 2**32:
        raise ValueError(f"shape: expected at most 2**32 samples and positions of a map, got {sizes}")
    return outer


def is_array(value: object) -> bool:
    """Whether a step is an array, to be read when the plan is used, and no number."""
    return hasattr(value, "__dlpack__")


def integer(name: str, value: object) -> int:
    """Return an argument as an int; True and 1.0 are none."""
    if isinstance(value, bool):
        raise TypeError(f"{name}: expected an integer, got {value!r}")
    try:
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(f"{name}: expected an integer, got {value!r}") from None
