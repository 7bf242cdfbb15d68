"""Bad input gets its own clear error, and nothing has moved by then."""

import re

import numpy as np
import pytest

import sbncore as sbn
from sbncore import arguments, call

F32 = np.float32
X = np.random.default_rng(0).normal(size=(8, 3, 4, 4)).astype(F32)
ONE = np.ones(3, F32)
PLAN = sbn.Full().plan(X.shape)


def read_only(array):
    array = array.copy()
    array.flags.writeable = False
    return array


def part_of(x):
    """x's memory and one element more, to overlap by."""
    buffer = np.zeros(x.size + 1, x.dtype)
    buffer[: x.size] = x.ravel()
    return buffer[: x.size].reshape(x.shape), buffer[1:].reshape(x.shape)


X_BEFORE, OVERLAPPING = part_of(X)

FORWARD = [
    # x
    (ValueError, "x: expected (N, C, *spatial), at least 2 axes, got shape (8,)", {"x": X[:, 0, 0, 0]}),
    (TypeError, "x: expected an array (NumPy's or one with DLPack), got list", {"x": [[1.0, 2.0]]}),
    (TypeError, "x: expected an array (NumPy's or one with DLPack), got NoneType", {"x": None}),
    (TypeError, "x: expected an array without a mask, got a masked array", {"x": np.ma.masked_array(X)}),
    (TypeError, "x: expected dtype float64, float32, float16 or bfloat16, got int64", {"x": X.astype("i8")}),
    (TypeError, "x: expected dtype float64, float32, float16 or bfloat16, got int16", {"x": X.astype("i2")}),
    (TypeError, "x: expected dtype float64, float32, float16 or bfloat16, got uint16", {"x": X.astype("u2")}),
    (TypeError, "x: expected dtype float64, float32, float16 or bfloat16, got bool", {"x": X > 0}),
    (TypeError, "x: expected dtype float64, float32, float16 or bfloat16, got complex64", {"x": X + 0j}),
    (TypeError, "x: expected dtype float64, float32, float16 or bfloat16, got object", {"x": X.astype("O")}),
    (TypeError, "x: expected native byte order, got dtype >f4", {"x": X.astype(">f4")}),
    (ValueError, "expected more than 1 value per channel when training, got a sample of a single value: Full()",
     {"x": X[:1, :, 0, 0]}),
    # channel_axis
    (ValueError, "channel_axis: expected an axis of (8, 3, 4, 4) other than the batch's 0, got 4",
     {"channel_axis": 4}),
    (ValueError, "channel_axis: expected an axis of (8, 3, 4, 4) other than the batch's 0, got 0",
     {"channel_axis": 0}),
    (ValueError, "channel_axis: expected an axis of (8, 3, 4, 4) other than the batch's 0, got -4",
     {"channel_axis": -4}),
    (TypeError, "channel_axis: expected an integer, got 1.0", {"channel_axis": 1.0}),
    # weight, bias
    (ValueError, "weight: expected shape (3,) for 3 channels, got (4,)", {"weight": np.ones(4, F32)}),
    (ValueError, "bias: expected shape (3,) for 3 channels, got (3, 1)", {"bias": np.ones((3, 1), F32)}),
    (ValueError, "weight: expected shape (4,) for 4 channels, got (3,)", {"weight": ONE, "channel_axis": -1}),
    (TypeError, "weight: expected dtype float32 beside float32, got float64", {"weight": np.ones(3)}),
    (TypeError, "bias: expected dtype float64 beside float64, got float32", {"x": X.astype("f8"), "bias": ONE}),
    (TypeError, "weight: expected dtype float32 or float16 beside float16, got float64",
     {"x": X.astype("f2"), "weight": np.ones(3)}),
    (TypeError, "bias: expected an array (NumPy's or one with DLPack), got float", {"bias": 1.0}),
    # eps
    (ValueError, "eps: expected a positive number, got 0.0", {"eps": 0.0}),
    (ValueError, "eps: expected a positive number, got -1e-05", {"eps": -1e-5}),
    (ValueError, "eps: expected a positive number, got nan", {"eps": float("nan")}),
    (ValueError, "eps: expected a positive number, got inf", {"eps": float("inf")}),
    (TypeError, "eps: expected a number, got '1e-5'", {"eps": "1e-5"}),
    # residual
    (ValueError, "residual: expected shape (8, 3, 4, 4) as x, got (8, 3, 4)", {"residual": X[..., 0]}),
    (TypeError, "residual: expected dtype float32 as x, got float64", {"residual": X.astype("f8")}),
    # choices
    (ValueError, "activation: expected one of (None, 'relu'), got 'gelu'", {"activation": "gelu"}),
    (ValueError, "gradient: expected one of ('exact', 'sampled', 'detached'), got 'approximate'",
     {"gradient": "approximate"}),
    (ValueError, "gradient: 'sampled' expects a sample of the batch, got virtual samples beside it",
     {"gradient": "sampled", "plan": sbn.VirtualSamples(2).plan(X.shape)}),
    # plan
    (TypeError, "plan: expected a Plan (sampler.plan(x.shape)), got Full", {"plan": sbn.Full()}),
    (ValueError, "plan: expected one drawn for (N, *spatial) = (8, 4, 4), got one for (9, 4, 4)",
     {"plan": sbn.Full().plan((9, 3, 4, 4))}),
    (ValueError, "plan: expected one drawn for (N, *spatial) = (8, 4, 4), got one for (8, 16)",
     {"plan": sbn.Full().plan((8, 3, 16))}),
    (ValueError, "plan: expected weights of parts and prior that sum to 1, got 0",
     {"plan": sbn.Plan(sbn.Recipe((8, 4, 4)))}),
    (ValueError, "prior: expected Statistics, since the plan gives a prior weight 0.5",
     {"plan": sbn.Prior(0.5).plan(X.shape)}),
    (ValueError, "prior: expected None, since the plan has no prior", {"prior": sbn.Statistics(ONE, ONE)}),
    (TypeError, "prior: expected Statistics, got tuple",
     {"plan": sbn.Prior(0.5).plan(X.shape), "prior": (ONE, ONE)}),
    (ValueError, "mean: expected shape (3,) for 3 channels, got (2,)",
     {"plan": sbn.Prior(0.5).plan(X.shape), "prior": sbn.Statistics(ONE[:2], ONE)}),
    # out
    (ValueError, "out: expected a writeable array, got a read-only one", {"out": read_only(X)}),
    (ValueError, "out: expected shape (8, 3, 4, 4) as x, got (8, 3, 16)", {"out": X.reshape(8, 3, 16)}),
    (TypeError, "out: expected dtype float32 as x, got float64", {"out": X.astype("f8")}),
    (ValueError, "out: expected memory apart from the inputs'", {"x": X_BEFORE, "out": X_BEFORE}),
    (ValueError, "out: expected memory apart from the inputs'", {"x": X_BEFORE, "out": OVERLAPPING}),
    (ValueError, "out: expected memory apart from the inputs'", {"residual": X_BEFORE, "out": OVERLAPPING}),
]  # fmt: skip


