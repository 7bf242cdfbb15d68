"""What is drawn: as much as was asked, anywhere with the same chance, anew at every name of a draw."""

import ctypes
import itertools
import math

import numpy as np
import pytest
from conftest import error
from scipy import stats
from strategies import runs_of

import sbncore as sbn
from sbncore import hashing
from sbncore.hashing import absorb, distinct, mix, stream_key
from sbncore.plans import WholeSamples

SHAPE = (6, 2, 4, 8)  # N, C, H, W: 192 places a channel
DRAWS = 4000

PARTIAL = [
    sbn.BatchSampling(2),
    sbn.BatchSampling(3, "strided"),
    sbn.BatchSampling(2, "random"),
    sbn.FeatureSampling(4),
    sbn.FeatureSampling(5),
    sbn.FeatureSampling(1 / 2),
    sbn.FeatureSampling(8, "rows"),
    sbn.FeatureSampling(6, "patch"),
    sbn.FeatureSampling(5, "grid"),
    sbn.FeatureSampling(9, "runs"),
    sbn.FeatureSampling(6, "patch", place="common"),
    sbn.NaiveSampling(20),
]
EVERY = [
    *PARTIAL,
    sbn.Full(),
    sbn.VirtualSamples(2),
    sbn.Mixture([(0.25, sbn.FeatureSampling(5)), (0.75, sbn.VirtualSamples(2))]),
    sbn.Mixture([(0.5, sbn.FeatureSampling(1 / 2)), (0.5, sbn.BatchSampling(2))]),
    sbn.Prior(0.25, sbn.BatchSampling(2)),
    sbn.Prior(1.0),
]


def drawn(sampler, shape=SHAPE, **name):
    return sampler.plan(shape, **name).weights() > 0


@pytest.mark.filterwarnings("ignore:FeatureSampling")
@pytest.mark.parametrize("kind", [sbn.BatchSampling, sbn.FeatureSampling, sbn.NaiveSampling])
def test_all_and_a_single_one_are_two_samplers(kind):
    assert kind(1) != kind(1.0) and kind(1.0) == kind(1.0) and hash(kind(1)) == hash(kind(1))
    counts = [kind(amount, at_least=2).plan(SHAPE).count for amount in (1.0, 1, 1.0)]
    assert counts[0] == counts[2] == 192 > counts[1]


class Half(sbn.Sampler):
    """A user's own, that compares by identity and keeps its keys."""

    def __init__(self, k):
        object.__setattr__(self, "k", k)
        object.__setattr__(self, "keys", [])

    def draw(self, batch, real):
        parts, prior = sbn.BatchSampling(self.k).draw(batch, real)
        self.keys.append(parts[0].key)
        return parts, prior


def test_a_users_own_sampler_draws_anew_with_real_keys():
    one, three = Half(1), Half(3)
    assert one != Half(1) and [each.plan(SHAPE).count for each in (one, three)] == [32, 96]
    for outer in (one, sbn.Prior(0.5, one), sbn.Mixture([(1.0, one)])):
        plans = [outer.plan(SHAPE, seed=5, layer=1, step=step) for step in (1, 2, 1)]
        assert plans[0] == plans[2] != plans[1]
        assert one.keys[-3:] == [stream_key(5, 1, step, 0) for step in (1, 2, 1)]
        assert plans[0] == outer.plan(SHAPE, seed=5, layer=1, step=np.array(1)).now()


def test_a_part_of_ones_own_is_asked_for_its_places(rng):
    class Shifted(WholeSamples):
        def places(self, S):
            begin, length = super().places(S)
            return (begin + S) % (self.rows * S), length

    plan = sbn.BatchSampling(2).plan(SHAPE, step=3)
    part = plan.parts[0]
    shifted = Shifted(*(getattr(part, f) for f in part.__dataclass_fields__))
    own = sbn.Plan(sbn.Recipe(plan.shape, (shifted,)))
    x = rng.normal(size=SHAPE)
    p = own.weights()
    assert (p != plan.weights()).any()
    assert error(sbn.moments(x, own).mean, (x * p[:, None]).sum((0, 2, 3))) < 1e-12


