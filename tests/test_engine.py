"""Every kernel against the reference, over the product of dtypes, layouts, samplers, shapes and options."""

import itertools

import numpy as np
import product
import pytest
from conftest import TOLERANCE, error
from hypothesis import example, given, settings
from hypothesis import strategies as st
from strategies import DTYPES, cases

import sbncore as sbn
from sbncore import reference
from sbncore.arrays import narrow
from sbncore.cpu import tuning


def check(case):
    y_true, true = case.truth()
    y, saved = case.forward()
    assert y.dtype == case.x.dtype and y.shape == case.arrange(case.x).shape
    grads = sbn.backward(case.arrange(case.dy), saved)
    tolerance = TOLERANCE[case.dtype]
    assert error(case.arranged_back(y), y_true) <= tolerance
    assert error(case.arranged_back(grads.x), true["x"]) <= tolerance
    for name in ("weight", "bias"):
        got, argument = getattr(grads, name), getattr(case, name)
        assert (got is None) == (argument is None)
        if got is not None:
            assert got.dtype == argument.dtype
            assert error(got, true[name]) <= tolerance
    assert (grads.residual is None) == (case.residual is None)
    if grads.residual is not None:
        assert error(case.arranged_back(grads.residual), true["residual"]) <= tolerance


@settings(max_examples=2400)
@given(cases())
def test_forward_and_backward_are_the_references(case):
    check(case)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("gradient", ["exact", "sampled", "detached"])
@pytest.mark.parametrize("residual", [False, True])
def test_large_arrays_use_all_threads_and_stay_right(
    rng, monkeypatch, dtype, channels_last, gradient, residual
):
    monkeypatch.setattr(tuning, "PARALLEL_ELEMENTS", 1)
    kind = DTYPES[dtype]
    x, dy, r = (rng.normal(1, 2, (6, 70, 40, 31)).astype(kind) for _ in range(3))
    r = r if residual else None
    weight, bias = rng.normal(size=(2, 70)).astype("float64" if dtype == "float64" else "float32")
    plan = sbn.FeatureSampling(1 / 8).plan(x.shape, step=5)
    y_true, saved = reference.forward(x, weight, bias, p=plan.weights(), activation="relu", residual=r)
    dy[np.abs(saved.z) < 1e-3] = 0
    true = reference.backward(dy, saved, gradient)

    def arrange(a):
        return np.moveaxis(np.ascontiguousarray(np.moveaxis(a, 1, -1)), -1, 1) if channels_last else a

    r = None if r is None else arrange(r)
    y, saved = sbn.forward(
        arrange(x), weight, bias, plan=plan, activation="relu", residual=r, gradient=gradient
    )
    grads = sbn.backward(arrange(dy), saved)
    assert y.strides == arrange(x).strides == grads.x.strides
    assert error(y, y_true) <= TOLERANCE[dtype]
    assert error(grads.x, true["x"]) <= TOLERANCE[dtype]
    for name in ("weight", "bias"):
        assert error(getattr(grads, name), true[name]) <= TOLERANCE[dtype]