def named(cases):
    return [pytest.param(*case, id=case[1][:60]) for case in cases]


def refused(error, message, bad, good):
    """Check that the complaint is the same on a first call, after a good call was cached, and again."""
    arguments._prepared.clear()
    call.call_for.cache_clear()
    complaints = set()
    for earlier in (lambda: None, good, lambda: None):
        earlier()
        with pytest.raises(error, match="^" + re.escape(message)) as caught:
            bad()
        complaints.add(str(caught.value))
    assert len(complaints) == 1


@pytest.mark.parametrize(("error", "message", "change"), named(FORWARD))
def test_forward(error, message, change):
    before = X_BEFORE.copy()
    refused(error, message, lambda: sbn.forward(**{"x": X, **change}), lambda: sbn.forward(X))
    assert (X_BEFORE == before).all()


SAVED = sbn.forward(X, ONE)[1]
BACKWARD = [
    (TypeError, "saved: expected what forward returned, got tuple", {"saved": (X, SAVED)}),
    (ValueError, "dy: expected shape (8, 3, 4, 4) as x, got (8, 3)", {"dy": X[..., 0, 0]}),
    (TypeError, "dy: expected dtype float32 as x, got float64", {"dy": X.astype("f8")}),
    (ValueError, "needs: expected one of ('x', 'weight', 'bias', 'residual'), got 'y'", {"needs": ["y"]}),
    (ValueError, "needs: 'bias' was not given to forward", {"needs": ["x", "bias"]}),
    (TypeError, "needs: expected a collection of names, got the string 'x'", {"needs": "x"}),
    (ValueError, "gradient: expected one of", {"gradient": "none"}),
    (ValueError, "out: expected None, since needs leaves out 'x'",
     {"needs": ["weight"], "out": np.empty_like(X)}),
    (ValueError, "out: expected memory apart from the inputs'", {"out": X}),
    (ValueError, "out: expected memory apart from the inputs'", {"dy": X_BEFORE, "out": X_BEFORE}),
    (ValueError, "out: expected memory apart from the inputs'", {"dy": X_BEFORE, "out": OVERLAPPING}),
    (ValueError, "out: expected a writeable array, got a read-only one", {"out": read_only(X)}),
]  # fmt: skip


