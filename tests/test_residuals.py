"""Residuals: what backward needs, as arrays of x's own framework, gives the gradients that Saved gives."""

import itertools

import numpy as np
import pytest
from conftest import TOLERANCE
from product import SAMPLERS

import sbncore as sbn

FRAMEWORKS = ("numpy", "torch", "jax")


def maker(framework):
    """Return what makes an array of a framework of NumPy's."""
    if framework == "numpy":
        return np.asarray
    module = pytest.importorskip(framework)
    return module.from_numpy if framework == "torch" else module.numpy.asarray


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize("dtype", ["float64", "float32", "float16"])
def test_the_gradients_are_those_of_saved(rng, framework, dtype):
    if (framework, dtype) == ("jax", "float64"):
        pytest.skip("JAX has float64 where it is told to")
    make, parameter = maker(framework), "float64" if dtype == "float64" else "float32"
    for channel_axis, relu, add in itertools.product((1, -1), (False, True), (False, True)):
        shape = (6, 5, 4, 5)
        x, dy, residual = (make(a) for a in rng.normal(size=(3, *shape)).astype(dtype))
        weight, bias = (make(a) for a in rng.normal(size=(2, 5)).astype(parameter))
        plan = sbn.FeatureSampling(1 / 4).plan(shape, step=3, channel_axis=channel_axis)
        options = dict(plan=plan, channel_axis=channel_axis, activation="relu" if relu else None)
        _, saved = sbn.forward(x, weight, bias, residual=residual if add else None, **options)
        residuals = sbn.Residuals.of(saved)
        assert all(type(each) is type(x) for each in residuals)
        wanted = sbn.backward(dy, saved)
        for got, want in zip(sbn.backward(dy, residuals.saved(residual=add, **options)), wanted, strict=True):
            assert type(got) is type(want)
            assert want is None or bool((got == want).all())


@pytest.mark.parametrize("name", [*SAMPLERS, "prior"])
def test_every_sampler(rng, name):
    sampler = sbn.Prior(0.25, sbn.FeatureSampling(1 / 4)) if name == "prior" else SAMPLERS[name]
    x, dy = rng.normal(size=(2, 33, 8, 7, 8))
    plan = sampler.plan(x.shape, step=2)
    prior = sbn.Statistics(np.zeros(8), np.ones(8)) if name == "prior" else None
    _, saved = sbn.forward(x, plan=plan, prior=prior)
    again = sbn.Residuals.of(saved).saved(plan=plan)
    assert np.array_equal(sbn.backward(dy, again).x, sbn.backward(dy, saved).x)
    assert np.abs(again.statistics.mean - saved.statistics.mean).max() <= TOLERANCE["float64"]


def test_an_array_without_elements(rng):
    x = np.ones((0, 3, 4), np.float32)
    plan = sbn.Full().plan(x.shape, fewest=0)
    _, saved = sbn.forward(x, np.ones(3, np.float32), plan=plan)
    grads = sbn.backward(x, sbn.Residuals.of(saved).saved(plan=plan))
    assert grads.x.shape == x.shape and not grads.weight.any()


def test_bytes_at_an_odd_address_are_copied(rng):
    x, dy = rng.normal(size=(2, 4, 3, 5))
    _, saved = sbn.forward(x)
    residuals = sbn.Residuals.of(saved)
    odd = np.empty(len(residuals.state) + 1, np.uint8)[1:]
    odd[...] = residuals.state
    assert np.array_equal(
        sbn.backward(dy, residuals._replace(state=odd).saved()).x, sbn.backward(dy, saved).x
    )


@pytest.mark.parametrize("change, error, complaint", [
    ({"x": np.ones((4, 3, 6))}, ValueError, r"plan: expected one drawn for \(N, \*spatial\) = \(4, 6\)"),
    ({"x": np.ones(4)}, ValueError, "x: expected"),
    ({"x": np.ones((4, 3, 5), int)}, TypeError, "x: expected dtype"),
    ({"weight": np.ones(4)}, ValueError, r"weight: expected shape \(3,\)"),
    ({"bias": np.ones(3, np.float16)}, TypeError, "bias: expected dtype float64"),
    ({"state": np.ones(8, np.uint8)}, ValueError, "state: expected 152 bytes"),
    ({"state": np.ones(152)}, TypeError, "state: expected dtype uint8, got float64"),
    ({"state": [1]}, TypeError, "state: expected an array"),
    ({"mask": np.ones(1, np.uint8)}, ValueError, "mask: expected 0 bytes"),
])  # fmt: skip
def test_what_does_not_fit_is_refused(rng, change, error, complaint):
    x = rng.normal(size=(4, 3, 5))
    plan = sbn.FeatureSampling(1 / 2).plan(x.shape)
    residuals = sbn.Residuals.of(sbn.forward(x, plan=plan)[1])
    with pytest.raises(error, match=complaint):
        residuals._replace(**change).saved(plan=plan)


@pytest.mark.parametrize("options, error, complaint", [
    ({"gradient": "none"}, ValueError, "gradient: expected one of"),
    ({"activation": "gelu"}, ValueError, "activation: expected one of"),
    ({"residual": None}, TypeError, "residual: expected True or False"),
    ({"plan": 1 / 2}, TypeError, "plan: expected a Plan"),
])  # fmt: skip
def test_options_are_checked(rng, options, error, complaint):
    residuals = sbn.Residuals.of(sbn.forward(rng.normal(size=(4, 3, 5)))[1])
    with pytest.raises(error, match=complaint):
        residuals.saved(**options)
    with pytest.raises(TypeError, match="saved: expected what forward returned, got int"):
        sbn.Residuals.of(1)
