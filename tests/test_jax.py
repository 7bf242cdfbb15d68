"""JAX's batch_norm: the functional API's results, bit for bit, under every transformation of JAX's."""

import os
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
from product import SAMPLERS

jax = pytest.importorskip("jax")

import jax.numpy as jnp  # noqa: E402
from jax.test_util import check_grads  # noqa: E402

import sbncore as sbn  # noqa: E402
from sbncore.adapters.jax import batch_norm  # noqa: E402

SHAPE = (33, 7, 8, 8)
SAMPLER = sbn.FeatureSampling(1 / 4)
DTYPES = {"float32": "float32", "float16": "float16", "bfloat16": "bfloat16"}


def arrays(rng, dtype="float32", shape=SHAPE, channels=8):
    """x, dy and a residual, and mean, var, weight and bias."""
    x, dy, residual = (jnp.asarray(a, dtype) for a in rng.normal(size=(3, *shape)))
    mean, var, weight, bias = (jnp.asarray(a, "float32") for a in rng.uniform(0.5, 1.5, size=(4, channels)))
    return (x, dy, residual), (mean, var, weight, bias)


def functional(x, mean, var, weight, bias, dy, residual, **options):
    """The same by sbn.batch_norm and sbn.backward: y, the running statistics, the gradients."""
    mean, var = np.array(mean), np.array(var)
    x, weight, bias, dy = (np.asarray(a) for a in (x, weight, bias, dy))
    residual = None if residual is None else np.asarray(residual)
    y, saved = sbn.batch_norm(x, mean, var, weight, bias, True, residual=residual, **options)
    return [y, mean, var, *(g for g in sbn.backward(dy, saved) if g is not None)]


