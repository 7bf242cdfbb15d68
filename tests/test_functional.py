"""The public functions: batch_norm as torch's, the phases, out, needs, and what must not move."""

import numpy as np
import pytest
from conftest import TOLERANCE, error
from strategies import DTYPES
from test_samplers import EVERY

import sbncore as sbn
from sbncore import reference


@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("sampler", EVERY, ids=str)
@pytest.mark.parametrize("axis", [1, -1])
def test_the_exact_gradient_is_the_derivative_of_the_forward(rng, sampler, activation, axis):
    shape = (6, 2, 4, 8)
    plan = sampler.plan(shape, step=2)
    prior = sbn.Statistics(rng.normal(size=2), rng.uniform(1, 2, 2)) if plan.prior else None

    def forward(x, weight, bias, residual):
        return sbn.forward(
            x, weight, bias, plan=plan, prior=prior, channel_axis=axis, activation=activation,
            residual=residual,
        )  # fmt: skip

    x, residual = (np.ascontiguousarray(np.moveaxis(a, 1, axis)) for a in rng.normal(size=(2, *shape)))
    ones, zeros = np.ones(2), np.zeros(2)
    z = sbn.forward(x, ones, zeros, plan=plan, prior=prior, channel_axis=axis, residual=residual)[0]
    residual = residual + np.where(np.abs(z) < 0.05, 0.2, 0.0)  # away from the kink
    arguments = {"x": x, "weight": ones, "bias": zeros, "residual": residual}
    report = sbn.check_gradients(forward, sbn.backward, arguments)
    assert report, str(report)


@pytest.mark.parametrize("dtype", DTYPES)
def test_running_statistics_average_what_was_used(rng, dtype):
    x = rng.normal(2, 3, (8, 5, 6, 6)).astype(DTYPES[dtype])
    parameter = np.float64 if dtype == "float64" else np.float32
    mean, var = np.zeros(5, parameter), np.ones(5, parameter)
    sampler = sbn.BatchSampling(2)
    _, saved = sbn.batch_norm(x, mean, var, training=True, momentum=0.25, sampler=sampler, step=4)
    used = saved.statistics
    assert used.count == 72 and used.mean.dtype == used.var.dtype == parameter
    assert error(mean, 0.25 * used.mean) < TOLERANCE[dtype]
    assert error(var, 0.75 + 0.25 * used.var * 72 / 71) < TOLERANCE[dtype]
    assert saved.plan == sampler.plan(x.shape, step=4)
    evaluated, _ = sbn.batch_norm(x, mean, var)
    x64 = x.astype(np.float64)
    along = (slice(None), None, None)
    expected = (x64 - mean[along]) / np.sqrt(var[along].astype(np.float64) + 1e-5)
    assert error(evaluated, expected) < TOLERANCE[dtype]


def test_momentum_none_is_the_cumulative_average(rng):
    xs = rng.normal(size=(5, 8, 3, 4))
    mean, var = np.zeros(3), np.ones(3)
    for step, x in enumerate(xs):
        sbn.batch_norm(x, mean, var, training=True, momentum=None, step=step)
    assert error(mean, xs.mean((0, 1, 3))) < 1e-14
    assert error(var, np.mean([x.var((0, 2), ddof=1) for x in xs], axis=0)) < 1e-14


def test_a_prior_is_taken_from_the_running_statistics_and_stays_unbiased(rng):
    """At batch size 1 the running variance settles at the true one: its count is 1 / sum p**2."""
    mean, var = np.zeros(400), np.full(400, 4.0)
    for step in range(400):
        x = rng.normal(1, 2, (1, 400))
        sbn.batch_norm(x, mean, var, training=True, momentum=0.05, sampler=sbn.Prior(0.5), step=step)
    assert abs(mean.mean() - 1) < 0.05 and abs(var.mean() / 4 - 1) < 0.1


def test_skip_nonfinite_leaves_the_running_statistics_of_that_channel(rng):
    x = rng.normal(size=(4, 3, 5)).astype(np.float32)
    x[0, 1, 0] = np.inf
    mean, var = np.zeros(3, np.float32), np.ones(3, np.float32)
    sbn.batch_norm(x, mean, var, training=True, skip_nonfinite=True)
    assert mean[1] == 0 and var[1] == 1 and np.isfinite([mean, var]).all() and mean[0] != 0 != mean[2]
    sbn.batch_norm(x, mean, var, training=True)
    assert np.isfinite(mean).tolist() == [True, False, True]


@pytest.mark.parametrize("shape", [(0, 3, 4), (0, 3), (5, 3, 0), (5, 0, 4), (5, 0, 16), (5, 0)])
def test_an_empty_batch_moves_nothing(shape):
    C = shape[1]
    x, mean, var = np.zeros(shape, np.float32), np.full(C, 2, np.float32), np.full(C, 3, np.float32)
    weight = np.ones(C, np.float32)
    y, saved = sbn.batch_norm(x, mean, var, weight, weight, training=True, sampler=sbn.BatchSampling(0.5))
    assert y.shape == shape and (mean == 2).all() and (var == 3).all()
    grads = sbn.backward(y, saved)
    assert grads.x.shape == shape and (grads.weight == 0).all() and grads.bias.shape == (C,)
    assert sbn.batch_norm(x, mean, var)[0].shape == shape