@pytest.mark.parametrize("sampler", PARTIAL, ids=str)
def test_every_position_has_the_same_chance(sampler):
    """Chi-square over the possible draws, which hold every position equally often."""
    draws = np.array([drawn(sampler, step=step) for step in range(DRAWS)])
    if isinstance(sampler, sbn.NaiveSampling):  # too many sets: over the positions, drawn without replacement
        counts = draws.reshape(DRAWS, 192).sum(0)
        statistic = ((counts - counts.mean()) ** 2 / counts.mean()).sum() * 191 / (192 - 20)
        assert 1e-4 < stats.chi2(191).sf(statistic) < 1 - 1e-4
        return
    whole = isinstance(sampler, sbn.BatchSampling)
    for units in [draws[:, :, 0, 0]] if whole else [draws[:, n].reshape(DRAWS, 32) for n in (0, 5)]:
        sets, counts = np.unique(units, axis=0, return_counts=True)
        assert stats.chisquare(counts).pvalue > 1e-4
        assert len(set(sets.sum(0))) == 1


@pytest.mark.parametrize("sampler", PARTIAL, ids=str)
@pytest.mark.parametrize("word", ["seed", "layer", "step"])
def test_draws_are_independent_across(sampler, word):
    """How often two draws share a place: the square of the chance, as of independent ones."""
    chance = sampler.plan(SHAPE).count / 192
    plans = [drawn(sampler, **{word: k}).ravel() for k in range(DRAWS + 1)]
    for lag in (1, 2):
        both = np.mean([a & b for a, b in zip(plans, plans[lag:], strict=False)])
        assert abs(both - chance**2) < 0.1 * chance**2
    z = np.array([p[:64].any() for p in plans]).astype(float)
    if z.std() > 0:
        assert abs(np.corrcoef(z[:-1], z[1:])[0, 1]) < 4.5 / np.sqrt(DRAWS)


