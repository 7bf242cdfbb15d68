"""`fidelity` measures what theory says of data whose correlation is known; `suggest` keeps its tolerance."""

import math

import array_api_strict as xp
import foreign
import numpy as np
import pytest

import sbncore as sbn

SHAPE = (64, 24, 12, 16)


@pytest.fixture
def independent(rng):
    return rng.normal(3, 2, SHAPE)


@pytest.fixture
def correlated(rng):
    """Every sample has a level of its own in every channel: half of the variance is between samples."""
    return rng.normal(size=SHAPE) + rng.normal(size=(*SHAPE[:2], 1, 1))


def test_the_whole_batch_has_no_error(independent):
    found = sbn.fidelity(independent, sbn.Full(), draws=2)
    assert found.error < 1e-14 and found.effective > 1e28 and found.count == 64 * 192 and found.draws == 2


@pytest.mark.parametrize("kind", [sbn.NaiveSampling, sbn.BatchSampling, sbn.FeatureSampling])
def test_independent_values_count_fully(independent, kind):
    sampler = kind(1 / 16)
    found = sbn.fidelity(independent, sampler, draws=100)
    fewer = 1 - 1 / 16  # of a finite population all that was not drawn is left to err by
    assert found.effective * fewer == pytest.approx(found.count, rel=0.15)
    # the deviation of a normal's standard deviation is that of its mean over the root of 2
    assert found.std_error == pytest.approx(found.mean_error / math.sqrt(2), rel=0.15)
    assert abs(found.correlation) < 1e-3 and str(found).startswith(f"{sampler}: mean off by 0.0")


def test_correlated_samples_count_as_what_they_are(correlated):
    found = sbn.fidelity(correlated, sbn.BatchSampling(8, pattern="random"), draws=200)
    assert found.count == 8 * 192
    assert found.effective == pytest.approx(8 / (1 / 2 + 1 / 384) / (1 - 1 / 8), rel=0.15)
    # a half between two of a sample, which 191 of the 1,535 others are
    assert found.correlation == pytest.approx(1 / 2 * 191 / 1535 * (1 - 1 / 8), rel=0.15)
    assert sbn.fidelity(correlated, sbn.FeatureSampling(1 / 8), draws=50).effective > 20 * found.effective


def test_the_errors_are_those_of_the_draws(rng):
    x = rng.normal(size=(6, 3, 5, 4))
    sampler = sbn.FeatureSampling(5)
    found = sbn.fidelity(x, sampler, draws=4, seed=7, eps=0.5)
    mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3)) + 0.5
    drawn = [sbn.moments(x, sampler.plan(x.shape, seed=7, step=step)) for step in range(4)]
    np.testing.assert_allclose(found.mean_errors**2, np.mean([(d.mean - mean) ** 2 / var for d in drawn], 0))
    deviations = [np.sqrt((d.var + 0.5) / var) - 1 for d in drawn]
    np.testing.assert_allclose(found.std_errors**2, np.mean(np.square(deviations), 0))


def test_layouts_types_and_constant_channels(rng):
    x = rng.normal(size=(8, 5, 9, 7))
    x[:, 2] = 4.0
    sampler = sbn.FeatureSampling(1 / 4)
    found = sbn.fidelity(x, sampler, draws=5)
    last = sbn.fidelity(np.moveaxis(x, 1, -1).copy(), sampler, draws=5, channel_axis=-1)
    narrow = sbn.fidelity(x.astype(np.float16), sampler, draws=5)
    assert found.mean_errors[2] == found.std_errors[2] == 0
    for other, tolerance in ((last, 1e-12), (narrow, 1e-2)):
        np.testing.assert_allclose(other.mean_errors, found.mean_errors, atol=tolerance)
        np.testing.assert_allclose(other.std_errors, found.std_errors, atol=tolerance)


def test_what_overflows_is_no_small_error(rng):
    x = rng.normal(size=(8, 3, 6, 6)).astype(np.float32)
    x[:, 1] *= np.float32(1e30)
    with np.errstate(all="ignore"):
        assert np.isnan(sbn.fidelity(x, sbn.FeatureSampling(1 / 4), draws=2).error)
        assert sbn.suggest(x, draws=2) == sbn.Full()


def test_virtual_samples_are_held_against_the_real_ones(rng):
    x = rng.normal(size=(20, 4, 6, 6))
    x[16:] += 1
    found = sbn.fidelity(x, sbn.VirtualSamples(4), draws=3)
    real, virtual = x[:16], x[16:]
    expected = (virtual.mean((0, 2, 3)) - real.mean((0, 2, 3))) / np.sqrt(real.var((0, 2, 3)) + 1e-5)
    np.testing.assert_allclose(found.mean_errors, abs(expected))


@pytest.mark.parametrize("kind", [xp.asarray, foreign.Array])
def test_arrays_that_cannot_be_cut(independent, kind):
    for sampler in (sbn.BatchSampling(4), sbn.VirtualSamples(3), sbn.Full()):
        got, expected = sbn.fidelity(kind(independent), sampler), sbn.fidelity(independent, sampler)
        assert (got.mean_errors == expected.mean_errors).all() and got.count == expected.count
        assert (got.std_errors == expected.std_errors).all()
    assert sbn.suggest(kind(independent)) == sbn.suggest(independent)