@pytest.mark.parametrize("axis", [1, -1])
@pytest.mark.parametrize("sampler", [sbn.Full(), sbn.BatchSampling(4), sbn.FeatureSampling(1 / 16)])
@pytest.mark.parametrize(("far", "tolerance"), [(1e2, 2e-5), (1e4, 1e-3), (1e6, 1e-1)])
def test_far_from_zero(rng, axis, sampler, far, tolerance):
    """|mean|/std of 1e4 to 1e-3: the variance, y and dx; at 1e6 x itself has 4 bits of its deviation."""
    x = rng.normal(far, 1, (16, 8, 24, 24)).astype(np.float32)
    dy = rng.normal(size=x.shape).astype(np.float32)
    plan = sampler.plan(x.shape)
    y_true, saved_true = reference.forward(x, p=plan.weights())
    true = reference.backward(dy, saved_true)
    y, saved = sbn.forward(np.ascontiguousarray(np.moveaxis(x, 1, axis)), plan=plan, channel_axis=axis)
    grads = sbn.backward(np.ascontiguousarray(np.moveaxis(dy, 1, axis)), saved)
    assert np.abs(saved.statistics.var / saved_true.var - 1).max() < min(tolerance, 1e-5)
    assert error(np.moveaxis(y, axis, 1), y_true) < 2e-5 < tolerance * 1.001
    assert error(np.moveaxis(grads.x, axis, 1), true["x"]) < tolerance


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_an_outlier_where_the_shift_is_taken_costs_no_accuracy(rng, dtype):
    x = rng.normal(size=(8, 3, 32, 32)).astype(dtype)
    x[0, :, 16, 16] = x[0, :, 0, 0] = 3e3
    var = sbn.moments(x).var
    true = reference.moments(x, sbn.Full().plan(x.shape).weights())[1]
    assert np.abs(var / true - 1).max() < (1e-12 if dtype == "float64" else 1e-5)


@given(
    st.sampled_from(list(DTYPES)),
    st.floats(-6e4, 6e4, width=16),
    st.sampled_from([(5, 2), (4, 3, 7, 7), (3, 40, 11), (7, 1, 3)]),
    st.booleans(),
)
@example("float64", 0.1, (7, 1, 3), False)
@settings(max_examples=100)
def test_a_constant_channel_gives_exactly_the_bias(dtype, value, shape, last):
    x = np.full(shape, value, DTYPES[dtype])
    bias = np.linspace(-3, 3, shape[-1 if last else 1]).astype(np.float64 if dtype == "float64" else "f4")
    y, saved = sbn.forward(x, None, bias, channel_axis=-1 if last else 1)
    assert (saved.statistics.var == 0).all()
    along = (Ellipsis,) if last else (slice(None), *(None,) * (len(shape) - 2))
    assert (y == np.broadcast_to(bias[along], shape).astype(x.dtype)).all()


def test_what_is_not_finite_shows_and_passes_the_relu_like_torchs(rng):
    x = rng.normal(size=(4, 3, 5)).astype(np.float32)
    x[1, 1, 2] = np.nan
    x[2, 2, 3] = np.inf
    y, saved = sbn.forward(x, activation="relu")
    assert np.isfinite(y[:, 0]).all() and np.isnan(y[:, 1]).all() and np.isnan(y[:, 2]).all()
    grads = sbn.backward(np.ones_like(x), saved)
    assert np.isfinite(grads.x[:, 0]).all() and np.isnan(grads.x[:, 1]).all()