def test_places_are_independent_across_samples():
    """A run's place in one sample says nothing of the place in another: a contingency table."""
    sampler = sbn.FeatureSampling(4)
    table = np.zeros((8, 8))
    for step in range(DRAWS):
        begin = sampler.plan(SHAPE, step=step).runs.begin
        table[begin[0] % 32 // 4, begin[1] % 32 // 4] += 1
    assert stats.chi2_contingency(table).pvalue > 1e-4
    common = sbn.FeatureSampling(4, place="common").plan(SHAPE).runs.begin % 32
    assert len(set(common)) == 1


def test_parts_of_a_mixture_draw_independently():
    sampler = sbn.Mixture([(0.5, sbn.FeatureSampling(4)), (0.5, sbn.FeatureSampling(4))])
    shared = np.mean([(48 - drawn(sampler, step=step).sum()) / 24 for step in range(500)])
    assert abs(shared - 1 / 8) < 0.02  # eight places for a run of four


@pytest.mark.parametrize(("size", "count"), [(2, 1), (5, 2), (6, 4), (8, 3), (16, 2), (4100, 1), (5000, 3)])
def test_distinct_draws_every_set_alike(size, count):
    rows = [tuple(sorted(distinct(stream_key(0, 0, s, 0), size, count))) for s in range(DRAWS)]
    assert all(len(set(row)) == count for row in rows)
    values = np.array(rows).ravel()
    cells = np.bincount(values * min(size, 50) // size, minlength=min(size, 50))
    share = np.diff(-(-np.arange(min(size, 50) + 1) * size // min(size, 50))) / size
    assert stats.chisquare(cells, share * cells.sum()).pvalue > 1e-4
    if size <= 16:
        sets, counts = np.unique(rows, axis=0, return_counts=True)
        assert stats.chisquare(counts).pvalue > 1e-4
        assert len(sets) == math.comb(size, count)


def test_distinct_is_a_bijection_beyond_the_sorted_sizes():
    assert sorted(distinct(123, 5001, 5001)) == list(range(5001))


@pytest.mark.parametrize(
    ("sampler", "shape", "count"),
    [
        (sbn.Full(), (6, 3, 4, 8), 192),
        (sbn.BatchSampling(4), (6, 3, 4, 8), 128),
        (sbn.BatchSampling(1 / 3), (6, 3, 4, 8), 64),
        (sbn.BatchSampling(1 / 100), (6, 3, 4, 8), 32),
        (sbn.BatchSampling(1, at_least=65), (6, 3, 4, 8), 96),
        (sbn.FeatureSampling(7), (6, 3, 4, 8), 42),
        (sbn.FeatureSampling(7, "patch"), (6, 3, 4, 8), 42),
        (sbn.FeatureSampling(7, "grid"), (6, 3, 4, 8), 42),
        (sbn.FeatureSampling(9, "runs"), (6, 3, 4, 8), 54),
        (sbn.FeatureSampling(1 / 16, "runs"), (6, 3, 56, 56), 6 * 192),
        (sbn.FeatureSampling(1 / 16, "runs"), (6, 3, 7, 7), 18),
        (sbn.FeatureSampling(1.0, "runs"), (6, 3, 7, 7), 6 * 49),
        (sbn.FeatureSampling(1 / 16, "runs", at_least=200), (6, 3, 14, 14), 204),
        (sbn.FeatureSampling(9, "rows"), (6, 3, 4, 8), 96),
        (sbn.FeatureSampling(1 / 4, "rows"), (6, 3, 4, 8), 48),
        (sbn.FeatureSampling(1 / 16, at_least=100), (6, 3, 4, 8), 102),
        (sbn.FeatureSampling(1 / 16, "rows", at_least=10**9), (6, 3, 4, 8), 192),
        (sbn.FeatureSampling(1 / 16), (6, 3, 56, 56), 6 * 192),  # 196 to whole vectors of 16
        (sbn.FeatureSampling(196), (6, 3, 56, 56), 6 * 196),
        (sbn.FeatureSampling(1 / 16), (6, 3, 7, 7), 18),
        (sbn.FeatureSampling(1.0), (6, 3), 6),
        (sbn.NaiveSampling(17), (6, 3, 4, 8), 17),
        (sbn.NaiveSampling(1 / 16), (6, 3, 4, 8), 12),
        (sbn.NaiveSampling(1 / 16, at_least=50), (6, 3, 4, 8), 50),
        (sbn.VirtualSamples(2), (6, 3, 4, 8), 64),
        (sbn.Prior(1.0), (6, 3, 4, 8), 0),
    ],
    ids=str,
)
def test_the_number_drawn_is_what_was_asked(sampler, shape, count):
    plan = sampler.plan(shape, step=11)
    assert plan.count == count == (plan.weights() > 0).sum() == plan.runs.length.sum()


@pytest.mark.parametrize("sampler", EVERY, ids=str)
def test_plans_are_values(sampler):
    plan = sampler.plan(SHAPE, seed=1, layer=2, step=3)
    assert plan == sampler.plan(SHAPE, seed=1, layer=2, step=3)
    assert hash(plan) == hash(sampler.plan((6, 99, 4, 8), seed=1, layer=2, step=3))
    assert plan == sampler.plan((6, 4, 8, 5), seed=1, layer=2, step=3, channel_axis=-1)
    assert "values per channel" in str(plan) and "Plan(" in repr(plan)
    p = plan.weights()
    assert p.shape == (6, 4, 8) and abs(p.sum() + plan.prior - 1) < 1e-12
    if p.any():
        assert plan.effective_count == pytest.approx(1 / (p**2).sum(), rel=1e-12)
    begin, length, _ = plan.runs
    assert (begin[1:] >= begin[:-1] + length[:-1]).all() and (begin % 32 + length <= 32).all()


def test_a_mixture_weighs_and_keeps_to_the_real_rows():
    mixture = sbn.Mixture([(0.25, sbn.BatchSampling(4)), (0.75, sbn.VirtualSamples(2))])
    p = mixture.plan(SHAPE).weights()
    assert p[4:].sum() == pytest.approx(0.75) and (p[:4] == 0.25 / 128).all()
    full = sbn.Mixture([(0.5, sbn.Full()), (0.5, sbn.VirtualSamples(2))]).plan(SHAPE).weights()
    assert (full[:4] == 0.5 / 128).all() and (full[4:] == 0.5 / 64).all()


def test_the_hash_is_the_one_that_is_written_down():
    """Worked by hand from the module's text, in Python integers."""
    word = 2**64

    def by_hand(z):
        z ^= z >> 30
        z = z * 0xBF58476D1CE4E5B9 % word
        z ^= z >> 27
        z = z * 0x94D049BB133111EB % word
        return z ^ z >> 31

    key = 0
    for each in (7, 3, 120, 1):
        key = by_hand(((key ^ each) + 0x9E3779B97F4A7C15) % word)
    assert key == stream_key(7, 3, 120, 1) == 0xEFE09A65D49945DC
    assert stream_key(-1, 0, 0, 0) == stream_key(2**64 - 1, 0, 0, 0)
    words = np.array([0, 1, 2**63, 2**64 - 1], np.uint64)
    assert [int(v) for v in mix(words)] == [by_hand(int(v)) for v in words]
    assert [int(v) for v in absorb(5, words)] == [absorb(5, int(v)) for v in words]
    assert mix(0x9E3779B97F4A7C15) == 0xE220A8397B1DCDAF  # SplitMix64's first output from seed 0
    assert hashing.bounded(2**64 - 1, 10) == 9 and hashing.bounded(0, 10) == 0


def test_fixed_draws_never_change():
    """Replays of old runs rest on these."""
    plan = sbn.FeatureSampling(4).plan((4, 1, 4, 8), seed=1, layer=2, step=3)
    assert plan.runs.begin.tolist() == FIXED["feature"]
    plan = sbn.BatchSampling(3, "random").plan((9, 1, 2), seed=1, layer=2, step=3)
    assert plan.runs.begin.tolist() == FIXED["batch"]
    plan = sbn.NaiveSampling(4).plan((9, 1, 1000), seed=1, layer=2, step=3)
    assert plan.runs.begin.tolist() == FIXED["naive"]


def test_distances_never_change():
    """They follow from sums of floating-point numbers, which must be the same everywhere."""
    for spatial, distances in DISTANCES.items():
        for pattern, stride in zip(("runs", "grid"), distances, strict=True):
            (part,) = sbn.FeatureSampling(1 / 16, pattern, at_least=1024).plan((32, 1, *spatial)).recipe.parts
            assert part.stride == stride, (spatial, pattern)


DISTANCES = {
    (7, 7): (12, 1),
    (14, 14): (48, 6),
    (28, 28): (272, 15),
    (32, 32): (272, 15),
    (56, 56): (752, 15),
    (112, 112): (3088, 15),
    (16, 56, 56): (11792, 15),
    (1000,): (248, 16),
}
FIXED = {"feature": [20, 32, 84, 104], "batch": [2, 8, 10], "naive": [3986, 4903, 6984, 8592]}


def test_statistics_of_many_draws_average_to_the_full_ones(rng):
    """Each sampler's mean is unbiased, and its variance but for the sample mean's own."""
    x = rng.normal(2, 3, (8, 1, 12, 12))
    true = sbn.moments(x)
    for sampler in (sbn.BatchSampling(2), sbn.FeatureSampling(1 / 8), sbn.NaiveSampling(1 / 8)):
        draws = [sbn.moments(x, sampler.plan(x.shape, step=step)) for step in range(400)]
        assert error([np.mean([d.mean for d in draws])], true.mean) < 0.05
        unbiased = [d.var * d.count / (d.count - 1) for d in draws]
        assert error([np.mean(unbiased)], true.var) < 0.05


@pytest.mark.filterwarnings("ignore:FeatureSampling")
@pytest.mark.parametrize("size", [3, 4, 16, 33, 49, 196, 784, 3136])
def test_runs_are_few_even_and_drawn_alike_by_compiled_code(size):
    from sbncore.cpu import draws, kernels
    from sbncore.cpu.kernels import DRAWS

    kernels.functions(*DRAWS)
    for amount in (1, 2, 3, 5, size // 2 + 1, size - 1, size, 1 / 64, 1 / 16, 1 / 4, 1 / 2, 0.9):
        if amount == 0 or (isinstance(amount, int) and amount > size):
            continue
        plan = sbn.FeatureSampling(amount, "runs").plan((5, 2, size), seed=size, fewest=1)
        (part,) = plan.parts
        assert part.fits(5, size) and -(-part.positions // part.length) <= 4
        compiled = runs_of(draws.drawing(plan.recipe)(plan.draw))
        for a, b in zip(compiled, plan.runs, strict=True):
            np.testing.assert_array_equal(a, b)
        if part.length < part.positions <= size // 2:
            assert part.stride >= size // 4 // 16 * 16 - 16


def test_compiled_code_hashes_to_the_same_bits():
    """`sbncore.cpu.runs` has the hash a second time; each word at its ends, sizes up to 2**32."""
    from sbncore.cpu import kernels
    from sbncore.cpu.kernels import DRAWS
    from sbncore.cpu.record import Draw

    map_places, whole_samples = kernels.functions(*DRAWS)
    out = np.empty(12, np.int64)
    begin, length, share = (out.ctypes.data + 32 * k for k in range(3))
    ends = (0, 1, -1, 2**63 - 1, -(2**63), 0x1E3779B97F4A7C15)
    random = np.random.default_rng(0).integers(-(2**63), 2**63, (100, 4)).tolist()
    for words in [(*pair, *pair[::-1]) for pair in itertools.product(ends, ends)] + random:
        key = stream_key(*words)
        fixed = dict(zip(("seed", "layer", "step", "stream"), words, strict=True))
        fixed |= {"begin": begin, "length": length, "share": share, "stride": 1, "weight": 1.0}
        for n, size in ((0, 2**32), (7, 2**32 - 1), (3, 1000), (2**20, 2)):
            draw = Draw(**fixed, first=n, rows=1, S=size, positions=1, run=1, align=1)
            map_places(ctypes.addressof(draw))
            assert draw.count == 1 and out[0] == n * size + hashing.bounded(absorb(key, n), size)
            draw = Draw(**fixed, first=0, rows=size, S=3, samples=1)
            whole_samples(ctypes.addressof(draw))
            assert draw.count == 1 and out[0] == 3 * hashing.bounded(absorb(key, 0), size)


@pytest.mark.parametrize("amount, size", [(100, 1024), (5, 1024), (1 / 20, 784), (1 / 12, 256)])
def test_runs_give_every_position_the_same_chance(amount, size):
    (part,) = sbn.FeatureSampling(amount, "runs").plan((1, 2, 1, size), fewest=1).parts
    drawn = np.zeros(size, int)
    for start in range(0, size, part.align):
        for i in range(-(-part.positions // part.length)):
            length = min(part.length, part.positions - i * part.length)
            drawn[(start + i * part.stride + np.arange(length)) % size] += 1
    assert (drawn == drawn[0]).all() and part.fits(1, size)


@pytest.mark.parametrize("pattern", ["runs", "grid"])
@pytest.mark.parametrize("width", [8, 14, 16, 28, 32, 56, 64])
def test_runs_and_grids_spread_over_the_columns(pattern, width):
    """A distance of whole rows would put them below each other: twice the error on correlated maps."""
    (part,) = sbn.FeatureSampling(1 / 16, pattern).plan((8, 1, width, width)).recipe.parts
    runs = -(-part.positions // part.length)
    covered = {(i * part.stride + k) % width for i in range(runs) for k in range(part.length)}
    assert 2 * len(covered) >= min(width, part.positions)


def test_the_distance_is_even_where_there_is_one_axis():
    for size in (100, 784, 4096):
        (part,) = sbn.FeatureSampling(1 / 16, "runs").plan((8, 1, size)).recipe.parts
        runs = -(-part.positions // part.length)
        assert part.stride == size // runs // part.align * part.align or abs(part.stride * runs - size) < 64


@pytest.mark.parametrize("axis", [2, 3, 4])
def test_spread_runs_tell_of_all_axes_of_a_volume(axis):
    x = np.moveaxis(np.broadcast_to(np.linspace(-1, 1, 16), (16, 2, 16, 16, 16)), 4, axis).copy()
    spread, one = (sbn.fidelity(x, sbn.FeatureSampling(1 / 256, p), draws=64) for p in ("runs", "run"))
    assert spread.mean_error < 0.7 * one.mean_error + 1e-12


def test_spread_runs_tell_of_all_columns():
    """Maps that rise from left to right: four runs below each other err as one run does."""
    x = np.broadcast_to(np.linspace(-1, 1, 32), (16, 2, 32, 32)).copy()
    spread = sbn.fidelity(x, sbn.FeatureSampling(1 / 64, "runs"), draws=64)
    one = sbn.fidelity(x, sbn.FeatureSampling(1 / 64), draws=64)
    assert spread.mean_error < one.mean_error / 2
