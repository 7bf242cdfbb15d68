"""The judge itself: a table a person can check with a pencil, and its derivatives taken numerically."""

import numpy as np
import pytest
from test_samplers import EVERY

import sbncore as sbn
from sbncore import reference


def test_with_a_pencil():
    """Two samples of two values; the sample is the first one, 1 and 3: mean 2, var 1."""
    x = np.array([[[1.0, 3.0]], [[2.0, 6.0]]])
    p = np.array([[0.5, 0.5], [0.0, 0.0]])
    y, saved = reference.forward(x, [2.0], [10.0], p=p, eps=0.0)
    assert y.tolist() == [[[8.0, 12.0]], [[10.0, 18.0]]]
    grads = reference.backward(np.array([[[1.0, 0.0]], [[0.0, 1.0]]]), saved)
    assert grads["bias"].tolist() == [2.0]  # 1 + 1
    assert grads["weight"].tolist() == [3.0]  # 1 * -1 + 1 * 4
    # dx = 2 * (g - p * (2 + xhat * 3)), xhat = -1, 1, 0, 4
    assert grads["x"].tolist() == [[[3.0, -5.0]], [[0.0, 2.0]]]
    sampled = reference.backward(np.array([[[1.0, 0.0]], [[0.0, 1.0]]]), saved, "sampled")
    assert sampled["bias"].tolist() == [2.0] and sampled["weight"].tolist() == [-2.0]
    detached = reference.backward(np.ones_like(x), saved, "detached")
    assert (detached["x"] == 2.0).all()


def test_a_prior_with_a_pencil():
    """1 and 3 (mean 2, var 1) are half, the prior (4, 3) half: mean 3, var (1 + 1)/2 + (3 + 1)/2."""
    x = np.array([[1.0], [3.0]])
    mean, var = reference.moments(x, np.array([0.25, 0.25]), (0.5, [4.0], [3.0]))
    assert mean.tolist() == [3.0] and var.tolist() == [3.0]


def test_full_is_the_textbooks(rng):
    x = rng.normal(3, 2, (5, 4, 6))
    y, _ = reference.forward(x, p=sbn.Full().plan(x.shape).weights(), eps=1e-5)
    expected = (x - x.mean((0, 2), keepdims=True)) / np.sqrt(x.var((0, 2), keepdims=True) + 1e-5)
    assert np.abs(y - expected).max() < 1e-13


@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("sampler", EVERY, ids=str)
def test_exact_is_the_derivative(rng, sampler, activation):
    shape = (6, 2, 4, 8)
    plan = sampler.plan(shape, step=2)
    prior = (plan.prior, rng.normal(size=2), rng.uniform(1, 2, 2)) if plan.prior else None

    def forward(x, weight, bias, residual):
        return reference.forward(
            x, weight, bias, p=plan.weights(), prior=prior, activation=activation, residual=residual
        )

    x, residual = rng.normal(size=(2, *shape))
    # no z within a step of the kink
    z = forward(x, np.ones(2), np.zeros(2), residual)[1].z
    residual = residual + np.where(np.abs(z) < 0.05, 0.2, 0.0)
    report = sbn.check_gradients(
        forward,
        lambda dy, saved: reference.backward(dy, saved),
        {"x": x, "weight": np.ones(2), "bias": np.zeros(2), "residual": residual},
    )
    assert report, str(report)