@pytest.mark.parametrize("shape", [(4, 3, 2, 2), (4, 3, 5, 5), (4, 3, 20, 20), (9, 3, 1, 1)])
@pytest.mark.parametrize("axis", [1, -1])
def test_an_infinite_gradient_reaches_only_where_the_statistics_are_from(rng, shape, axis):
    """Of its channel; and through constant statistics only its own place."""
    x, dy = rng.normal(size=(2, *shape)).astype(np.float32)
    dy[1, 1, 0, 0] = np.inf
    ordered = [np.ascontiguousarray(np.moveaxis(array, 1, axis)) for array in (x, dy)]
    for sampler in (sbn.BatchSampling(2), sbn.NaiveSampling(0.3), sbn.FeatureSampling(1 / 2, "grid")):
        plan = sampler.plan(shape, step=1)
        _, saved = sbn.forward(ordered[0], plan=plan, channel_axis=axis)
        for gradient in ("exact", "detached"):
            dx = np.moveaxis(sbn.backward(ordered[1], saved, gradient=gradient).x, axis, 1)
            drawn = plan.weights() > 0 if gradient == "exact" else np.zeros((shape[0], *shape[2:]), bool)
            drawn[1, 0, 0] = True
            assert np.isfinite(dx[:, [0, 2]]).all()
            assert (np.isfinite(dx[:, 1]) == ~drawn).all(), (sampler, gradient)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_halves_are_rounded_to_nearest_even_with_all_their_values(dtype):
    """Evaluation with mean 0 and variance 1 (eps 0) is the identity: all 65536 bit patterns come back."""
    bits = np.arange(65536, dtype=np.uint16).reshape(256, 1, 256)
    x = bits.view(DTYPES[dtype])
    one = np.ones(1, np.float32)
    y = sbn.normalize(x, sbn.Statistics(0 * one, one), eps=0.0)
    infinity = int(np.array(np.inf, DTYPES[dtype]).view(np.uint16))
    got, magnitude = y.view(np.uint16), bits & 0x7FFF
    assert (got == bits)[(magnitude > 0) & (magnitude <= infinity)].all()  # -0 becomes 0 in x - 0 + 0
    assert (got & 0x7FFF > infinity)[magnitude > infinity].all()  # a NaN stays one
    # float32 weights make every rounding of 1 * weight appear
    weights = np.linspace(0.5, 2, 65536, dtype=np.float32)
    y = sbn.normalize(
        np.ones((2, 65536), DTYPES[dtype]),
        sbn.Statistics(np.zeros(65536, np.float32), np.ones(65536, np.float32)),
        weights,
        eps=0.0,
    )
    assert (y[0].view(np.uint16) == weights.astype(DTYPES[dtype]).view(np.uint16)).all()


@pytest.mark.parametrize("sampler", product.SAMPLERS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_phases_and_the_callers_memory(rng, dtype, sampler):
    for last, relu, add in itertools.product([False, True], repeat=3):
        product.run_in_phases(rng, dtype, (8, 4, 3, 8), product.SAMPLERS[sampler], last, relu, add)


@pytest.mark.parametrize("gradient", ["exact", "sampled"])
@pytest.mark.parametrize("side", [3, 4, 7, 11])
def test_few_places_of_many_short_maps(rng, gradient, side):
    """More samples than are summed in float32, whole ones and few places by turns, and a second pass."""
    shape = 150, 37, side, side
    x, dy, residual = (rng.normal(2, 3, shape).astype(np.float32) for _ in range(3))
    weight, bias = rng.normal(size=(2, 37)).astype(np.float32)
    few = sbn.FeatureSampling(5, "runs")
    for sampler in (few, sbn.FeatureSampling(5), sbn.Mixture([(0.3, sbn.BatchSampling(9)), (0.7, few)])):
        plan = sampler.plan(shape, step=3)
        y_true, truth = reference.forward(
            x, weight, bias, p=plan.weights(), activation="relu", residual=residual
        )
        far = np.where(np.abs(truth.z) < 1e-3, 0, dy).astype(np.float32)
        true = reference.backward(far, truth, gradient)
        y, saved = sbn.forward(
            x, weight, bias, plan=plan, activation="relu", residual=residual, gradient=gradient
        )
        grads = sbn.backward(far, saved)
        assert error(y, y_true) <= TOLERANCE["float32"]
        for name in ("x", "weight", "bias", "residual"):
            assert error(getattr(grads, name), true[name]) <= TOLERANCE["float32"]


@pytest.mark.parametrize(("dtype", "storage"), [("float16", np.int16), ("bfloat16", np.uint16)])
def test_parameters_gradients_are_narrowed_to_nearest_even(rng, dtype, storage):
    """Also those half way, those that overflow, and what is not a number."""
    heads = np.arange(2**16) << 16
    bits = np.concatenate([rng.integers(0, 2**32, 20000), heads, heads | 2**15])
    values = bits.astype(np.uint32).view(np.float32)
    got = narrow(values, np.dtype(storage)).view(DTYPES[dtype])
    with np.errstate(over="ignore", invalid="ignore"):
        expected = values.astype(DTYPES[dtype])
    assert (np.isnan(got) == np.isnan(values)).all()
    assert (got == expected)[~np.isnan(values)].all()