def test_needs_computes_what_is_asked(rng):
    x, dy, residual = rng.normal(size=(3, 4, 3, 10))
    weight, bias = np.ones(3), np.zeros(3)
    for gradient in ("exact", "sampled", "detached"):
        for sampler in (sbn.Full(), sbn.BatchSampling(2)):
            plan = sampler.plan(x.shape)
            _, saved = sbn.forward(
                x, weight, bias, plan=plan, residual=residual, activation="relu", gradient=gradient
            )
            everything = sbn.backward(dy, saved)
            for needs in ("x", "weight", "bias", "residual", "x residual", "weight residual", ""):
                needs = needs.split()
                some = sbn.backward(dy, saved, needs=needs)
                for name in ("x", "weight", "bias", "residual"):
                    got = getattr(some, name)
                    assert (got is None) == (name not in needs)
                    # another kernel instance may order its sums otherwise
                    assert got is None or error(got, getattr(everything, name)) < 1e-14


def test_parameters_not_given_have_no_gradient(rng):
    x = rng.normal(size=(4, 3, 10))
    grads = sbn.backward(x, sbn.forward(x)[1])
    assert grads.weight is grads.bias is grads.residual is None
    saved = sbn.forward(x, residual=x)[1]
    assert sbn.backward(x, saved).residual is x


def test_backward_may_be_asked_for_another_gradient(rng):
    x, dy = rng.normal(size=(2, 8, 3, 10))
    plan = sbn.BatchSampling(2).plan(x.shape)
    saved = sbn.forward(x, plan=plan)[1]
    for gradient in ("exact", "sampled", "detached"):
        own = sbn.forward(x, plan=plan, gradient=gradient)[1]
        assert (sbn.backward(dy, own).x == sbn.backward(dy, saved, gradient=gradient).x).all()


@pytest.mark.parametrize("last", [False, True])
def test_out_is_written_and_returned(rng, last):
    x, dy = rng.normal(size=(2, 8, 3, 10)).astype(np.float32)
    if last:
        x = np.moveaxis(np.ascontiguousarray(np.moveaxis(x, 1, -1)), -1, 1)
    y, saved = sbn.forward(x)
    dx = sbn.backward(dy, saved).x
    wide = np.zeros((8, 6, 10), np.float32)
    for out in (np.empty_like(x), np.empty((8, 3, 10), np.float32), wide[:, ::2], wide[:, ::-2]):
        assert sbn.forward(x, out=out)[0] is out and (out == y).all()
        assert sbn.backward(dy, saved, out=out).x is out and (out == dx).all()
        assert sbn.normalize(x, saved.statistics, out=out) is out and error(out, y) < 1e-6
    residual = x.copy()
    expected = sbn.forward(x, residual=residual)[0]
    assert (sbn.forward(x, residual=residual, out=residual)[0] == expected).all()
    again = x.copy(order="K")
    assert sbn.normalize(again, saved.statistics, out=again) is again and error(again, y) < 1e-6


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_phases_over_ranks_are_the_whole(rng, dtype):
    """Uneven ranks and an empty one: merged moments normalize as the whole batch's."""
    x = rng.normal(5, 2, (9, 4, 6)).astype(DTYPES[dtype])
    ranks = [sbn.moments(part) for part in (x[:2], x[2:8], x[8:], x[9:])]
    merged = sbn.merge(*ranks)
    whole = sbn.moments(x)
    assert merged.count == pytest.approx(54)
    assert error(merged.mean, whole.mean) < 1e-5 and error(merged.var, whole.var) < 1e-5
    y = np.concatenate([sbn.normalize(part, merged) for part in (x[:2], x[2:8], x[8:])])
    assert error(y, reference.forward(x, p=sbn.Full().plan(x.shape).weights())[0]) < TOLERANCE[dtype]


def test_merge_weighs_like_the_mixture(rng):
    x = rng.normal(size=(6, 3, 10))
    real, virtual = x[:4], x[4:]
    plan = sbn.Mixture([(0.25, sbn.Full()), (0.75, sbn.VirtualSamples(2))]).plan(x.shape)
    merged = sbn.merge(sbn.moments(real), sbn.moments(virtual), weights=(0.25, 0.75))
    mixed = sbn.moments(x, plan)
    assert error(merged.mean, mixed.mean) < 1e-14 and error(merged.var, mixed.var) < 1e-14
    assert merged.count == pytest.approx(mixed.count)