@pytest.mark.parametrize("name", [*SAMPLERS, "prior"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_it_is_the_functional_api_bit_for_bit(rng, name, dtype):
    sampler = sbn.Prior(0.25, SAMPLER) if name == "prior" else SAMPLERS[name]
    (x, dy, residual), vectors = arrays(rng, dtype)
    mean, var, weight, bias = vectors
    for add, relu, axis in ((False, False, -1), (True, True, -1), (True, False, 3), (False, True, 3)):
        options = dict(
            sampler=sampler, seed=3, layer=2, activation="relu" if relu else None, channel_axis=axis
        )

        def run(x, weight, bias, residual, step, options=options):
            y, moved = batch_norm(x, mean, var, weight, bias, True, residual=residual, step=step, **options)
            return y, moved

        @jax.jit
        def both(x, weight, bias, residual, dy, step, run=run):
            y, back, moved = jax.vjp(partial(run, step=step), x, weight, bias, residual, has_aux=True)
            return y, *moved, *back(dy)

        got = both(x, weight, bias, residual if add else None, dy, jnp.int32(5))
        want = functional(x, *vectors, dy, residual if add else None, step=5, **options)
        for a, b in zip([a for a in got if a is not None], want, strict=True):
            assert a.dtype == b.dtype and a.shape == b.shape
            assert np.array_equal(np.asarray(a), b, equal_nan=dtype != "bfloat16")


def test_every_step_draws_anew_and_compiles_once(rng):
    (x, *_), (mean, var, weight, bias) = arrays(rng)
    run = jax.jit(lambda step: batch_norm(x, mean, var, weight, bias, True, sampler=SAMPLER, step=step)[0])
    ys = [run(jnp.int32(step)) for step in range(4)]
    assert run._cache_size() == 1 and not jnp.array_equal(ys[0], ys[1])
    for step, y in enumerate(ys):
        wanted = functional(x, mean, var, weight, bias, x, None, step=step, channel_axis=-1, sampler=SAMPLER)
        assert np.array_equal(y, wanted[0])
    eager = batch_norm(x, mean, var, weight, bias, True, sampler=SAMPLER, step=2)[0]
    assert jnp.array_equal(eager, ys[2])


def test_the_gradient_is_numerically_right(rng):
    (x, _, residual), (mean, var, weight, bias) = arrays(rng, shape=(4, 3, 3, 4), channels=4)

    def run(x, weight, bias, residual):
        y, _ = batch_norm(
            x, mean, var, weight, bias, True, residual=residual, sampler=sbn.FeatureSampling(1 / 3)
        )
        return jnp.tanh(y)

    check_grads(run, (x, weight, bias, residual), order=1, modes=["rev"], atol=2e-2, rtol=2e-2, eps=1e-2)


def test_in_a_scan_a_checkpoint_and_a_vmap(rng):
    (x, *_), (mean, var, weight, bias) = arrays(rng)
    one = lambda x, weight, step: batch_norm(x, mean, var, weight, bias, True, sampler=SAMPLER, step=step)[0]  # noqa: E731
    loss = lambda weight, step: (one(x, weight, step) ** 3).sum()  # noqa: E731
    wanted = sum(jax.grad(loss)(weight, step) for step in range(3))
    scanned = lambda weight: jax.lax.scan(lambda c, step: (c, loss(weight, step)), 0, jnp.arange(3))[1].sum()  # noqa: E731
    assert jnp.allclose(jax.grad(scanned)(weight), wanted, rtol=1e-5)
    assert jnp.array_equal(
        jax.grad(jax.checkpoint(loss))(weight, jnp.int32(1)), jax.grad(loss)(weight, jnp.int32(1))
    )
    each = [one(k * x, weight, 2) for k in (1, 2)]
    assert jnp.array_equal(jax.vmap(lambda x: one(x, weight, 2))(jnp.stack([x, 2 * x])), jnp.stack(each))


def test_running_statistics_in_a_loop_and_in_evaluation(rng):
    (x, _, residual), (mean, var, weight, bias) = arrays(rng)

    def body(running, step):
        return batch_norm(x, *running, weight, bias, True, sampler=SAMPLER, step=step)[::-1]

    (mean1, var1), _ = jax.lax.scan(body, (mean, var), jnp.arange(5))
    means, variances = np.array(mean), np.array(var)
    for step in range(5):
        sbn.batch_norm(
            np.asarray(x), means, variances, training=True, sampler=SAMPLER, step=step, channel_axis=-1
        )
    assert np.array_equal(mean1, means) and np.array_equal(var1, variances)
    options = dict(residual=residual, activation="relu", eps=1e-3)
    y, (mean2, var2) = jax.jit(partial(batch_norm, **options))(x, mean1, var1, weight, bias)
    options["residual"] = np.asarray(residual)
    wanted, _ = sbn.batch_norm(*map(np.asarray, (x, mean1, var1, weight, bias)), channel_axis=-1, **options)
    assert np.allclose(y, wanted, atol=1e-5)
    assert jnp.array_equal(mean1, mean2) and jnp.array_equal(var1, var2)


def test_nothing_but_x(rng):
    (x, *_), _ = arrays(rng)
    y, (mean, var) = batch_norm(x, None, None, training=True)
    assert mean is None and var is None
    assert np.array_equal(y, sbn.forward(np.asarray(x), channel_axis=-1)[0])
    gradient = jax.grad(lambda x: (batch_norm(x, None, None, training=True)[0] ** 3).sum())(x)
    assert gradient.shape == x.shape


DEVICES = """
import jax, jax.numpy as jnp, numpy as np, sbncore as sbn
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from sbncore.adapters.jax import batch_norm

x = jnp.asarray(np.random.default_rng(0).normal(size=(8, 6, 6, 4)), "float32")
one = lambda x: batch_norm(x, None, None, training=True, sampler=sbn.FeatureSampling(1 / 4))[0]
mesh = Mesh(np.array(jax.devices()), ("d",))
assert mesh.size == 2
sharded = jax.device_put(x, NamedSharding(mesh, P("d")))
assert jnp.array_equal(jax.jit(one)(sharded), one(x))
cubed = lambda x: (one(x) ** 3).sum()
assert jnp.array_equal(jax.jit(jax.grad(cubed))(sharded), jax.grad(cubed)(x))
mapped = jax.jit(jax.shard_map(one, mesh=mesh, in_specs=P("d"), out_specs=P("d")))
assert jnp.array_equal(mapped(sharded), jnp.concatenate([one(x[:4]), one(x[4:])]))
"""


OVER_DEVICES = """
import itertools
import jax, jax.numpy as jnp, numpy as np, sbncore as sbn
from functools import partial
from jax.sharding import Mesh, PartitionSpec as P
from sbncore.adapters.jax import batch_norm

rng = np.random.default_rng(0)
x, dy, residual = (jnp.asarray(a, "float32") for a in rng.normal(1, 2, size=(3, 8, 6, 6, 4)))
mean, var, weight, bias = (jnp.asarray(a, "float32") for a in rng.uniform(0.5, 1.5, size=(4, 4)))
mesh, halves = Mesh(np.array(jax.devices()), ("d",)), (slice(0, 4), slice(4, 8))
assert mesh.size == 2


def over(x, dy, residual, **options):
    def device(x, dy, residual):
        def run(x, weight, bias, residual):
            options_ = dict(step=7, residual=residual, axis_name="d", **options)
            return batch_norm(x, mean, var, weight, bias, True, **options_)

        y, back, moved = jax.vjp(run, x, weight, bias, residual, has_aux=True)
        dx, dweight, dbias, dresidual = back(dy)
        sums = jax.lax.psum((dweight, dbias), "d")
        return y, dx, dresidual, *(each[None] for each in (*moved, *sums))

    mapped = jax.shard_map(device, mesh=mesh, in_specs=P("d"), out_specs=P("d"), check_vma=False)
    return jax.jit(mapped)(x, dy, residual)


def by_phases(sampler, gradient, activation):
    "What docs/processes.md does, with two halves."
    drawn = partial(sampler.plan, (4, 6, 6, 4), step=7, channel_axis=-1, fewest=1)
    plans = [drawn(layer=k * 2**32) for k in range(2)]
    parts = [[np.asarray(a[half]) for a in (x, dy, residual)] for half in halves]
    running = sbn.Statistics(np.asarray(mean), np.asarray(var))
    moments = [
        sbn.moments(part[0], plan, prior=running if plan.prior else None, channel_axis=-1, dtype="float64")
        for part, plan in zip(parts, plans)
    ]
    merged, given = sbn.merge(*moments), sbn.Plan(sbn.Recipe((4, 6, 6), (), 1.0))
    found, saveds = [], []
    for part, plan in zip(parts, plans):
        y, saved = sbn.forward(
            part[0], np.asarray(weight), np.asarray(bias), plan=given, channel_axis=-1,
            prior=sbn.Statistics(merged.mean, merged.var), activation=activation, residual=part[2],
        )
        options = dict(channel_axis=-1, activation=activation, residual=True)
        found.append(y)
        saveds.append(sbn.Residuals.of(saved).saved(plan=plan, **options))
    firsts, sums = (
        [sbn.backward(part[1], saved, gradient=one) for part, saved in zip(parts, saveds)]
        for one in ("detached", "sampled" if gradient == "sampled" else "detached")
    )
    totals = [sum(one.weight for one in sums), sum(one.bias for one in sums)]
    if gradient != "detached":
        for part, first, saved, moment in zip(parts, firsts, saveds, moments):
            share = np.float32(moment.count / sum(one.count for one in moments))
            sbn.repair(first.x, part[1], saved, *(share * each for each in totals))
    arrays = found, [first.x for first in firsts], [first.residual for first in firsts]
    return *map(np.concatenate, arrays), merged, totals


def close(a, b, rtol=2e-5):
    np.testing.assert_allclose(a, b, rtol=rtol, atol=2e-5)


samplers = sbn.Full(), sbn.FeatureSampling(1 / 4), sbn.BatchSampling(1), sbn.Prior(0.25, sbn.BatchSampling(2))
for sampler, gradient, activation in itertools.product(
    samplers, ("exact", "sampled", "detached"), (None, "relu")
):
    options = dict(sampler=sampler, gradient=gradient, activation=activation)
    y, dx, dresidual, new_mean, new_var, dweight, dbias = over(x, dy, residual, **options)
    wanted_y, wanted_dx, wanted_dresidual, merged, totals = by_phases(**options)
    close(y, wanted_y), close(dx, wanted_dx), close(dresidual, wanted_dresidual)
    unbiased = merged.var * merged.count / (merged.count - 1)
    for k in range(2):
        close(new_mean[k], mean + 0.1 * (merged.mean - mean)), close(new_var[k], var + 0.1 * (unbiased - var))
        close(dweight[k], totals[0], 1e-4), close(dbias[k], totals[1], 1e-4)
    if sampler == sbn.Full() and gradient == "exact":  # one device with the whole batch
        run = lambda *a: batch_norm(a[0], mean, var, *a[1:3], True, residual=a[3], activation=activation)[0]
        whole, back = jax.vjp(run, x, weight, bias, residual)
        close(y, whole), close(dx, back(dy)[0])
print("compared")
"""


@pytest.mark.parametrize("script", [DEVICES, OVER_DEVICES], ids=["alone", "together"])
def test_on_several_devices(script):
    """Sharded under jit it is the whole batch; in a shard_map each device's, or that of all by axis_name."""
    options = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, env=os.environ | options, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_a_second_derivative_is_refused_in_words(rng):
    (x, *_), _ = arrays(rng)
    loss = lambda x: (batch_norm(x, None, None, training=True)[0] ** 3).sum()  # noqa: E731
    with pytest.raises(NotImplementedError, match="cannot be differentiated twice"):
        jax.grad(lambda x: jax.grad(loss)(x).sum())(x)


@pytest.mark.parametrize("change, error, complaint", [
    ({"sampler": 1 / 16}, TypeError, "sampler: expected a Sampler, got float"),
    ({"momentum": 2}, ValueError, "momentum: expected a number in"),
    ({"eps": 0.0}, ValueError, "eps: expected a positive number"),
    ({"activation": "gelu"}, ValueError, "activation: expected one of"),
    ({"gradient": "none"}, ValueError, "gradient: expected one of"),
    ({"training": 1}, TypeError, "training: expected True or False"),
    ({"step": 1.5}, TypeError, "step: expected an integer"),
    ({"step": 2**31}, ValueError, "step: expected an integer of 32 bits"),
    ({"step": jnp.zeros(2, int)}, TypeError, "step: expected one integer, got an array"),
    ({"weight": jnp.ones(3)}, ValueError, r"weight: expected shape \(8,\)"),
    ({"bias": jnp.ones(8, "bfloat16")}, TypeError, "bias: expected dtype float32"),
    ({"residual": jnp.ones((2, 8))}, ValueError, "residual: expected shape"),
    ({"x": jnp.ones((2, 3, 8), int)}, TypeError, "x: expected dtype"),
    ({"x": jnp.ones(8)}, ValueError, "x: expected"),
    ({"running_mean": None}, ValueError, "running_mean, running_var: expected both or neither"),
    ({"running_mean": None, "running_var": None, "training": False}, ValueError, "when training is false"),
    ({"running_mean": None, "running_var": None, "sampler": sbn.Prior(0.5, SAMPLER)}, ValueError, "prior"),
])  # fmt: skip
def test_bad_input_is_refused_while_tracing(rng, change, error, complaint):
    (x, *_), (mean, var, weight, bias) = arrays(rng)
    given = dict(x=x, running_mean=mean, running_var=var, weight=weight, bias=bias, training=True) | change
    with pytest.raises(error, match=complaint):
        jax.jit(lambda x: batch_norm(**given | {"x": x}))(given["x"])