@pytest.mark.parametrize(("error", "message", "change"), named(BACKWARD))
def test_backward(error, message, change):
    bad = {"dy": X + 1, "saved": SAVED, **change}
    refused(error, message, lambda: sbn.backward(**bad), lambda: sbn.backward(X + 1, SAVED))


BATCH_NORM = [
    (ValueError, "running_mean, running_var: expected both or neither, got one of them", {"running_var": None}),
    (ValueError, "running_mean, running_var: expected arrays when training is false, got None",
     {"running_mean": None, "running_var": None, "training": False}),
    (ValueError, "running_mean, running_var: expected arrays for the sampler's prior, got None",
     {"running_mean": None, "running_var": None, "sampler": sbn.Prior(0.1)}),
    (ValueError, "running_mean: expected shape (3,) for 3 channels, got (5,)",
     {"running_mean": np.zeros(5, F32)}),
    (ValueError, "running_var: expected shape (3,) for 3 channels, got (1, 3)",
     {"running_var": np.zeros((1, 3), F32)}),
    (TypeError, "running_var: expected dtype float32 beside float32, got float64",
     {"running_var": np.zeros(3)}),
    (ValueError, "running_var: expected a writeable array, got a read-only one",
     {"running_var": read_only(ONE)}),
    (TypeError, "sampler: expected a Sampler, got float", {"sampler": 0.5}),
    (ValueError, "momentum: expected a number in [0, 1], got 1.5", {"momentum": 1.5}),
    (TypeError, "momentum: expected a number or None, got '0.1'", {"momentum": "0.1"}),
    (ValueError, "step: expected at least 0 for a cumulative average, got -1", {"momentum": None, "step": -1}),
    (TypeError, "step: expected an integer, got 1.5", {"step": 1.5}),
    (TypeError, "step: expected an integer, got None", {"momentum": None, "step": None}),
    (TypeError, "seed: expected an integer, got True", {"seed": True}),
    (ValueError, "eps: expected a positive number, got 0", {"eps": 0}),
    (ValueError, "weight: expected shape (3,) for 3 channels, got (4,)", {"weight": np.ones(4, F32)}),
    (ValueError, "BatchSampling: expected a count of at most the 8 samples of the batch, got 9",
     {"sampler": sbn.BatchSampling(9)}),
    (ValueError, "out: expected a writeable array, got a read-only one", {"out": read_only(X)}),
    (ValueError, "activation: expected one of", {"activation": "tanh"}),
    (ValueError, "gradient: expected one of", {"gradient": "none"}),
]  # fmt: skip


@pytest.mark.parametrize(("error", "message", "change"), named(BATCH_NORM))
def test_batch_norm_moves_nothing(error, message, change):
    mean, var = np.zeros(3, F32), np.ones(3, F32)
    good = {"x": X, "running_mean": mean.copy(), "running_var": var.copy(), "training": True}
    bad = good | {"running_mean": mean, "running_var": var} | change
    refused(error, message, lambda: sbn.batch_norm(**bad), lambda: sbn.batch_norm(**good))
    assert (mean == 0).all() and (var == 1).all()


