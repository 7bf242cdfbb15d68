"""What was drawn for one call: a Recipe says how many places of which pattern, a Draw names where.

Places are flat positions ``n * S + s`` of one channel, ``S`` the product of the spatial sizes. A recipe's
parts keep a key and a few integers, never the places: they follow from the hash, on any backend
(`sbncore.hashing`). `Plan.runs` spells them out as disjoint runs of consecutive positions.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sbncore.hashing import absorb, bounded, distinct, stream_key

Ints = NDArray[np.int64]


class Runs(NamedTuple):
    """Disjoint runs of positions, in order: first position, number of positions, weight of each."""

    begin: Ints
    length: Ints
    weight: NDArray[np.float64]


@dataclass(frozen=True)
class Part:
    """Places among the samples ``first .. first+rows-1``, sharing ``weight`` of the statistics equally."""

    weight: float
    key: int  # in a Recipe that is drawn by a Draw: the number of the part's stream
    first: int
    rows: int

    @property
    def count(self) -> int:
        """Number of values per channel."""
        raise NotImplementedError

    def fits(self, N: int, S: int) -> bool:
        """Whether all places lie within N samples of S positions, each at most once."""
        return 0 <= self.first and 1 <= self.rows <= N - self.first

    def places(self, S: int) -> tuple[Ints, Ints]:
        """Return begin and length of the runs, each within one sample, in any order."""
        raise NotImplementedError

    def words(self, S: int) -> str:
        """Return what is taken, of samples of S positions."""
        raise NotImplementedError

    def _rows(self) -> str:
        last = self.first + self.rows - 1
        return f"samples {self.first} to {last}" if self.first else f"{self.rows} samples"


@dataclass(frozen=True)
class WholeSamples(Part):
    """``samples`` whole samples: ``start, start + stride, ...`` round the rows; stride 0 is a random draw.

    ``start = bounded(absorb(key, 0), rows)``; the random draw is ``distinct(key, rows, samples)``.
    """

    samples: int
    stride: int
    size: int  # positions of a sample

    @property
    def count(self) -> int:
        return self.samples * self.size

    def fits(self, N: int, S: int) -> bool:
        once = 1 <= self.samples * max(1, self.stride) <= self.rows and self.stride >= 0
        return super().fits(N, S) and once and self.size == S

    def words(self, S: int) -> str:
        how = {0: "at random", 1: "one behind the other"}.get(self.stride, f"every {self.stride}th")
        if self.samples == self.rows:
            return f"all of {self._rows()}"
        return f"{self.samples} of {self._rows()}, {how}, whole"

    def places(self, S: int) -> tuple[Ints, Ints]:
        if self.stride:
            start = bounded(absorb(self.key, 0), self.rows)
            chosen = (start + self.stride * np.arange(self.samples)) % self.rows
        else:
            chosen = distinct(self.key, self.rows, self.samples)
        return (self.first + chosen) * S, np.full(self.samples, S, np.int64)


@dataclass(frozen=True)
class MapPlaces(Part):
    """``positions`` places of every sample's map: runs of ``length`` at a distance of ``stride``.

    Sample n begins at ``start = align * bounded(absorb(key, n), S / align)`` (n = 0 for all where
    ``common``); run i covers ``start + i*stride + (0 .. length-1)`` modulo S, the last one what is left.
    """

    positions: int
    length: int
    stride: int
    align: int
    common: bool

    @property
    def count(self) -> int:
        return self.rows * self.positions

    def fits(self, N: int, S: int) -> bool:
        within = 1 <= self.length and 1 <= self.positions <= S and 1 <= self.align and S % self.align == 0
        further = (self.positions - 1) // max(1, self.length)  # runs behind the first
        last = self.positions - further * self.length
        once = not further or self.length <= self.stride <= (S - last) // further
        return super().fits(N, S) and within and once

    def words(self, S: int) -> str:
        runs = -(-self.positions // self.length)
        how = "in one run" if runs == 1 else f"in {runs} runs of {self.length}, {self.stride} apart"
        where = "at one place for all" if self.common else "its place drawn for each sample"
        return f"{self.positions} of {S} positions of every map of {self._rows()}, {how}, {where}"

    def places(self, S: int) -> tuple[Ints, Ints]:
        n = self.first + np.arange(self.rows, dtype=np.uint64)
        words = absorb(self.key, n * np.uint64(0) if self.common else n)
        start = self.align * bounded(words, S // self.align).astype(np.int64)
        if self.length >= self.positions:  # one run a sample
            row = n.astype(np.int64) * S
            tail = start + (self.positions - S)
            wraps = tail > 0
            head = np.where(wraps, S - start, self.positions)
            return np.concatenate([row + start, row[wraps]]), np.concatenate([head, tail[wraps]])
        offset = np.arange(-(-self.positions // self.length), dtype=np.int64)
        length = np.minimum(self.length, self.positions - offset * self.length)
        begin = (start[:, None] + offset * self.stride) % S
        row = np.broadcast_to((n.astype(np.int64) * S)[:, None], begin.shape)
        head = np.minimum(length, S - begin)
        tail = length - head
        wraps = tail > 0
        return (
            np.concatenate([(row + begin).ravel(), row[wraps]]),
            np.concatenate([head.ravel(), tail[wraps]]),
        )


@dataclass(frozen=True)
class ScatteredPlaces(Part):
    """``positions`` single places anywhere: ``distinct(key, rows * S, positions)``."""

    positions: int

    @property
    def count(self) -> int:
        return self.positions

    def fits(self, N: int, S: int) -> bool:
        return super().fits(N, S) and 1 <= self.positions <= self.rows * S

    def words(self, S: int) -> str:
        return f"{self.positions} single positions anywhere in {self._rows()}"

    def places(self, S: int) -> tuple[Ints, Ints]:
        begin = self.first * S + distinct(self.key, self.rows * S, self.positions)
        return begin, np.ones(self.positions, np.int64)


class Draw(NamedTuple):
    """The name of a draw: integers modulo 2**64; the step may be an array of one int64, read when used."""

    seed: int
    layer: int
    step: Any


@dataclass(frozen=True)
class Recipe:
    """How many places are drawn from arrays of one shape, in which pattern, and what they weigh.

    Attributes:
        shape: (N, *spatial) of the arrays; it serves any number of channels.
        parts: the sets of places; their weights and ``prior`` sum to 1.
        prior: weight of the given statistics; 1 is evaluation mode.
        virtual: number of trailing rows that are synthetic samples in the statistics.
    """

    shape: tuple[int, ...]
    parts: tuple[Part, ...] = ()
    prior: float = 0.0
    virtual: int = 0

    def __hash__(self) -> int:
        return self._hash

    def __reduce__(self) -> tuple[Any, ...]:
        return Recipe, (self.shape, self.parts, self.prior, self.virtual)

    @cached_property
    def _hash(self) -> int:  # asked for at every call
        return hash((self.shape, self.parts, self.prior, self.virtual))

    @property
    def N(self) -> int:
        return self.shape[0]

    @cached_property
    def S(self) -> int:
        return math.prod(self.shape[1:])

    @cached_property
    def count(self) -> int:
        """Number of values per channel that are drawn (a place drawn by two parts counts twice)."""
        return sum(part.count for part in self.parts)

    @cached_property
    def disjoint(self) -> bool:
        """Whether no two parts draw from the same samples."""
        rows = sorted((part.first, part.first + part.rows) for part in self.parts)
        return all(last <= first for (_, last), (first, _) in itertools.pairwise(rows))

    @cached_property
    def full(self) -> bool:
        """Whether every place is drawn with the same weight."""
        return len(self.parts) == 1 and self.count == self.N * self.S

    @cached_property
    def total(self) -> float:
        """The weights of parts and prior together: 1, if the recipe was not made by hand.

        Raises:
            ValueError: if a part reaches outside the shape.
        """
        for part in self.parts:
            if not part.fits(self.N, self.S):
                raise ValueError(
                    f"plan: expected parts within {self.N} samples of {self.S} positions, got {part}"
                )
        return math.fsum(part.weight for part in self.parts) + self.prior

    @cached_property
    def count_disjoint(self) -> float:
        """`Plan.effective_count` of parts that share no samples."""
        inverse = math.fsum(part.weight**2 / part.count for part in self.parts)
        return 1 / inverse if inverse else math.inf


@dataclass(frozen=True, eq=False)
class Plan:
    """The places one call draws its statistics from, and the weight of the prior beside them.

    A value: comparable, hashable, printable, a pure function of (sampler, shape, seed, layer, step). Plans
    whose step an array holds are equal to themselves alone.

    Attributes:
        recipe: what is drawn.
        draw: where; None if the keys of the recipe's parts are final, as of one made by hand.
    """

    recipe: Recipe
    draw: Draw | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return self.recipe.shape

    @property
    def N(self) -> int:
        return self.recipe.N

    @property
    def S(self) -> int:
        return self.recipe.S

    @property
    def prior(self) -> float:
        return self.recipe.prior

    @property
    def virtual(self) -> int:
        return self.recipe.virtual

    @property
    def count(self) -> int:
        return self.recipe.count

    @property
    def full(self) -> bool:
        return self.recipe.full

    @property
    def step(self) -> Any:
        """The array that holds the step, or None where the draw is made."""
        if self.draw is None or type(self.draw.step) is int or not self.recipe.parts:
            return None
        return self.draw.step

    def now(self) -> Plan:
        """Return what is drawn at the present step where an array holds it, else this plan.

        This waits for a step in a GPU's memory.
        """
        if self.draw is None or self.step is None:
            return self
        return Plan(self.recipe, self.draw._replace(step=int(self.step.item())))

    @property
    def parts(self) -> tuple[Part, ...]:
        """The recipe's parts with their final keys, at the present step."""
        draw = self.now().draw
        if draw is None:
            return self.recipe.parts
        return tuple(replace(part, key=stream_key(*draw, part.key)) for part in self.recipe.parts)

    def _value(self) -> tuple[Any, ...]:
        return self.shape, self.parts, self.prior, self.virtual

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Plan) or self is other:
            return self is other
        return self.step is None and other.step is None and self._value() == other._value()

    def __hash__(self) -> int:
        return hash(self._value()) if self.step is None else id(self)

    @property
    def effective_count(self) -> float:
        """``1 / sum(p_i ** 2)``: of how many equally weighted values the mean has the variance."""
        return self.recipe.count_disjoint if self.recipe.disjoint else self.now()._count_together

    def count_with(self, prior: Any, size: int) -> float:
        """Return the statistics' count: with the prior's, and 0 of an array of no elements."""
        if prior is None:
            return self.effective_count if size else 0.0
        inverse = self.prior**2 / prior.count
        if size and self.prior < 1:
            inverse += 1 / self.effective_count
        return 1 / inverse if inverse else math.inf

    @cached_property
    def _count_together(self) -> float:
        runs = self._runs
        total = float(np.dot(runs.length, runs.weight**2))
        return 1 / total if total else math.inf

    @property
    def runs(self) -> Runs:
        """The places as disjoint runs in order, none across two samples, weights adding up.

        Raises:
            ValueError: if a part (one made by hand) reaches outside the shape.
        """
        return self.now()._runs

    @cached_property
    def _runs(self) -> Runs:
        _, S, parts = self.recipe.total, self.recipe.S, self.parts
        spelled = [part.places(S) for part in parts]
        weights = [part.weight / part.count for part in parts]
        if not spelled:
            return Runs(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0))
        if len(spelled) == 1:
            begin, length = spelled[0]
            order = np.argsort(begin, kind="stable")
            return Runs(begin[order], length[order], np.full(begin.size, weights[0]))
        edges = np.unique(np.concatenate([edge for b, n in spelled for edge in (b, b + n)]))
        weight = np.zeros(edges.size)
        for (begin, length), each in zip(spelled, weights, strict=True):
            cover = np.zeros(edges.size, np.int64)
            np.add.at(cover, np.searchsorted(edges, begin), 1)
            np.add.at(cover, np.searchsorted(edges, begin + length), -1)
            weight += each * np.cumsum(cover)
        drawn = np.flatnonzero(weight)
        return Runs(edges[drawn], edges[drawn + 1] - edges[drawn], weight[drawn])

    def weights(self) -> NDArray[np.float64]:
        """Return ``p`` itself, (N, *spatial) in float64, spelled out for inspection and for tests."""
        p = np.zeros(self.N * self.S)
        for begin, length, weight in zip(*self.runs, strict=True):
            p[begin : begin + length] += weight
        return p.reshape(self.shape)

    def __str__(self) -> str:
        total = self.N * self.S
        share = f" ({self.count / total:.1%})" if total else ""
        lines = [f"{self.count} of {total} values per channel{share} of a batch (N, *spatial) = {self.shape}"]
        lines += [f"  weight {part.weight:g}: {part.words(self.S)}" for part in self.recipe.parts]
        if self.prior:
            lines.append(f"  weight {self.prior:g}: the given statistics")
        if self.draw is not None and self.recipe.parts:
            lines.append("  drawn by seed {}, layer {}, step {}".format(*self.draw))
        return "\n".join(lines)
