"""The NumPy layer is batch_norm with a memory."""

from contextlib import nullcontext

import numpy as np
import pytest
from conftest import error

import sbncore as sbn
from sbncore.adapters.numpy import SampledBatchNorm


def test_training_moves_statistics_and_draws_anew(rng):
    sampler = sbn.BatchSampling(2)
    layer = SampledBatchNorm(3, sampler=sampler, layer=4, seed=9, activation="relu")
    mean, var = np.zeros(3, np.float32), np.ones(3, np.float32)
    for step in range(3):
        x, dy = rng.normal(size=(2, 8, 3, 5)).astype(np.float32)
        y = layer(x)
        expected, saved = sbn.batch_norm(
            x, mean, var, layer.weight, layer.bias, True, sampler=sampler, layer=4, seed=9, step=step,
            activation="relu",
        )  # fmt: skip
        assert (y == expected).all() and layer.saved.plan == saved.plan
        grads = sbn.backward(dy, saved)
        assert (layer.backward(dy) == grads.x).all()
        assert (layer.dweight == grads.weight).all() and (layer.dbias == grads.bias).all()
    assert layer.num_batches_tracked == 3 and (layer.running_mean == mean).all()
    y = layer.eval()(x)
    assert (y == sbn.batch_norm(x, mean, var, layer.weight, layer.bias, activation="relu")[0]).all()
    assert layer.num_batches_tracked == 3 and (layer.running_var == var).all()
    assert layer.train() is layer and layer.training


def test_residual_and_no_parameters(rng):
    layer = SampledBatchNorm(3, affine=False, dtype=np.float64, channel_axis=-1)
    x, residual, dy = rng.normal(size=(3, 8, 5, 3))
    layer(x, residual)
    dx, dresidual = layer.backward(dy)
    assert dx.shape == x.shape and dresidual is dy and layer.dweight is None


def test_backward_belongs_to_the_forward_in_training(rng):
    layer = SampledBatchNorm(3, sampler=sbn.BatchSampling(2))
    x, other, dy = rng.normal(size=(3, 8, 3, 5)).astype(np.float32)
    layer(x)
    saved = layer.saved
    layer.eval()(other)
    assert layer.saved is saved
    assert (layer.train().backward(dy) == sbn.backward(dy, saved).x).all()

    def refused():
        with pytest.raises(ValueError, match="backward: expected a forward before it, in training"):
            layer.backward(dy)

    refused()  # once
    layer.eval()(x)
    refused()
    layer.train()(x)
    with pytest.raises(ValueError, match="dy: expected shape"):
        layer.backward(dy[:2])
    layer.backward(dy)  # what was refused may be asked for again
    layer(x)
    with pytest.raises(ValueError, match="running_mean: expected shape"):
        layer(x[:, :2])
    refused()


@pytest.mark.parametrize("check", [None, True])
def test_an_x_that_changed_is_noticed(rng, check):
    """A few values of a large x by default; every one of any x if asked."""
    shape = (8, 3, 5) if check else (8, 3, 110, 100)
    layer = SampledBatchNorm(3, sampler=sbn.BatchSampling(2), check=check)
    x, dy = rng.normal(size=(2, *shape)).astype(np.float32)
    keep = x.copy()

    def doubled():
        x[...] *= 2

    def negated():
        np.negative(x, out=x)

    def replaced():
        x[...] = dy

    def one():
        x[3, 1, 2] += 1

    for change in (doubled, negated, replaced, *([one] if check else [])):
        layer(x)
        change()
        with pytest.raises(ValueError, match="expected x as it was in forward, got one that has changed"):
            layer.backward(dy)
        with pytest.raises(ValueError, match="saved: expected x as it was") if not check else nullcontext():
            sbn.backward(dy, layer.saved)
        x[...] = keep
        layer.backward(dy)
    layer.check = False
    layer(x)
    doubled()
    layer.backward(dy)


def test_an_x_that_was_copied_may_change(rng):
    x, dy = rng.normal(size=(2, 8, 3, 110, 200)).astype(np.float32)[..., ::2]
    layer = SampledBatchNorm(3, check=True)
    layer(x)
    expected = sbn.backward(dy, layer.saved).x
    x *= 2
    assert (layer.backward(dy) == expected).all()


def test_without_tracking_evaluation_uses_the_batch(rng):
    layer = SampledBatchNorm(3, track_running_stats=False).eval()
    x = rng.normal(4, 2, size=(8, 3, 5)).astype(np.float32)
    assert error(layer(x).mean((0, 2)), np.zeros(3)) < 1e-5 and layer.running_mean is None


def test_a_refused_batch_moves_nothing(rng):
    layer = SampledBatchNorm(3)
    with pytest.raises(ValueError, match="running_mean: expected shape"):
        layer(rng.normal(size=(8, 4, 5)).astype(np.float32))
    with pytest.raises(ValueError, match="expected more than 1 value per channel"):
        layer(np.zeros((1, 3), np.float32))
    assert layer.num_batches_tracked == 0 and (layer.running_mean == 0).all()
    with pytest.raises(ValueError, match="backward: expected a forward before it"):
        layer.backward(np.zeros((1, 3), np.float32))
