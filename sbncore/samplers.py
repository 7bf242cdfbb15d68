"""How to draw: small frozen values that turn a shape, a seed, a layer and a step into a Plan.

The names and the idea are those of Chen et al., IEEE TNNLS 32(1), 2021, doi 10.1109/TNNLS.2020.2978753,
section III. In all of them the amount is a ratio where it is a float in (0, 1], a count where it is an
int, and ``at_least`` is a floor on the number of values per channel, for small maps and batches.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from numbers import Integral
from typing import ClassVar

from sbncore.drawing import Batch, Sampler, integer
from sbncore.plans import MapPlaces, Part, ScatteredPlaces, WholeSamples
from sbncore.spacing import distance

RUNS = 4  # of a map, of the pattern of that name
VECTOR = 16  # elements: 64 bytes of float32, a cache line and the widest CPU vector


@dataclass(frozen=True)
class Full(Sampler):
    """Full batch normalization: ``p_i = 1/M`` over all M values (Ioffe and Szegedy, arXiv 1502.03167)."""

    def draw(self, batch: Batch, real: int) -> tuple[tuple[Part, ...], float]:
        return (_whole(batch, 0, real, real, 1),), 0.0


@dataclass(frozen=True)
class BatchSampling(Sampler):
    """BS: whole samples, ``p_i = 1/m`` on a few of the batch.

    Args:
        amount: ratio or number of the samples.
        pattern: "run" (consecutive, from a random one, round the batch: one block of memory),
            "strided" (every k-th) or "random" (distinct, anywhere).
        at_least: floor on the number of values per channel.
    """

    amount: int | float
    pattern: str = "run"
    at_least: int = 1
    ratio: bool = field(init=False, repr=False)  # 1.0 is everything, 1 a single one
    patterns: ClassVar[tuple[str, ...]] = ("run", "strided", "random")

    def __post_init__(self) -> None:
        _settle(self)

    def draw(self, batch: Batch, real: int) -> tuple[tuple[Part, ...], float]:
        samples = _amount(self, real, "samples of the batch")
        samples = min(real, max(samples, -(-self.at_least // batch.S)))
        stride = {"run": 1, "strided": real // samples, "random": 0}[self.pattern]
        return (_whole(batch, 0, real, samples, stride),), 0.0


@dataclass(frozen=True)
class FeatureSampling(Sampler):
    """FS: a small part of every map, of all samples, ``p_i = 1/m``.

    Args:
        amount: ratio or number of a map's positions.
        pattern: "run" (consecutive in memory, the default), "runs" (up to 4 shorter ones, evenly spaced:
            far better estimates for little more time), "rows" (whole rows), "patch" (a rectangle of the
            map's proportions) or "grid" (evenly spaced single positions: the best, in all cache lines).
            "Evenly" is over rows and columns (`sbncore.spacing`).
        place: "sample" hashes a place for each sample; "common" is the paper's one place for all, which
            fails where images share a constant border.
        at_least: floor on the number of values per channel.

    All patterns wrap round the map, so that every position has the same chance. A ratio's runs are rounded
    to whole vectors of 16 where that changes it by an eighth at most, and "rows" to
    whole rows (a count: up).
    """

    amount: int | float
    pattern: str = "run"
    place: str = "sample"
    at_least: int = 1
    ratio: bool = field(init=False, repr=False)  # 1.0 is everything, 1 a single one
    patterns: ClassVar[tuple[str, ...]] = ("run", "runs", "rows", "patch", "grid")

    def __post_init__(self) -> None:
        _settle(self)
        _check_choice("FeatureSampling", "place", self.place, ("sample", "common"))
        if self.amount == 1 and not self.ratio and self.at_least == 1:
            warnings.warn(
                "FeatureSampling(1): an int is a count: one position of each map; 1.0 is everything",
                stacklevel=3,
            )

    def draw(self, batch: Batch, real: int) -> tuple[tuple[Part, ...], float]:
        S = batch.S
        width = batch.spatial[-1] if batch.spatial else 1
        positions = _amount(self, S, "positions of a map")
        vector = math.gcd(S, VECTOR)
        if self.pattern in ("run", "runs") and self.ratio:
            whole = round(positions / vector) * vector
            if whole and 8 * abs(whole - positions) <= positions:
                positions = whole
        positions = min(S, max(positions, -(-self.at_least // real)))
        align, length, stride = 1, positions, S
        if self.pattern == "run":
            align = math.gcd(positions, vector)
        elif self.pattern == "runs":
            # whole vectors where there are enough: parts of one cost more than their share
            unit = VECTOR if vector == VECTOR and positions >= (RUNS - 1) * VECTOR else 1
            length = -(-positions // min(RUNS, positions // unit))
            length = -(-length // unit) * unit
            # the last run too ends where an aligned one may: else some positions were drawn more often
            runs, align = -(-positions // length), math.gcd(length, positions, vector)
            if S // runs // align * align < length:  # nearly everything
                align, length = 1, positions
            else:
                stride = distance(batch.spatial, positions, length, align)
        elif self.pattern == "rows":
            nearest = round if self.ratio else math.ceil
            floor = max(1, -(-self.at_least // (real * width)))
            positions = min(S, max(floor, nearest(positions / width)) * width)
            align, length = width, positions
        elif self.pattern == "patch":
            height = S // width
            length = max(round(width * math.sqrt(positions / S)), -(-positions // height), 1)
            stride = width
        else:
            length, stride = 1, distance(batch.spatial, positions, 1, 1)
        common = self.place == "common"
        key = next(batch.keys)
        return (MapPlaces(1.0, key, batch.first, real, positions, length, stride, align, common),), 0.0


@dataclass(frozen=True)
class NaiveSampling(Sampler):
    """NS: scattered single values, ``p_i = 1/m``: the statistician's ideal, and slow.

    Args:
        amount: ratio or number of the values of a channel.
        at_least: floor on the number of values per channel.
    """

    amount: int | float
    at_least: int = 1
    ratio: bool = field(init=False, repr=False)  # 1.0 is everything, 1 a single one

    def __post_init__(self) -> None:
        _settle(self)

    def draw(self, batch: Batch, real: int) -> tuple[tuple[Part, ...], float]:
        total = real * batch.S
        positions = min(total, max(_amount(self, total, "values of a channel"), self.at_least))
        return (ScatteredPlaces(1.0, next(batch.keys), batch.first, real, positions),), 0.0


@dataclass(frozen=True)
class VirtualSamples(Sampler):
    """VDN: the statistics come from the last ``k`` rows of the batch, synthetic samples put there.

    Args:
        k: number of virtual samples.
    """

    k: int

    def __post_init__(self) -> None:
        if integer("VirtualSamples: k", self.k) < 1:
            raise ValueError(f"VirtualSamples: expected k of at least 1, got {self.k}")

    @property
    def virtual(self) -> int:
        return self.k

    def draw(self, batch: Batch, real: int) -> tuple[tuple[Part, ...], float]:
        return (_whole(batch, batch.rows - self.k, self.k, self.k, 1),), 0.0


@dataclass(frozen=True)
class Mixture(Sampler):
    """A hybrid: ``p = sum of w_k p_k``; beside virtual samples the others draw from the real rows only.

    Args:
        components: pairs (weight, sampler); the weights are positive and sum to 1.
    """

    components: tuple[tuple[float, Sampler], ...]

    def __init__(self, components: Iterable[tuple[float, Sampler]]) -> None:
        pairs = []
        for pair in components:
            if not (isinstance(pair, tuple | list) and len(pair) == 2):
                raise TypeError(f"Mixture: expected pairs (weight, sampler), got {pair!r}")
            weight, sampler = pair
            if not isinstance(sampler, Sampler):
                raise TypeError(f"Mixture: expected a sampler beside its weight, got {sampler!r}")
            pairs.append((_weight("Mixture", weight), sampler))
        total = math.fsum(weight for weight, _ in pairs)
        if abs(total - 1) > 1e-9:
            raise ValueError(f"Mixture: expected weights that sum to 1, got {total:g}")
        object.__setattr__(self, "components", tuple(pairs))

    @property
    def settled(self) -> bool:
        return super().settled and all(sampler.settled for _, sampler in self.components)

    @property
    def virtual(self) -> int:
        return max(sampler.virtual for _, sampler in self.components)

    def draw(self, batch: Batch, real: int) -> tuple[tuple[Part, ...], float]:
        if real < 1 and any(sampler.virtual == 0 for _, sampler in self.components):
            raise ValueError(
                f"Mixture: all {batch.rows} samples of the batch are virtual, none is left to draw from"
            )
        drawn = [(weight, *sampler.draw(batch, real)) for weight, sampler in self.components]
        parts = tuple(replace(part, weight=w * part.weight) for w, parts, _ in drawn for part in parts)
        return parts, math.fsum(w * prior for w, _, prior in drawn)


@dataclass(frozen=True)
class Prior(Sampler):
    """Statistics pulled towards given ones (the running statistics, say), for tiny batches.

    The moments of the mixture: ``mean = (1-w) m + w m0``,
    ``var = (1-w) (v + (m - mean)**2) + w (v0 + (m0 - mean)**2)``.

    Args:
        weight: ``w`` in (0, 1], the share of the given statistics; 1 is evaluation mode.
        sampler: where m and v come from.
    """

    weight: float
    sampler: Sampler = Full()

    def __post_init__(self) -> None:
        _weight("Prior", self.weight)
        if not isinstance(self.sampler, Sampler):
            raise TypeError(f"Prior: expected a sampler, got {self.sampler!r}")

    @property
    def settled(self) -> bool:
        return super().settled and self.sampler.settled

    @property
    def virtual(self) -> int:
        return self.sampler.virtual

    def draw(self, batch: Batch, real: int) -> tuple[tuple[Part, ...], float]:
        if self.weight == 1:
            return (), 1.0
        parts, prior = self.sampler.draw(batch, real)
        rest = 1 - self.weight
        return tuple(replace(part, weight=rest * part.weight) for part in parts), 1 - rest * (1 - prior)


def _whole(batch: Batch, first: int, rows: int, samples: int, stride: int) -> Part:
    return WholeSamples(1.0, next(batch.keys), batch.first + first, rows, samples, stride, batch.S)


def _weight(name: str, value: float) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name}: expected a number as weight, got {value!r}")
    if not 0 < value <= 1:
        raise ValueError(f"{name}: expected a weight in (0, 1], got {value!r}")
    return float(value)


def _check_choice(name: str, argument: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name}: expected {argument} to be one of {choices}, got {value!r}")


def _settle(sampler: BatchSampling | FeatureSampling | NaiveSampling) -> None:
    name, amount = type(sampler).__name__, sampler.amount
    if isinstance(amount, bool) or not isinstance(amount, Integral | float):
        raise TypeError(f"{name}: expected a float ratio or an int count, got {amount!r}")
    if isinstance(amount, float) and not 0 < amount <= 1:
        raise ValueError(f"{name}: expected a ratio in (0, 1], got {amount!r}")
    if not isinstance(amount, float) and amount < 1:
        raise ValueError(f"{name}: expected a count of at least 1, got {amount!r}")
    if integer(f"{name}: at_least", sampler.at_least) < 1:
        raise ValueError(f"{name}: expected at_least of 1 or more, got {sampler.at_least}")
    if not isinstance(sampler, NaiveSampling):
        _check_choice(name, "pattern", sampler.pattern, sampler.patterns)
    object.__setattr__(sampler, "ratio", isinstance(amount, float))


def _amount(sampler: BatchSampling | FeatureSampling | NaiveSampling, total: int, what: str) -> int:
    if sampler.ratio:
        return max(1, round(sampler.amount * total))
    if sampler.amount > total:
        raise ValueError(
            f"{type(sampler).__name__}: expected a count of at most the {total} {what}, got {sampler.amount}"
        )
    return int(sampler.amount)


# The converters'; the floor since deep layers' maps are small, and cost accuracy where sampled thinly.
DEFAULT = FeatureSampling(1 / 16, "runs", at_least=1024)