def test_estimates_have_no_gradient_that_could_get_lost(independent):
    torch = pytest.importorskip("torch")
    x = torch.from_numpy(independent).requires_grad_()
    sampler = sbn.BatchSampling(2)
    assert sbn.fidelity(x, sampler).error == sbn.fidelity(independent, sampler).error


def test_suggest_returns_the_cheapest_that_will_do(correlated):
    for tolerance in (0.03, 0.1, 0.3):
        sampler = sbn.suggest(correlated, tolerance=tolerance)
        assert sbn.fidelity(correlated, sampler, draws=16).error <= tolerance
    assert sbn.suggest(correlated, tolerance=1e-6) == sbn.Full()
    assert isinstance(sbn.suggest(correlated, tolerance=0.1), sbn.FeatureSampling)
    chosen = [sbn.BatchSampling(1 / 64), sbn.NaiveSampling(1 / 2), sbn.NaiveSampling(1 / 4)]
    assert sbn.suggest(correlated, tolerance=0.1, candidates=iter(chosen)) == chosen[1]
    assert sbn.suggest(correlated[:, :, 0, 0], tolerance=0.5, draws=4) == sbn.BatchSampling(1 / 16)


def test_suggest_looks_at_the_memory():
    """Four short runs cost more cache lines than one, but where a position is a row of channels."""
    x = np.zeros((8, 2, 32, 32))
    inner = np.moveaxis(x, 1, -1).copy()
    tolerance = np.float32(0.05)
    assert sbn.suggest(x, tolerance=tolerance) == sbn.FeatureSampling(1 / 64)
    assert sbn.suggest(inner, channel_axis=-1) == sbn.FeatureSampling(1 / 64, "runs")
    assert sbn.suggest(np.moveaxis(inner, -1, 1)) == sbn.FeatureSampling(1 / 64, "runs")


@pytest.mark.parametrize("sampler, first, last", [
    (sbn.Full(), 1, 1),
    (sbn.BatchSampling(1 / 4), 1 / 4, 1 / 4),
    (sbn.FeatureSampling(64), 79 / 1024, 1 / 16),  # a run lies in up to 79 values' lines
    (sbn.FeatureSampling(64, "runs"), 124 / 1024, 1 / 16),
    (sbn.NaiveSampling(1 / 64), 1 / 4, 1 / 64),
    (sbn.Mixture([(0.5, sbn.BatchSampling(2)), (0.5, sbn.NaiveSampling(64))]), 3 / 8, 1 / 4 + 1 / 128),
])  # fmt: skip
def test_the_share_counts_cache_lines(sampler, first, last):
    x = np.random.default_rng(0).normal(size=(8, 2, 32, 32)).astype("f4")
    found = sbn.fidelity(x, sampler, draws=1)
    assert found.share == pytest.approx(first) and found.passes == min(8, 5 + 4 * found.share)
    inner = np.ascontiguousarray(np.moveaxis(x, 1, -1))
    assert sbn.fidelity(inner, sampler, draws=1, channel_axis=-1).share == pytest.approx(last)


@pytest.mark.parametrize("change, kind, message", [
    ({"x": np.zeros((0, 3, 4))}, ValueError, "x: expected values, got an empty array"),
    ({"candidates": 3}, TypeError, "candidates: expected samplers, got 3"),
    ({"candidates": [sbn.Full(), 0.5]}, TypeError, "candidates: expected samplers, got 0.5 among them"),
    ({"candidates": [sbn.BatchSampling(5)]}, ValueError, "expected a count of at most the 4 samples"),
    ({"draws": 0}, ValueError, "draws: expected at least 1, got 0"),
])  # fmt: skip
def test_what_suggest_refuses_beside_tolerances(change, kind, message):
    given = {"x": np.ones((4, 3, 2, 2))} | change
    with pytest.raises(kind, match=message):
        sbn.suggest(given.pop("x"), **given)


@pytest.mark.parametrize("change, kind, message", [
    ({"sampler": 1 / 16}, TypeError, "sampler: expected a Sampler, got float"),
    ({"sampler": sbn.Prior(0.5)}, ValueError, "sampler: expected one that draws from x alone, got Prior"),
    ({"draws": 0}, ValueError, "draws: expected at least 1, got 0"),
    ({"draws": 1.5}, TypeError, "draws: expected an integer, got 1.5"),
    ({"eps": -1.0}, ValueError, "eps: "),
    ({"x": np.zeros((0, 3, 4))}, ValueError, r"x: expected values, got an empty array of shape \(0, 3, 4\)"),
    ({"x": np.zeros(3)}, ValueError, "x: "),
    ({"sampler": sbn.VirtualSamples(4)}, ValueError, "x: expected samples beside 4 virtual ones, got 4 in"),
    ({"sampler": sbn.BatchSampling(5)}, ValueError, "expected a count of at most the 4 samples"),
])  # fmt: skip
def test_what_fidelity_refuses(change, kind, message):
    given = {"x": np.ones((4, 3, 2, 2)), "sampler": sbn.Full()} | change
    with pytest.raises(kind, match=message):
        sbn.fidelity(given.pop("x"), given.pop("sampler"), **given)


@pytest.mark.parametrize(
    "tolerance, kind", [(0, ValueError), (math.nan, ValueError), ("0.1", TypeError), (True, TypeError)]
)
def test_what_suggest_refuses(tolerance, kind):
    with pytest.raises(kind, match="tolerance: expected a "):
        sbn.suggest(np.ones((4, 3, 2, 2)), tolerance=tolerance)
