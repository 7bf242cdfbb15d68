"""First and later calls over NumPy's arrays: the same bits, the same complaints."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from strategies import cases

import sbncore as sbn
from sbncore import arguments, call


@pytest.mark.parametrize("sampler", [sbn.FeatureSampling(1 / 4), sbn.BatchSampling(2), sbn.Full()])
def test_what_a_call_remembers_is_not_what_was_drawn(rng, sampler):
    x, dy, out = rng.normal(size=(3, 8, 3, 7, 7))
    plans = [sampler.plan(x.shape, step=step) for step in range(4)]
    alone = []
    for plan in plans:  # with final keys, each a recipe of its own
        saved = sbn.forward(x, plan=sbn.Plan(sbn.Recipe(plan.shape, plan.parts)), out=out)[1]
        alone.append((out.copy(), sbn.backward(dy, saved).x))
    for turn in (0, 1):
        for plan, (y, dx) in zip(plans, alone, strict=True):
            got, saved = sbn.forward(x, plan=plan, out=out if turn else None)
            assert (got == y).all() and (sbn.backward(dy, saved).x == dx).all() and saved.plan is plan


def test_what_passed_once_is_still_checked_for_its_memory_and_its_types(rng):
    x, dy = rng.normal(size=(2, 8, 3, 7, 7)).astype(np.float32)
    weight, out, plan = np.ones(3, np.float32), np.empty_like(x), sbn.FeatureSampling(1 / 4).plan(x.shape)
    for _ in range(2):
        saved = sbn.forward(x, weight, plan=plan, eps=1.0, out=out)[1]
        sbn.backward(dy, saved, out=out)
        assert sbn.forward(x, eps=1.0)[0].shape == sbn.forward(x, eps=1.0)[0].shape
    for wrong in ({"eps": True}, {"eps": 1.0, "channel_axis": True}, {"eps": 1.0, "channel_axis": 1.0}):
        with pytest.raises(TypeError):
            sbn.forward(x, weight, plan=plan, out=out, **wrong)
    with pytest.raises(ValueError, match="overlaps"):
        sbn.forward(x, weight, plan=plan, eps=1.0, out=x)
    with pytest.raises(ValueError, match="overlaps"):
        sbn.backward(dy, saved, out=dy)
    with pytest.raises(ValueError, match="overlaps"):
        sbn.backward(dy, saved, out=x)
    out.flags.writeable = False
    for again in (lambda: sbn.forward(x, weight, plan=plan, eps=1.0, out=out),
                 lambda: sbn.backward(dy, saved, out=out)):  # fmt: skip
        with pytest.raises(ValueError, match="read-only"):
            again()
    with pytest.raises(TypeError, match="mask"):
        sbn.forward(np.ma.masked_array(x), weight, plan=plan, eps=1.0)
    statistics = saved.statistics
    first = [sbn.normalize(x, statistics, weight, eps=1.0) for _ in range(2)]
    assert (first[0] == first[1]).all()
    with pytest.raises(ValueError, match="read-only"):
        sbn.normalize(x, statistics, weight, eps=1.0, out=out)
    with pytest.raises(ValueError, match="overlaps"):
        sbn.normalize(x, statistics, weight, eps=1.0, out=x[::-1])
    copy = x.copy()
    assert sbn.normalize(copy, statistics, weight, eps=1.0, out=copy) is copy and (copy == first[0]).all()
    with pytest.raises(TypeError, match="eps"):
        sbn.normalize(x, statistics, weight, eps=True)


def test_an_eps_of_another_type_compiles_nothing(rng):
    from sbncore.cpu.kernels import loaded

    x = rng.normal(size=(8, 3, 7, 7)).astype(np.float32)
    plan, given = sbn.Full().plan(x.shape), sbn.Statistics(np.ones(3, np.float32), np.ones(3, np.float32))
    expected = [sbn.forward(x, plan=plan, eps=1.0)[0], sbn.normalize(x, given, eps=1.0)]
    compiled = set(loaded)
    for _ in range(2):
        got = [sbn.forward(x, plan=plan, eps=1)[0], sbn.normalize(x, given, eps=1)]
        assert all((a == b).all() for a, b in zip(expected, got, strict=True))
        sbn.forward(x, plan=plan, eps=2**70)
    assert set(loaded) == compiled


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
@pytest.mark.parametrize("axis", [1, -1])
@pytest.mark.parametrize("extras", [(), ("relu",), ("residual",), ("relu", "residual")], ids=str)
def test_first_and_later_calls_give_the_same_bits(rng, dtype, axis, extras):
    kind = ml_dtypes.bfloat16 if dtype == "bfloat16" else np.dtype(dtype)
    wide = np.float64 if dtype == "float64" else np.float32
    memory = rng.normal(size=(3, 8, 5, 6, 7)).astype(kind)
    for arrays in (memory, np.moveaxis(memory, -1, 2) if axis == 1 else np.moveaxis(memory, 2, -1)):
        x, dy, residual = arrays
        C = x.shape[axis]
        weight, bias, mean, var = rng.uniform(0.5, 1.5, size=(4, C)).astype(wide)
        sampler = sbn.FeatureSampling(1 / 4)
        options = {"channel_axis": axis, "activation": "relu" if "relu" in extras else None}
        options["residual"] = residual if "residual" in extras else None
        for gradient in ("exact", "sampled", "detached"):
            results = []
            for turn in range(3):
                if turn == 2:
                    arguments._prepared.clear()
                    call.call_for.cache_clear()
                plan = sampler.plan(x.shape, step=7, channel_axis=axis)
                y, saved = sbn.forward(x, weight, bias, plan=plan, gradient=gradient, **options)
                grads = [each for each in sbn.backward(dy, saved) if each is not None]
                z = sbn.normalize(x, sbn.Statistics(mean, var), weight, bias, **options)
                assert all(each.dtype == kind for each in (y, z, grads[0]))
                results.append([y, z, *grads, saved.statistics.mean, saved.statistics.var])
            for one in results[1:]:
                for a, b in zip(results[0], one, strict=True):
                    assert a.shape == b.shape and a.strides == b.strides and a.tobytes() == b.tobytes()


@settings(max_examples=200)
@given(cases())
def test_any_options_give_the_same_bits_on_a_first_and_a_cached_call(case):
    results = []
    for turn in range(3):
        if turn != 1:
            arguments._prepared.clear()
            call.call_for.cache_clear()
        y, saved = case.forward()
        grads = sbn.backward(case.arrange(case.dy), saved)
        arrays = [y, *grads, saved.statistics.mean, saved.statistics.var]
        results.append([None if a is None else (a.shape, a.strides, a.dtype, a.tobytes()) for a in arrays])
    assert results[0] == results[1] == results[2]
