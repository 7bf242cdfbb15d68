"""The Flax layer and its converter: nnx.BatchNorm's arguments, variables and results."""

import numpy as np
import pytest

pytest.importorskip("flax")

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import sbncore as sbn
from sbncore.adapters.flax import SampledBatchNorm, Step, convert_sampled_batchnorm

SAMPLER = sbn.FeatureSampling(1 / 4)


class Block(nnx.Module):
    def __init__(self, inputs, outputs, rngs):
        self.conv = nnx.Conv(inputs, outputs, (3, 3), rngs=rngs)
        self.bn = nnx.BatchNorm(outputs, momentum=0.9, rngs=rngs)

    def __call__(self, x):
        return nnx.relu(self.bn(self.conv(x)))


class Network(nnx.Module):
    def __init__(self, rngs):
        self.blocks = nnx.List([Block(1, 8, rngs), Block(8, 16, rngs)])
        self.head = nnx.Linear(16, 4, rngs=rngs)

    def __call__(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean((1, 2)))


@pytest.mark.parametrize("options", [
    {}, {"use_bias": False, "use_scale": False}, {"axis": 1}, {"momentum": 0.5, "epsilon": 1e-3},
    {"dtype": jnp.bfloat16}, {"param_dtype": jnp.bfloat16},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_full_is_flaxs_own(rng, options, dtype):
    x = jnp.asarray(rng.normal(2, 3, size=(64, 6, 6, 6)), dtype)
    theirs = nnx.BatchNorm(6, rngs=nnx.Rngs(0), **options)
    ours = SampledBatchNorm(6, rngs=nnx.Rngs(0), **options)
    tolerance = 1e-2 if "bfloat16" in f"{dtype}{options}" else 1e-5
    close = lambda a, b: np.allclose(*(c.astype("float32") for c in (a, b)), tolerance, tolerance)  # noqa: E731
    for evaluates in (False, False, True):
        a, b = (layer(x, use_running_average=evaluates) for layer in (theirs, ours))
        assert a.dtype == b.dtype and close(a, b)
        if not evaluates:  # ours is the unbiased variance, and 1 to begin with
            count, kept = 64 * 6 * 6, ours.momentum ** int(ours.step[...])
            biased = kept + (ours.var[...] - kept) * (1 - 1 / count)
            assert close(theirs.mean[...], ours.mean[...]) and close(theirs.var[...], biased)
        theirs.var[...] = ours.var[...] if ours.step[...] == 2 else theirs.var[...]


def test_the_state_is_flaxs_and_a_step():
    theirs, ours = nnx.BatchNorm(3, rngs=nnx.Rngs(0)), SampledBatchNorm(3, rngs=nnx.Rngs(0))
    state = dict(nnx.state(ours))
    assert set(state) == {*nnx.state(theirs), "step"}
    assert isinstance(ours.step, Step | nnx.BatchStat)
    assert set(nnx.state(ours, nnx.Param)) == {"scale", "bias"}
    assert set(nnx.state(ours, nnx.BatchStat)) == {"mean", "var", "step"}


def test_every_call_in_training_draws_anew_also_under_jit(rng):
    x = jnp.asarray(rng.normal(size=(16, 6, 6, 3)), "float32")
    eager, compiled = (SampledBatchNorm(3, sampler=SAMPLER, seed=2, layer=5, rngs=nnx.Rngs(0)) for _ in "ab")
    run = nnx.jit(lambda layer, x: layer(x))
    for step in range(3):
        y = run(compiled, x)
        assert jnp.array_equal(y, eager(x))
        plan = SAMPLER.plan(x.shape, seed=2, layer=5, step=step, channel_axis=-1)
        assert np.allclose(y, sbn.forward(np.asarray(x), plan=plan, channel_axis=-1)[0], atol=1e-6)
    assert compiled.step[...] == eager.step[...] == 3
    eager.eval()
    assert jnp.array_equal(eager(x), eager(x)) and eager.step[...] == 3


def test_residual_and_activation(rng):
    x, residual = (jnp.asarray(a, "float32") for a in rng.normal(size=(2, 16, 6, 3)))
    layer = SampledBatchNorm(3, activation="relu", rngs=nnx.Rngs(0))
    plain = SampledBatchNorm(3, rngs=nnx.Rngs(0))
    assert np.allclose(layer(x, residual=residual), nnx.relu(plain(x) + residual), atol=1e-6)
    layer.eval(), plain.eval()
    assert np.allclose(layer(x, residual=residual), nnx.relu(plain(x) + residual), atol=1e-6)


def test_a_model_is_converted_in_place(rng):
    model = Network(nnx.Rngs(0))
    before, variables = model.blocks[1].bn, nnx.state(model, nnx.Param)
    model.blocks[1].bn.mean[...] += 1
    assert convert_sampled_batchnorm(model, SAMPLER, seed=3) is model
    layers = [block.bn for block in model.blocks]
    assert layers[1] is before and [type(layer) for layer in layers] == [SampledBatchNorm] * 2
    assert [layer.layer for layer in layers] == [0, 1] and {layer.seed for layer in layers} == {3}
    assert layers[1].mean[...][0] == 1 and layers[1].momentum == 0.9
    after = nnx.state(model, nnx.Param)
    assert jax.tree.all(jax.tree.map(jnp.array_equal, variables, after))
    assert model(jnp.ones((4, 8, 8, 1))).shape == (4, 4)


def test_by_path_and_what_is_left():
    class Own(nnx.BatchNorm):
        pass

    model = Network(nnx.Rngs(0))
    model.own = Own(3, rngs=nnx.Rngs(0))
    convert_sampled_batchnorm(model, {"blocks/1/bn": SAMPLER})
    assert type(model.blocks[0].bn) is nnx.BatchNorm and type(model.own) is Own
    assert model.blocks[1].bn.sampler == SAMPLER and model.blocks[1].bn.layer == 1


@pytest.mark.parametrize("transform", [nnx.vmap, nnx.scan])
def test_stacked_layers_are_converted_too(rng, transform):
    make = nnx.vmap(lambda rngs: nnx.BatchNorm(3, rngs=rngs), in_axes=0, out_axes=0)
    layers = make(nnx.Rngs(0).split(2))
    assert convert_sampled_batchnorm(layers, SAMPLER).step[...].shape == (2,)
    x = jnp.asarray(rng.normal(size=(16, 6, 6, 3)), "float32")
    if transform is nnx.scan:
        run = nnx.scan(lambda x, layer: layer(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        assert run(x, layers).shape == x.shape
    else:
        ys = nnx.vmap(lambda layer, x: layer(x), in_axes=(0, None))(layers, x)
        assert jnp.array_equal(ys[0], SampledBatchNorm(3, sampler=SAMPLER, rngs=nnx.Rngs(0))(x))
    assert layers.step[...].tolist() == [1, 1]


@pytest.mark.parametrize("arguments, error, complaint", [
    ((1 / 16,), TypeError, "sampler: expected a Sampler, got float"),
    (({"bn": SAMPLER},), ValueError, "sampler: expected paths among"),
    (({"blocks/1/bn": 2},), TypeError, "sampler: expected a Sampler, got int"),
], ids=str)  # fmt: skip
def test_what_cannot_be_converted_changes_nothing(arguments, error, complaint):
    model = Network(nnx.Rngs(0))
    with pytest.raises(error, match=complaint):
        convert_sampled_batchnorm(model, *arguments)
    with pytest.raises(ValueError, match="gradient: expected one of"):
        convert_sampled_batchnorm(model, gradient="none")
    assert {type(block.bn) for block in model.blocks} == {nnx.BatchNorm}
    model.blocks[0].bn.axis_index_groups = [[0]]
    with pytest.raises(ValueError, match=r"model: .* without axis_index_groups, got one in 'blocks/0/bn'"):
        convert_sampled_batchnorm(model)
    assert {type(block.bn) for block in model.blocks} == {nnx.BatchNorm}


def test_what_a_layer_refuses():
    make = lambda **options: SampledBatchNorm(3, rngs=nnx.Rngs(0), **options)  # noqa: E731
    for options, error, complaint in (
        ({"sampler": 1}, TypeError, "sampler: expected a Sampler"),
        (
            {"gradient": "sampled", "sampler": sbn.VirtualSamples(1)},
            ValueError,
            "gradient: 'sampled' expects",
        ),
        ({"axis_index_groups": [[0]]}, ValueError, "axis_index_groups: expected None"),
    ):
        with pytest.raises(error, match=complaint):
            make(**options)
    layer, x = make(use_running_average=None), jnp.ones((4, 3))
    with pytest.raises(ValueError, match="use_running_average: expected True or False"):
        layer(x)
    with pytest.raises(ValueError, match="mask: expected None"):
        make()(x, mask=jnp.ones(4, bool))
    layer = make(sampler=SAMPLER)
    with pytest.raises(ValueError, match="x: expected"):
        layer(jnp.ones(3))
    assert layer.step[...] == 0 and not layer.mean[...].any()


def test_an_axis_that_is_not_mapped_is_refused_and_moves_nothing(rng):
    layer = SampledBatchNorm(3, rngs=nnx.Rngs(0), axis_name="i")
    with pytest.raises(NameError, match="unbound axis name"):
        layer(jnp.asarray(rng.normal(size=(8, 6, 3)), "float32"))
    assert layer.step[...] == 0


def test_it_trains(rng):
    """Bars in one of four directions, under nnx.jit and value_and_grad; then evaluation."""
    labels = rng.integers(0, 4, 512)
    images = rng.normal(size=(512, 8, 8, 1)).astype("float32")
    for image, label in zip(images, labels, strict=True):
        image[(3, slice(None)) if label < 2 else (slice(None), 3)] += 3 if label % 2 else -3
    model = convert_sampled_batchnorm(Network(nnx.Rngs(0)), SAMPLER)
    optimizer = nnx.Optimizer(model, optax.sgd(0.1, 0.9), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, x, y):
        def loss(model):
            return optax.softmax_cross_entropy_with_integer_labels(model(x), y).mean()

        optimizer.update(model, nnx.grad(loss)(model))

    for _ in range(6):
        for begin in range(0, 448, 64):
            step(model, optimizer, images[begin : begin + 64], labels[begin : begin + 64])
    assert model.blocks[0].bn.step[...] == 42
    model.eval()
    right = model(jnp.asarray(images[448:])).argmax(1) == labels[448:]
    assert right.mean() > 0.9
