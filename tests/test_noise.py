"""Virtual samples' noise: mean 0, deviation 1, white, and the same bits for ever."""

import math

import numpy as np
import pytest
from scipy import stats

from sbncore.hashing import absorb, stream_key
from sbncore.noise import white_noise

SHAPE = (40, 5, 10, 10)  # 20,000 values


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_moments_are_those_of_four_uniform_numbers(dtype):
    noise = white_noise(SHAPE, dtype=dtype)
    assert noise.dtype == dtype and noise.shape == SHAPE
    z = noise.astype(np.float64).ravel()
    sigma = 4.5 / np.sqrt(z.size)
    assert abs(z.mean()) < sigma
    assert abs((z**2).mean() - 1) < sigma * np.sqrt(1.7)  # deviation of z**2: sqrt(kurtosis - 1)
    assert abs((z**3).mean()) < 3 * sigma
    assert abs((z**4).mean() - 2.7) < 8 * sigma
    assert abs(z).max() <= np.sqrt(12)
    assert stats.kstest(2 + z / np.sqrt(3), irwin_hall).pvalue > 1e-4


def irwin_hall(total):
    """The chance that four numbers, uniform in (0, 1), sum up to less."""
    return sum((-1) ** k * math.comb(4, k) * np.maximum(total - k, 0) ** 4 for k in range(5)) / 24


@pytest.mark.parametrize("word", ["seed", "step"])
def test_noise_is_independent_across_names(word):
    names = [white_noise((1, 4096), **{word: k}).ravel() for k in (-1, 0, 1, 2, 3, 2**40)]
    assert_uncorrelated(names)


def test_noise_is_independent_across_samples_and_elements():
    samples = white_noise((64, 64))
    assert_uncorrelated(samples)
    assert_uncorrelated(samples.T)
    flat = samples.ravel()
    for lag in (1, 2, 16, 64):
        assert_uncorrelated([flat[lag:], flat[:-lag]])


def assert_uncorrelated(rows):
    """And their squares; the bound holds for every pair of them."""
    for each in (np.asarray(rows, np.float64), np.asarray(rows, np.float64) ** 2):
        off = np.corrcoef(each)[~np.eye(len(each), dtype=bool)]
        assert abs(off).max() < 5 / np.sqrt(each.shape[1])


def test_seed_and_step_are_told_apart_and_no_layer_draws_by_their_words():
    assert not np.array_equal(white_noise((2, 3), seed=1), white_noise((2, 3), step=1))
    assert np.array_equal(white_noise((2, 3), seed=-1), white_noise((2, 3), seed=2**64 - 1))
    assert stream_key(0, 0, 0, -1) not in [stream_key(0, 0, 0, stream) for stream in range(100)]


def test_an_element_depends_on_its_own_name_alone():
    noise = white_noise((4, 2, 3), seed=5, step=6)
    assert np.array_equal(noise[:2], white_noise((2, 2, 3), seed=5, step=6))
    assert np.array_equal(noise.reshape(4, 6), white_noise((4, 6), seed=5, step=6))
    assert np.array_equal(noise[:, :1].reshape(4, 3), white_noise((4, 3), seed=5, step=6))


def test_the_noise_is_the_one_that_is_written_down():
    key = stream_key(7, 0, 120, 2**64 - 1)
    for n, i in ((0, 0), (2, 1), (3, 4)):
        word = absorb(absorb(key, n), i)
        total = sum(word >> bits & 0xFFFF for bits in (0, 16, 32, 48))
        by_hand = (total - 131070) * np.sqrt(3 / (2**32 - 1))
        assert white_noise((4, 5), seed=7, step=120, dtype="float64")[n, i] == by_hand


def test_fixed_noise_never_changes():
    """Replays of old runs rest on these."""
    noise = white_noise((2, 3), seed=1, step=2)
    assert [float(v).hex() for v in noise.ravel()] == FIXED


FIXED = [
    "-0x1.a0200e0000000p+0",
    "-0x1.87c6660000000p+0",
    "-0x1.2cbda80000000p-1",
    "0x1.0700480000000p-2",
    "0x1.8378d00000000p+0",
    "-0x1.6bbb0c0000000p-1",
]


@pytest.mark.parametrize("shape", [(0, 3), (3, 0, 2), (3,)])
def test_shapes_may_be_empty_or_of_one_axis(shape):
    assert white_noise(shape).shape == shape


@pytest.mark.parametrize(
    ("kind", "message", "shape", "name"),
    [
        (ValueError, "shape: expected", (), {}),
        (ValueError, "shape: expected", (2, -1), {}),
        (TypeError, "shape: expected an integer, got 2.0", (2.0, 3), {}),
        (TypeError, "seed: expected an integer, got 1.5", (2, 3), {"seed": 1.5}),
        (TypeError, "step: expected an integer, got True", (2, 3), {"step": True}),
        (ValueError, "dtype: expected float32 or float64, got float16", (2, 3), {"dtype": "float16"}),
    ],
)
def test_complaints(kind, message, shape, name):
    with pytest.raises(kind, match=message):
        white_noise(shape, **name)