def test_evaluation_needs_no_writeable_statistics_and_takes_any_eps():
    y, _ = sbn.batch_norm(X, read_only(0 * ONE), read_only(ONE), eps=0.0)
    assert (y == X).all()
    assert sbn.batch_norm(X[:1, :, :1, 0], 0 * ONE, ONE)[0].shape == (1, 3, 1)


SAMPLERS = [
    (TypeError, "BatchSampling: expected a float ratio or an int count, got '4'", lambda: sbn.BatchSampling("4")),
    (TypeError, "NaiveSampling: expected a float ratio or an int count, got True", lambda: sbn.NaiveSampling(True)),
    (ValueError, "FeatureSampling: expected a ratio in (0, 1], got 0.0", lambda: sbn.FeatureSampling(0.0)),
    (ValueError, "FeatureSampling: expected a ratio in (0, 1], got 1.5", lambda: sbn.FeatureSampling(1.5)),
    (ValueError, "FeatureSampling: expected a ratio in (0, 1], got nan", lambda: sbn.FeatureSampling(float("nan"))),
    (ValueError, "BatchSampling: expected a count of at least 1, got 0", lambda: sbn.BatchSampling(0)),
    (ValueError, "BatchSampling: expected pattern to be one of", lambda: sbn.BatchSampling(1, "rows")),
    (ValueError, "FeatureSampling: expected pattern to be one of", lambda: sbn.FeatureSampling(1, "random")),
    (ValueError, "FeatureSampling: expected place to be one of ('sample', 'common')",
     lambda: sbn.FeatureSampling(1, place="batch")),
    (ValueError, "NaiveSampling: expected at_least of 1 or more, got 0", lambda: sbn.NaiveSampling(1, 0)),
    (TypeError, "NaiveSampling: at_least: expected an integer, got 2.0", lambda: sbn.NaiveSampling(1, 2.0)),
    (ValueError, "VirtualSamples: expected k of at least 1, got 0", lambda: sbn.VirtualSamples(0)),
    (TypeError, "VirtualSamples: k: expected an integer, got 0.5", lambda: sbn.VirtualSamples(0.5)),
    (TypeError, "Mixture: expected pairs (weight, sampler)", lambda: sbn.Mixture([sbn.Full()])),
    (TypeError, "Mixture: expected a sampler beside its weight, got 3", lambda: sbn.Mixture([(1.0, 3)])),
    (TypeError, "Mixture: expected a number as weight, got None", lambda: sbn.Mixture([(None, sbn.Full())])),
    (ValueError, "Mixture: expected weights that sum to 1, got 0.5", lambda: sbn.Mixture([(0.5, sbn.Full())])),
    (ValueError, "Mixture: expected weights that sum to 1, got 0", lambda: sbn.Mixture([])),
    (ValueError, "Mixture: expected a weight in (0, 1], got -0.5", lambda: sbn.Mixture([(-0.5, sbn.Full())])),
    (ValueError, "Prior: expected a weight in (0, 1], got 0", lambda: sbn.Prior(0)),
    (TypeError, "Prior: expected a sampler, got 0.5", lambda: sbn.Prior(0.5, 0.5)),
    (ValueError, "shape: expected (N, C, *spatial), at least 2 axes, got (8,)", lambda: sbn.Full().plan((8,))),
    (TypeError, "shape: expected integers (N, C, *spatial), got ndarray; its .shape?", lambda: sbn.Full().plan(X)),
    (TypeError, "shape: expected integers (N, C, *spatial), got (8, 3.0)", lambda: sbn.Full().plan((8, 3.0))),
    (TypeError, "shape: expected integers (N, C, *spatial), got 8", lambda: sbn.Full().plan(8)),
    (ValueError, "shape: expected sizes of 0 or more, got (-1, 3, 4)", lambda: sbn.Full().plan((-1, 3, 4))),
    (ValueError, "FeatureSampling: expected a count of at most the 16 positions of a map, got 17",
     lambda: sbn.FeatureSampling(17).plan(X.shape)),
    (ValueError, "NaiveSampling: expected a count of at most the 128 values of a channel, got 129",
     lambda: sbn.NaiveSampling(129).plan(X.shape)),
    (ValueError, "VirtualSamples: expected at most the batch's 8 samples, got 9",
     lambda: sbn.VirtualSamples(9).plan(X.shape)),
    (ValueError, "Mixture: all 8 samples of the batch are virtual, none is left to draw from",
     lambda: sbn.Mixture([(0.5, sbn.Full()), (0.5, sbn.VirtualSamples(8))]).plan(X.shape)),
    (ValueError, "expected more than 1 value per channel when training, got a sample of a single value",
     lambda: sbn.NaiveSampling(1).plan(X.shape)),
    (ValueError, "expected more than 1 value per channel when training, got a sample of a single value",
     lambda: sbn.BatchSampling(1).plan((8, 3))),
    (TypeError, "merge: expected Statistics, got int as argument 1",
     lambda: sbn.merge(sbn.Statistics(ONE, ONE, 2), 3)),
    (ValueError, "merge: expected at least one Statistics, got none", lambda: sbn.merge()),
    (ValueError, "merge: expected statistics of the same channels",
     lambda: sbn.merge(sbn.Statistics(ONE, ONE, 2), sbn.Statistics(ONE[:2], ONE[:2], 2))),
    (ValueError, "merge: expected counts with a positive finite sum, or weights",
     lambda: sbn.merge(sbn.Statistics(ONE, ONE))),
    (ValueError, "merge: expected 2 weights that sum to 1, got (1.0,)",
     lambda: sbn.merge(sbn.Statistics(ONE, ONE), sbn.Statistics(ONE, ONE), weights=(1.0,))),
    (TypeError, "statistics: expected Statistics, got tuple", lambda: sbn.normalize(X, (ONE, ONE))),
]  # fmt: skip


