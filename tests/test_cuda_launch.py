"""The launch path of a CuPy array, end to end, by CuPy itself on a stub of the driver; errors without it."""

import re
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import stub_driver
from product import SAMPLERS
from stub_driver import DRIVER

import sbncore as sbn
from sbncore.cuda import device

cupy = stub_driver.cupy


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("channel_axis", [1, -1])
@pytest.mark.parametrize("activation", [None, "relu"])
def test_cupy_arrays_in_cupy_arrays_out(rng, cupy, dtype, channel_axis, activation):
    x, dy, residual = rng.normal(size=(3, 33, 8, 7, 8)).astype(dtype)
    weight, bias = rng.normal(size=(2, 8)).astype(np.float32)
    plan = sbn.FeatureSampling(1 / 4).plan(x.shape, channel_axis=channel_axis)
    options = dict(plan=plan, channel_axis=channel_axis, activation=activation)
    y, saved = sbn.forward(x, weight, bias, residual=residual, **options)
    grads = sbn.backward(dy, saved)
    on = [cupy.array(a) for a in (x, weight, bias, residual, dy)]
    out = cupy.array(np.zeros_like(x))
    y_gpu, saved_gpu = sbn.forward(*on[:3], residual=on[3], out=out, **options)
    grads_gpu = sbn.backward(on[4], saved_gpu)
    tolerance = 1e-4 if dtype == "float32" else 2e-2
    assert y_gpu is out and isinstance(grads_gpu.x, cupy.ndarray)
    statistics, expected = saved_gpu.statistics, saved.statistics
    for got, want in (
        (y_gpu, y), *zip(grads_gpu, grads, strict=True),
        (statistics.mean, expected.mean), (statistics.var, expected.var),
    ):  # fmt: skip
        assert got.dtype == want.dtype and got.shape == want.shape
        got, want = got.get().astype(float), want.astype(float)
        np.testing.assert_allclose(got, want, rtol=tolerance, atol=tolerance)
    assert statistics.count == expected.count


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("channel_axis", [1, -1])
@pytest.mark.parametrize("name", ["full", "run", "strided", "virtual", "random"])
def test_first_and_later_calls_give_the_same_bits(rng, cupy, dtype, channel_axis, name):
    x, residual, dy = (cupy.array(rng.normal(size=(32, 8, 3, 8)).astype(dtype)) for _ in range(3))
    C = x.shape[channel_axis]
    for relu, add, gradient in ((False, False, "exact"), (True, False, "detached"), (True, True, "sampled")):
        if name == "virtual" and gradient == "sampled":
            gradient = "exact"
        results = []
        for _ in range(2):
            vectors = [cupy.array(np.linspace(1, 2, C).astype(np.float32)) for _ in range(4)]
            out = cupy.array(np.zeros(x.shape, dtype))
            y, saved = sbn.batch_norm(
                x, *vectors, training=True, sampler=SAMPLERS[name], activation="relu" if relu else None,
                residual=residual if add else None, gradient=gradient, channel_axis=channel_axis, out=out,
            )  # fmt: skip
            assert y is out
            grads = sbn.backward(dy, saved)
            arrays = [y, *vectors[:2], *(g for g in grads if g is not None)]
            results.append([array.get().tobytes() for array in arrays])
        assert results[0] == results[1]


def test_phases_merge_and_training(rng, cupy):
    x = rng.normal(3, 2, (8, 4, 5)).astype(np.float32)
    on = cupy.array(x)
    parts = [sbn.moments(cupy.array(half)) for half in (x[:3], x[3:])]
    merged, whole = sbn.merge(*parts), sbn.moments(x)
    assert isinstance(merged.mean, cupy.ndarray)
    np.testing.assert_allclose(merged.var.get(), whole.var, rtol=1e-5)
    y = sbn.normalize(on, merged, activation="relu")
    np.testing.assert_allclose(y.get(), sbn.normalize(x, whole, activation="relu"), atol=1e-5)
    running = [cupy.array(a) for a in (np.zeros(4, np.float32), np.ones(4, np.float32))]
    expected = [np.zeros(4, np.float32), np.ones(4, np.float32)]
    sbn.batch_norm(on, *running, training=True)
    sbn.batch_norm(x, *expected, training=True)
    for got, want in zip(running, expected, strict=True):
        np.testing.assert_allclose(got.get(), want, rtol=1e-5)


