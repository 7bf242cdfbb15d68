"""How near a sampler's estimates come to the full batch's statistics, on the user's own tensor."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from numbers import Real

import numpy as np

from sbncore.arguments import Arguments, Options
from sbncore.arrays import Array, borrow, computable, on_device
from sbncore.checks import epsilon, rank
from sbncore.drawing import Sampler, integer
from sbncore.functional import moments_of
from sbncore.interchange import detached
from sbncore.layout import Layout, layout_of
from sbncore.plans import MapPlaces, Part, Plan, Recipe, WholeSamples
from sbncore.samplers import BatchSampling, FeatureSampling, Full

RATIOS = 1 / 64, 1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2
LINE = 16  # values of a cache line


@dataclass(frozen=True, eq=False)
class Fidelity:
    """What `fidelity` found: printable.

    Attributes:
        sampler: whose estimates these are.
        mean_errors, std_errors: (C,) float64, root mean squares over the draws, in standard deviations.
        count: values per channel that a draw's statistics come from, as `Statistics.count`.
        draws: how many there were.
        share: of x's cache lines, those that a draw reads, if x is of float32.
    """

    sampler: Sampler
    mean_errors: np.ndarray
    std_errors: np.ndarray
    count: float
    draws: int
    share: float

    @property
    def passes(self) -> float:
        """Passes over x's memory, forward and exact backward; full batch normalization takes 8.

        Two and three, and what is read for the statistics, and again, with dx, for the repair.
        """
        return min(8.0, 5 + 4 * self.share)

    @property
    def mean_error(self) -> float:
        """Root mean square of mean_errors over the channels."""
        return float(np.sqrt(np.mean(self.mean_errors**2)))

    @property
    def std_error(self) -> float:
        """Root mean square of std_errors over the channels."""
        return float(np.sqrt(np.mean(self.std_errors**2)))

    @property
    def error(self) -> float:
        """The larger of mean_error and std_error; NaN if one is."""
        return float(np.maximum(self.mean_error, self.std_error))

    @property
    def effective(self) -> float:
        """Independent values whose mean would be as near: ``1 / mean_error**2``, which may be infinite."""
        return 1 / self.mean_error**2 if self.mean_error else math.inf

    @property
    def correlation(self) -> float:
        """Between any two values of a draw, as if all were alike: ``(count / effective - 1) / (count - 1)``.

        Kish's design effect. Below 0 where a draw is better than independent values: without repetition, or
        evenly spread.
        """
        return (self.count / self.effective - 1) / (self.count - 1) if self.count > 1 else 0.0

    def __str__(self) -> str:
        return (
            f"{self.sampler}: mean off by {self.mean_error:.3g}, deviation by {self.std_error:.3g} standard "
            f"deviations (root mean squares over {len(self.mean_errors)} channels and {self.draws} draws); "
            f"{self.count:.4g} values, as good as {self.effective:.4g} independent ones"
        )


def fidelity(
    x: Array, sampler: Sampler, *, draws: int = 32, channel_axis: int = 1, eps: float = 1e-5, seed: int = 0
) -> Fidelity:
    """Return how far the sampler's statistics of x are from the full batch's.

    ``mean_error = (mean' - mean) / sqrt(var + eps)``, ``std_error = sqrt((var' + eps) / (var + eps)) - 1``,
    mean' and var' a draw's, mean and var all real samples'.

    Args:
        x: (N, C, *spatial), as `forward` takes it: what goes into the layer. Virtual samples, if the sampler
            takes statistics from them, are its last rows.
        sampler: how to draw; no `Prior`, whose statistics are not x's.
        draws: how many steps to draw for.
        channel_axis, eps: as `forward`.
        seed: names the draws.

    Raises:
        TypeError, ValueError: as `forward`; for draws that are no positive integer; for a prior.

    Source: the paper's measure of correlated data, Chen et al., IEEE TNNLS 32(1), 2021, section III, as
        Kish's design effect (Survey Sampling, 1965, section 8.2).
    """
    if not isinstance(sampler, Sampler):
        raise TypeError(f"sampler: expected a Sampler, got {type(sampler).__name__}")
    return _Judge(x, draws, channel_axis, eps, seed).fidelity(sampler)


class _Judge:
    """The whole batch's moments, which samplers are held against."""

    def __init__(self, x: Array, draws: int, channel_axis: int, eps: float, seed: int) -> None:
        if integer("draws", draws) < 1:
            raise ValueError(f"draws: expected at least 1, got {draws}")
        self.draws, self.axis, self.seed = draws, channel_axis, integer("seed", seed)
        self.eps = epsilon(eps, False)
        view = borrow(detached(x), "x")
        rank(view, channel_axis)
        self.layout, self.shape = layout_of(view, channel_axis), tuple(view.shape)
        if not view.size:
            raise ValueError(f"x: expected values, got an empty array of shape {self.shape}")
        with on_device(view):
            self.view = self.layout.restore(self.layout.flatten(view))
        self._whole: dict[int, tuple[np.ndarray, np.ndarray]] = {}  # of so many samples

    def fidelity(self, sampler: Sampler) -> Fidelity:
        plans = [
            sampler.plan(self.shape, channel_axis=self.axis, seed=self.seed, step=step, fewest=1)
            for step in range(self.draws)
        ]
        if plans[0].prior:
            raise ValueError(f"sampler: expected one that draws from x alone, got {sampler}")
        mean, var = self._moments_of(self.shape[0] - sampler.virtual)
        off = np.zeros((2, len(mean)))
        for plan in plans:
            drawn_mean, drawn_var, count = self._moments(plan)
            off[0] += (drawn_mean - mean) ** 2 / var
            off[1] += (np.sqrt((drawn_var + self.eps) / var) - 1) ** 2
        mean_errors, std_errors = np.sqrt(off / self.draws)
        share = lines(plans[0].recipe, self.layout) * LINE / (self.layout.N * self.layout.S)
        return Fidelity(sampler, mean_errors, std_errors, count, self.draws, min(1.0, share))

    def _moments_of(self, real: int) -> tuple[np.ndarray, np.ndarray]:
        if real < 1:
            virtual, rows = self.shape[0] - real, self.shape[0]
            raise ValueError(f"x: expected samples beside {virtual} virtual ones, got {rows} in all")
        if real not in self._whole:
            whole = WholeSamples(1.0, 0, 0, real, real, 1, self.layout.S)
            mean, var, _ = self._moments(Plan(Recipe((self.layout.N, *self.layout.spatial), (whole,))))
            self._whole[real] = mean, var + self.eps
        return self._whole[real]

    def _moments(self, plan: Plan) -> tuple[np.ndarray, np.ndarray, float]:
        options = Options(channel_axis=self.axis, fewest=1)
        mean, var, count = moments_of(Arguments(self.view), plan, options)
        return _numpy(mean), _numpy(var), count