@pytest.mark.parametrize(("error", "message", "call"), named(SAMPLERS))
def test_samplers_and_phases(error, message, call):
    with pytest.raises(error, match="^" + re.escape(message)):
        call()


def test_a_plan_made_by_hand_cannot_reach_outside():
    from sbncore.plans import MapPlaces, ScatteredPlaces, WholeSamples

    places = {"weight": 1.0, "key": 0, "first": 0, "rows": 8}
    whole = {**places, "samples": 2, "stride": 1, "size": 16}
    run = {**places, "positions": 4, "length": 4, "stride": 16, "align": 1, "common": False}
    for part in (
        WholeSamples(**whole | {"first": 100, "rows": 4}),
        WholeSamples(**whole | {"first": -3}),
        WholeSamples(**whole | {"first": 1}),
        WholeSamples(**whole | {"samples": 9}),
        WholeSamples(**whole | {"stride": 5}),
        WholeSamples(**whole | {"stride": -1}),
        WholeSamples(**whole | {"size": 20}),
        MapPlaces(**run | {"positions": 20, "length": 20}),
        MapPlaces(**run | {"length": 0}),
        MapPlaces(**run | {"length": 2, "stride": 1}),
        MapPlaces(**run | {"length": 2, "stride": 15}),
        MapPlaces(**run | {"align": 3}),
        ScatteredPlaces(**places, positions=129),
    ):
        with pytest.raises(ValueError, match="plan: expected parts within 8 samples of 16 positions, got "):
            sbn.forward(X, plan=sbn.Plan(sbn.Recipe((8, 4, 4), (part,))))


def test_numpy_integers_and_floats_are_numbers():
    sampler = sbn.BatchSampling(np.int64(2), at_least=np.int32(3))
    assert sampler.plan(X.shape, seed=np.uint64(2**63), step=np.int32(1)).count == 32
    assert sbn.FeatureSampling(np.float64(0.5)).plan(X.shape).count == 64
    sbn.forward(X, eps=np.float32(1e-5))