def test_read_only_and_strided_inputs_compile_nothing_new(rng):
    from sbncore.cpu.kernels import loaded

    x = rng.normal(size=(8, 3, 10)).astype(np.float32)
    sbn.backward(x, sbn.forward(x)[1])
    before = set(loaded)
    for view in (x[1:], x[::-1], x[:, ::-1], x[:, :, 1:], np.broadcast_to(x[:1], x.shape)):
        y, saved = sbn.forward(view)
        sbn.backward(y, saved)
        assert (y == sbn.forward(view.copy())[0]).all()
    x.flags.writeable = False
    sbn.backward(x, sbn.forward(x)[1])
    assert set(loaded) == before


def test_unaligned_memory_is_right(rng):
    raw = np.zeros(8 * 3 * 10 * 4 + 1, np.uint8)
    x = raw[1:].view(np.float32).reshape(8, 3, 10)
    x[...] = rng.normal(size=x.shape)
    assert not x.flags.aligned
    assert (sbn.forward(x)[0] == sbn.forward(x.copy())[0]).all()


def test_inputs_are_left_alone(rng):
    x, dy, residual = rng.normal(size=(3, 8, 3, 10)).astype(np.float32)
    weight = bias = np.ones(3, np.float32)
    copies = [a.copy() for a in (x, dy, residual, weight)]
    saved = sbn.forward(x, weight, bias, residual=residual, activation="relu")[1]
    sbn.backward(dy, saved)
    sbn.backward(dy, saved)
    assert all((a == b).all() for a, b in zip((x, dy, residual, weight), copies, strict=True))


def test_the_residuals_mask_is_one_bit_an_element(rng):
    x = rng.normal(size=(4, 8, 28, 28)).astype(np.float32)
    for array in (x, np.moveaxis(np.ascontiguousarray(np.moveaxis(x, 1, -1)), -1, 1)):
        saved = sbn.forward(array, residual=array, activation="relu")[1]
        assert saved.state.mask.nbytes == x.size / 8 and np.shares_memory(saved.x, array)
        assert sbn.forward(array, activation="relu")[1].state.mask is None


@pytest.mark.parametrize(
    "sampler",
    [sbn.FeatureSampling(1 / 4), sbn.Mixture([(0.5, sbn.BatchSampling(4)), (0.5, sbn.NaiveSampling(40))])],
)
def test_a_step_that_an_array_holds_is_read_when_the_plan_is_used(rng, sampler):
    x, dy = rng.normal(size=(2, 8, 3, 7, 7))
    step = np.array(5)
    plan = sampler.plan(x.shape, seed=1, layer=2, step=step)
    assert plan.step is step and plan == plan and plan != sampler.plan(x.shape, seed=1, layer=2, step=step)
    for now in (5, -1, 2**60):
        step[...] = now
        fixed = sampler.plan(x.shape, seed=1, layer=2, step=now)
        assert plan.now() == fixed and fixed.now() is fixed
        assert (plan.weights() == fixed.weights()).all() and plan.effective_count == fixed.effective_count
        y, saved = sbn.forward(x, plan=plan)
        step += 1  # backward still differentiates what forward drew
        expected, kept = sbn.forward(x, plan=fixed)
        assert (y == expected).all() and (sbn.backward(dy, saved).x == sbn.backward(dy, kept).x).all()
        assert saved.statistics.count == kept.statistics.count
    y, _ = sbn.batch_norm(x, None, None, training=True, sampler=sampler, step=step)
    assert (y == sbn.batch_norm(x, None, None, training=True, sampler=sampler, step=int(step))[0]).all()


def test_outputs_lie_apart_from_statistics(rng):
    x = rng.normal(size=(8, 3, 7, 7)).astype(np.float32)
    out = np.empty_like(x)
    inside = out.reshape(-1)[:3]
    inside[:] = 1
    other, prior = np.ones(3, np.float32), sbn.Prior(0.5).plan(x.shape)
    for mean, var in ((inside, other), (other, inside)):
        given = sbn.Statistics(mean, var)
        for call in (
            lambda given=given: sbn.normalize(x, given, out=out),
            lambda given=given: sbn.forward(x, plan=prior, prior=given, out=out),
            lambda mean=mean, var=var: sbn.batch_norm(x, mean, var, training=True, out=out),
            lambda mean=mean, var=var: sbn.batch_norm(x, mean, var, out=out),
        ):
            with pytest.raises(ValueError, match="overlaps"):
                call()
    assert (inside == 1).all() and (other == 1).all()


@pytest.mark.parametrize("step", [np.zeros((), np.int32), np.zeros((2,), np.int64), np.zeros((), np.float64)])
def test_a_step_is_one_int64(step):
    with pytest.raises(TypeError, match="step: expected an integer or an array of one int64, got"):
        sbn.Full().plan((4, 3, 5), step=step)


def test_a_cumulative_average_needs_a_step_that_the_host_knows(rng):
    running = [np.zeros(3), np.ones(3)]
    with pytest.raises(ValueError, match="momentum: expected a number where an array holds the step"):
        sbn.batch_norm(rng.normal(size=(4, 3, 5)), *running, training=True, momentum=None, step=np.array(1))
    assert (running[0] == 0).all()