def suggest(
    x: Array,
    *,
    tolerance: float = 0.03,
    candidates: Iterable[Sampler] | None = None,
    draws: int = 16,
    channel_axis: int = 1,
    eps: float = 1e-5,
    seed: int = 0,
) -> Sampler:
    """Return the cheapest sampler whose `Fidelity.error` on x is within the tolerance.

    Cheap is what touches few cache lines of a float32 tensor of x's layout. A step's noise is the layer's;
    errors of layers add up through a network, so that a small tolerance suits a deep one.

    Args:
        x, draws, channel_axis, eps, seed: as `fidelity`.
        tolerance: in standard deviations, positive. Errors of 0.03 cost a small network up to half a point
            of accuracy, 0.1 five (docs/choosing-a-sampler.md).
        candidates: samplers in order of preference, the first that will do is returned; by default
            FeatureSampling, of one run and of "runs", and BatchSampling, of 1/64 to 1/2, the cheapest first.

    Returns:
        A sampler; `Full` where none of the candidates will do.

    Raises:
        TypeError, ValueError: as `fidelity`; for a tolerance that is no positive number, and for candidates
            that are no samplers or cannot draw from x.
    """
    return tried(
        x,
        tolerance=tolerance,
        candidates=candidates,
        draws=draws,
        channel_axis=channel_axis,
        eps=eps,
        seed=seed,
    )[-1].sampler


def tried(
    x: Array,
    *,
    tolerance: float,
    candidates: Iterable[Sampler] | None,
    draws: int,
    channel_axis: int = 1,
    eps: float,
    seed: int,
) -> list[Fidelity]:
    """Return what `suggest` found of the candidates, in its order; the last is its choice."""
    if isinstance(tolerance, bool) or not isinstance(tolerance, Real):
        raise TypeError(f"tolerance: expected a number, got {tolerance!r}")
    if not tolerance > 0:
        raise ValueError(f"tolerance: expected a positive number, got {tolerance!r}")
    if candidates is not None:
        candidates = samplers("candidates", candidates)
    judge = _Judge(x, draws, channel_axis, eps, seed)
    if candidates is None:
        candidates = _cheapest_first(judge.layout)
    found = []
    for sampler in candidates:
        found.append(judge.fidelity(sampler))
        if found[-1].error <= tolerance:
            return found
    exact, N = np.zeros(judge.layout.C), judge.layout.N * judge.layout.S
    return [*found, Fidelity(Full(), exact, exact, N, draws, 1.0)]


def samplers(name: str, values: Iterable[Sampler]) -> list[Sampler]:
    """Return an argument's samplers as a list."""
    if not isinstance(values, Iterable):
        raise TypeError(f"{name}: expected samplers, got {values!r}")
    found = list(values)
    for one in found:
        if not isinstance(one, Sampler):
            raise TypeError(f"{name}: expected samplers, got {one!r} among them")
    return found


def lines(recipe: Recipe, layout: Layout) -> float:
    """Return the cache lines of float32 that a draw touches, a channel's share of them."""
    # in channels-last a place is a row of channels, in lines of its own
    cut = 0 if layout.last else LINE - 1
    return sum((part.count + cut * _runs(part)) / LINE for part in recipe.parts)


def _runs(part: Part) -> int:
    if isinstance(part, WholeSamples):
        return 0  # a sample's channels lie together
    return part.rows * -(-part.positions // part.length) if isinstance(part, MapPlaces) else part.count


def _cheapest_first(layout: Layout) -> list[Sampler]:
    N, S = layout.N, layout.S
    found: list[Sampler] = []
    for ratio in RATIOS:
        amount, places = round(ratio * N), round(ratio * S)
        if amount and amount * S > 1:
            found.append(BatchSampling(ratio))
        if places and N * places > 1 and S > 1:  # the better first, where they cost the same
            found += [FeatureSampling(ratio, "runs"), FeatureSampling(ratio, "run")]
    shape = (N, 1, *layout.spatial)
    return sorted(found, key=lambda sampler: lines(sampler.plan(shape, fewest=1).recipe, layout))


def _numpy(array: np.ndarray) -> np.ndarray:
    array = computable(array)
    host: np.ndarray = array.get() if hasattr(array, "get") else array
    return host
