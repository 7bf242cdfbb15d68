"""Whatever is refused has changed nothing, and a call that has been made before is refused alike.

Every invalid option, dtype, stride and path against every valid call around it: first and cached.
"""

from dataclasses import dataclass
from typing import Any

import foreign
import ml_dtypes
import numpy as np
import pytest

import sbncore as sbn

KINDS = {"float64": np.float64, "float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
NO_KINDS = np.int16, np.uint16, np.int64, np.complex64, np.bool_, np.dtype(">f4")
ELSEWHERE = "plan", "prior", "BatchSampling", "FeatureSampling"  # what else a message may begin with
LAYOUTS = "first", "last", "axis", "strided", "reversed"


def laid(array, layout):
    """Return the values of (N, C, S) in a layout; channels come last in the layout "axis"."""
    if layout == "axis":
        return np.ascontiguousarray(np.moveaxis(array, 1, -1))
    if layout == "last":
        return np.moveaxis(np.ascontiguousarray(np.moveaxis(array, 1, -1)), -1, 1)
    if layout == "strided":
        return np.repeat(array, 2, axis=-1)[..., ::2]
    if layout == "reversed":
        return np.flip(np.flip(array, 0).copy(), 0)
    return array.copy()


@dataclass(repr=False)
class Call:
    """A valid call: of `forward` or `batch_norm`, training or not."""

    path: str
    dtype: str
    layout: str
    arrays: dict[str, Any]
    options: dict[str, Any]

    def __repr__(self):
        given = [name for name, array in self.arrays.items() if array is not None]
        return f"{self.path}, {self.dtype}, {self.layout}, {given}, {self.options}"

    @property
    def shape(self):
        return self.arrays["x"].shape

    def run(self, **changes):
        given = {**self.arrays, **self.options, **changes}
        if self.path == "forward":
            given = {k: v for k, v in given.items() if not k.startswith("running")}
            given.setdefault("plan", sbn.FeatureSampling(1 / 2).plan(self.shape, channel_axis=self.axis))
            return sbn.forward(**given)
        given.setdefault("sampler", sbn.FeatureSampling(1 / 2))
        given.setdefault("training", self.path == "training")
        return sbn.batch_norm(**given)

    @property
    def axis(self):
        return self.options["channel_axis"]

    def copy(self):
        arrays = {name: _same(array) for name, array in self.arrays.items()}
        return Call(self.path, self.dtype, self.layout, arrays, dict(self.options))


def _same(array):
    """Return a copy with its very strides."""
    if array is None:
        return None
    copied = np.empty_like(array)
    if copied.strides != array.strides:
        whole = np.zeros((*array.shape[:-1], 2 * array.shape[-1]), array.dtype)
        copied = whole[..., ::2] if array.strides[-1] == 2 * array.itemsize else np.flip(copied, 0)
    copied[...] = array
    return copied


def call_of(path, dtype, layout, extras):
    """Return a valid call; with extras it has a residual, an activation and an out."""
    rng = np.random.default_rng(7)
    wide = np.float64 if dtype == "float64" else np.float32
    big = lambda: laid(rng.normal(size=(4, 3, 6)).astype(KINDS[dtype]), layout)  # noqa: E731
    arrays = {
        "x": big(), "weight": np.ones(3, wide), "bias": np.zeros(3, wide),
        "running_mean": np.zeros(3, wide), "running_var": np.ones(3, wide),
        "residual": big() if extras else None, "out": big() if extras else None,
    }  # fmt: skip
    options = {"channel_axis": -1 if layout == "axis" else 1, "eps": 1e-3, "gradient": "exact"}
    return Call(path, dtype, layout, arrays, options | {"activation": "relu" if extras else None})


def other_dtypes(call, *allowed):
    kinds = {name: kind for name, kind in KINDS.items() if name not in (call.dtype, *allowed)}
    return [*kinds.values(), *NO_KINDS]


def shifted(array):
    """Return an array of its shape that overlaps it by all but one element."""
    whole = np.zeros(array.size + 1, array.dtype)
    whole[:-1] = array.ravel()
    return whole[:-1].reshape(array.shape), whole[1:].reshape(array.shape)


def faults(call):
    """Every change of a call's arguments that must be refused, by name."""
    x, wide = call.arrays["x"], call.arrays["weight"].dtype
    parameters = (call.dtype, "float64" if call.dtype == "float64" else "float32")
    found = [
        *({"eps": eps} for eps in (-1.0, float("nan"), float("inf"), "1", True, None)),
        *({"activation": each} for each in ("gelu", "RELU", 3, ("relu",))),
        *({"gradient": each} for each in ("detachd", None, 1)),
        *({"channel_axis": each} for each in (0, 3, -3, -4, 1.0, True, None)),
        *({"x": each} for each in (None, [[1.0]], x[0, 0], np.ma.masked_array(x), 1.0)),
        *({"x": foreign.Deleted(x)}, {"x": foreign.Deviceless(x)}, {"x": foreign.Tracer(x)}),
        *({"x": x.astype(kind)} for kind in NO_KINDS),
    ]
    for name in ("weight", "bias"):
        found += [{name: each} for each in (np.ones(4, wide), np.ones((3, 1), wide), 1.0, [1.0] * 3)]
        found += [{name: np.ones(3).astype(kind)} for kind in other_dtypes(call, *parameters)]
    for name in ("residual", "out"):
        found += [{name: each} for each in (x[:2], x[0], 1.0, np.ma.masked_array(x))]
        found += [{name: x.astype(kind)} for kind in other_dtypes(call)]
    before, after = shifted(x)
    found += [
        {"out": foreign.read_only(x)}, {"out": foreign.Array(foreign.read_only(x))},
        {"out": foreign.Copying(x.copy())}, {"out": foreign.Unwilling(x.copy())},
        {"out": foreign.of("jax")(x.copy())}, {"out": np.broadcast_to(x[:1], x.shape)},
        {"out": np.lib.stride_tricks.as_strided(x.copy(), x.shape, (0, *x.strides[1:]))},
        {"out": x}, {"out": x[::-1]}, {"x": before, "out": after}, {"residual": before, "out": after},
    ]  # fmt: skip
    if call.path == "forward":
        plan = sbn.FeatureSampling(1 / 2).plan(x.shape, channel_axis=call.axis)
        plans = sbn.Full(), sbn.Full().plan((4, 3, 7)), sbn.Plan(sbn.Recipe(plan.shape))
        found += [{"plan": each} for each in plans]
        found += [{"plan": sbn.Prior(0.5).plan(x.shape, channel_axis=call.axis)}]
        found += [{"prior": sbn.Statistics(np.ones(3, wide), np.ones(3, wide))}, {"prior": 1}]
        return found
    for name in ("running_mean", "running_var"):
        found += [{name: each} for each in (None, np.ones(4, wide), np.ones((3, 1), wide), 1.0, [1.0] * 3)]
        found += [{name: np.ones(3).astype(kind)} for kind in other_dtypes(call, *parameters)]
        if call.path == "training":
            vector = np.ones(3, wide)
            found += [{name: foreign.read_only(vector)}, {name: foreign.Array(foreign.read_only(vector))}]
            found += [{name: foreign.Copying(vector)}, {name: foreign.of("jaxlib")(vector)}]
            found += [{name: call.arrays["weight"]}]
    first, second = shifted(np.ones(3, wide))
    if call.path == "training":
        found += [{"running_mean": first, "running_var": each} for each in (first, second)]
        found += [{"momentum": each} for each in (5.0, -0.1, float("nan"), "1", True)]
        found += [{"sampler": each} for each in (0.5, None, sbn.BatchSampling(9), sbn.FeatureSampling(7))]
        found += [{"seed": 1.5}, {"layer": None}, {"step": 1.5}, {"step": np.ones(2, np.int64)}]
    else:
        found += [{"running_mean": None, "running_var": None}, {"sampler": 0.5}]
        found += [{"out": np.ones(3, wide)}]
    return found


def everything(call, fault):
    """Return the bytes of all that a call could write to."""
    arrays = [*call.arrays.values()]
    for value in fault.values():
        value = getattr(value, "array", value)
        if isinstance(value, np.ndarray):
            arrays.append(value)
    return [None if array is None else np.array(array).tobytes() for array in arrays]


def refusal(call, fault):
    before = everything(call, fault)
    with pytest.raises((ValueError, TypeError)) as complaint:
        call.run(**fault)
    assert everything(call, fault) == before, fault
    return complaint.type, str(complaint.value)


@pytest.fixture(params=[False, True], ids=["", "extras"])
def call(request, path, dtype, layout):
    return call_of(path, dtype, layout, request.param)


every = [
    pytest.mark.parametrize("path", ["forward", "training", "evaluation"]),
    pytest.mark.parametrize("dtype", KINDS),
    pytest.mark.parametrize("layout", LAYOUTS),
]


def over_every(test):
    for mark in every:
        test = mark(test)
    return test


@over_every
def test_what_is_refused_has_changed_nothing(call):
    first = [refusal(call, fault) for fault in faults(call)]
    for fault, (_, message) in zip(faults(call), first, strict=True):
        named = message.partition(":")[0]
        assert any(name in named for name in (*call.arrays, *fault, *ELSEWHERE)), message
    for _ in range(2):  # the second is cached, where that kind of call is
        call.copy().run()
    assert [refusal(call, fault) for fault in faults(call)] == first


@over_every
def test_a_cached_call_gives_the_first_ones_bits(call):
    results = []
    for _ in range(3):
        one = call.copy()
        y, saved = one.run()
        grads = sbn.backward(one.arrays["x"].copy(), saved)
        arrays = y, *grads, *one.arrays.values()
        results.append([np.array(array).tobytes() for array in arrays if array is not None])
    assert results[0] == results[1] == results[2]