@pytest.mark.parametrize("capturable", [False, True])
def test_the_layer_is_the_numpy_layer_on_a_device(rng, cupy, capturable):
    from sbncore.adapters.cupy import SampledBatchNorm
    from sbncore.adapters.numpy import SampledBatchNorm as OnCPU

    options = dict(sampler=sbn.FeatureSampling(1 / 2), layer=3, activation="relu")
    layer, expected = SampledBatchNorm(4, capturable=capturable, **options), OnCPU(4, **options)
    for _ in range(3):
        x, dy = rng.normal(size=(2, 8, 4, 5)).astype(np.float32)
        np.testing.assert_allclose(layer(cupy.array(x)).get(), expected(x), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(layer.backward(cupy.array(dy)).get(), expected.backward(dy), atol=1e-4)
    np.testing.assert_allclose(layer.running_var.get(), expected.running_var, rtol=1e-5)
    counted = layer.num_batches_tracked
    assert (counted.get() if capturable else counted) == 3


def test_bad_arrays_are_refused_before_a_launch(rng, cupy):
    x = cupy.array(rng.normal(size=(8, 4, 5)).astype(np.float32))
    with pytest.raises(TypeError, match="weight: expected an array on cuda:0 as x, got one on the CPU"):
        sbn.forward(x, np.ones(4, np.float32))
    with pytest.raises(ValueError, match=r"weight: expected shape \(4,\)"):
        sbn.forward(x, cupy.array(np.ones(5, np.float32)))
    with pytest.raises(TypeError, match="x: expected dtype float64, float32, float16 or bfloat16, got int32"):
        sbn.forward(cupy.array(np.ones((8, 4, 5), np.int32)))
    with pytest.raises(ValueError, match="out: expected memory apart from the inputs'"):
        sbn.forward(x, out=x)
    many = sbn.Mixture([(1 / 16, sbn.NaiveSampling(8))] * 16)
    with pytest.raises(ValueError, match="plan: expected at most 8 parts on a GPU, got 16"):
        sbn.forward(x, plan=many.plan(x.shape))
    assert not any(device.launches for device in DRIVER.emulators)


class OnAGPU:
    """An array of another framework, in CUDA memory."""

    def __dlpack_device__(self):
        return 2, 0

    def __dlpack__(self, **options):
        raise AssertionError


@pytest.fixture
def fresh():
    device.cupy.cache_clear()
    yield
    device.cupy.cache_clear()


def test_without_cupy_the_error_says_what_to_install(monkeypatch, fresh):
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(RuntimeError, match=r"arrays on a GPU need CuPy .*pip install 'sbncore\[cuda13\]'"):
        sbn.forward(OnAGPU())


@pytest.mark.parametrize("count", [0, None])
def test_without_a_driver_or_a_gpu_the_error_says_which_is_missing(monkeypatch, fresh, count):
    class CUDARuntimeError(RuntimeError):
        pass

    def devices():
        if count is None:
            raise CUDARuntimeError("cudaErrorInsufficientDriver")
        return count

    runtime = types.SimpleNamespace(getDeviceCount=devices, CUDARuntimeError=CUDARuntimeError)
    cuda = types.SimpleNamespace(runtime=runtime)
    monkeypatch.setitem(sys.modules, "cupy", types.SimpleNamespace(cuda=cuda))
    missing = "no usable NVIDIA driver or GPU: cudaErrorInsufficientDriver" if count is None else "but no GPU"
    with pytest.raises(RuntimeError, match=missing):
        sbn.forward(OnAGPU())


def test_without_nvrtc_the_error_says_what_to_install(rng, cupy, monkeypatch):
    class Module:
        def __init__(self, **options):
            pass

        def get_function(self, name):
            raise OSError("libnvrtc.so.13: cannot open shared object file")

    monkeypatch.setattr(cupy, "RawModule", Module)
    with pytest.raises(RuntimeError, match=r"NVRTC fails: libnvrtc.*pip install 'sbncore\[cuda13\]'"):
        sbn.forward(cupy.array(rng.normal(size=(8, 4, 5)).astype(np.float32)))


def test_the_gpu_path_imports_no_numba():
    code = "import sys, sbncore.cuda.call, sbncore.functional; assert 'numba' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_gradients_are_checked_on_the_cpu(cupy):
    with pytest.raises(TypeError, match="x must be on the CPU"):
        sbn.check_gradients(lambda x: x, lambda dy: dy, {"x": cupy.ones(3, "float32")})


def test_the_documented_example_runs(cupy, monkeypatch):
    text = (Path(__file__).parents[1] / "docs" / "gpu.md").read_text(encoding="utf-8")
    example, _ = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    random = types.SimpleNamespace(standard_normal=lambda shape, dtype: cupy.zeros(shape, dtype))
    monkeypatch.setattr(cupy, "random", random)
    names = {}
    exec(example.replace("(32, 64, 56, 56)", "(32, 8, 8, 8)"), names)
    assert names["step"].get() == 1 and names["grads"].x.shape == (32, 8, 8, 8)
