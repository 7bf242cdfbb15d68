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


def test_a_saved_state_goes_on_with_the_same_draws(rng, tmp_path):
    def new():
        return SampledBatchNorm(3, sampler=sbn.FeatureSampling(1 / 4), layer=2)

    batches = rng.normal(2, 3, (4, 8, 3, 6, 6)).astype(np.float32)
    whole, first, second = new(), new(), new()
    for x in batches[:2]:
        whole(x), first(x)
    state = first.state_dict()
    np.savez(tmp_path / "state.npz", **state)
    first(batches[3])  # which does not reach the state
    second.load_state_dict(np.load(tmp_path / "state.npz"))
    for x in batches[2:]:
        assert (whole(x) == second(x)).all()
    assert (whole.running_var == second.running_var).all() and second.num_batches_tracked == 4
    bare = SampledBatchNorm(3, affine=False, track_running_stats=False)
    assert bare.state_dict().keys() == {"num_batches_tracked"}


def test_states_are_torchs_too(rng):
    torch = pytest.importorskip("torch")
    theirs, ours = torch.nn.BatchNorm1d(3), SampledBatchNorm(3)
    x = rng.normal(size=(8, 3, 5)).astype(np.float32)
    theirs(torch.from_numpy(x))
    ours.load_state_dict({name: value.numpy() for name, value in theirs.state_dict().items()})
    assert ours.num_batches_tracked == 1 and (ours.running_mean == theirs.running_mean.numpy()).all()
    again = {name: torch.from_numpy(value) for name, value in ours.state_dict().items()}
    theirs.load_state_dict(again)


@pytest.mark.parametrize("change, kind, message", [
    ({"weight": None}, ValueError, r"state: expected \['bias', .*'weight'\], got \['bias'"),
    ({"other": np.zeros(3)}, ValueError, r"state: expected .*, got .*'other'"),
    ({"running_var": np.zeros(4, "f4")}, ValueError, r"expected running_var of shape \(3,\), got \(4,\)"),
    ({"running_var": np.zeros(3)}, TypeError, "expected running_var of float32, got float64"),
    ({"num_batches_tracked": np.float32(1)}, TypeError, "num_batches_tracked of int64, got float32"),
])  # fmt: skip
def test_a_state_that_does_not_fit_changes_nothing(change, kind, message):
    layer = SampledBatchNorm(3)
    state = {name: value for name, value in (layer.state_dict() | change).items() if value is not None}
    state["bias"] = np.ones(3, "f4")
    with pytest.raises(kind, match=message):
        layer.load_state_dict(state)
    assert not layer.bias.any() and layer.num_batches_tracked == 0


@pytest.mark.parametrize("option, value, kind, message", [
    ("sampler", 1 / 16, TypeError, "sampler: "),
    ("eps", -1.0, ValueError, "eps: "),
    ("momentum", 2.0, ValueError, "momentum: "),
    ("gradient", "none", ValueError, "gradient: "),
    ("activation", "tanh", ValueError, "activation: "),
    ("layer", 1.5, TypeError, "layer: "),
    ("num_features", 0, ValueError, "num_features: expected at least 1, got 0"),
    ("num_features", 2.0, TypeError, "num_features: expected an integer"),
])  # fmt: skip
def test_options_are_checked_when_they_are_set(option, value, kind, message):
    with pytest.raises(kind, match=message):
        SampledBatchNorm(**{"num_features": 3} | {option: value})
    layer = SampledBatchNorm(3)
    before = getattr(layer, option)
    if option != "num_features":
        with pytest.raises(kind, match=message):
            setattr(layer, option, value)
    assert getattr(layer, option) == before
