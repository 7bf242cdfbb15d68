"""Streams, devices, capture and memory of calls on a GPU: CuPy itself, on a stub of the driver."""

import ml_dtypes
import numpy as np
import pytest
import stub_driver
from conftest import TOLERANCE, error
from stub_driver import DRIVER

import sbncore as sbn
from sbncore import arrays
from sbncore.arrays import Framework
from sbncore.views import DeviceMemory, DeviceView

cupy = stub_driver.cupy
PLAN = sbn.FeatureSampling(1 / 4).plan((16, 8, 4, 8), layer=1)


@pytest.fixture
def x(rng):
    return rng.normal(size=(16, 8, 4, 8)).astype(np.float32)


def both(x, weight=None, plan=PLAN):
    y, saved = sbn.forward(x, weight, plan=plan, activation="relu")
    return y, sbn.backward(x, saved)


def kernels():
    """The launches of sbncore's kernels."""
    return [launch for launch in DRIVER.launches if launch.kernel in DRIVER.kernels.values()]


def test_kernels_go_to_the_current_stream_and_nothing_waits(cupy, x):
    on, stream = cupy.array(x), cupy.cuda.Stream(non_blocking=True)
    with stream:
        y, grads = both(on)
    assert {launch.stream for launch in kernels()} == {stream.ptr} and not DRIVER.waits
    assert error(y.get(), both(x)[0]) <= 1e-4 and error(grads.x.get(), both(x)[1].x) <= 1e-4
    both(on)
    assert kernels()[-1].stream == 0


def test_arrays_stay_on_their_device_and_do_not_mix(cupy, x):
    with cupy.cuda.Device(1):
        on = cupy.array(x)
    y, grads = both(on)
    assert {launch.device for launch in kernels()} == {1}
    assert y.device.id == grads.x.device.id == 1 and cupy.cuda.Device().id == 0
    with pytest.raises(TypeError, match="weight: expected an array on cuda:1 as x, got one on cuda:0"):
        sbn.forward(on, cupy.array(np.ones(8, np.float32)))


def test_a_second_call_takes_its_memory_from_the_pool(cupy, x):
    on = cupy.array(x)
    both(on)
    before = len(DRIVER.mallocs)
    for _ in range(3):
        both(on)
    assert len(DRIVER.mallocs) == before


def test_a_captured_graph_draws_anew_and_allocates_nothing(cupy, x):
    on, step, stream = cupy.array(x), cupy.array(np.zeros((), np.int64)), cupy.cuda.Stream(non_blocking=True)
    plan = sbn.FeatureSampling(1 / 4).plan(x.shape, step=step)
    with stream:
        both(on, plan=plan)  # compiles, and fills the pool
        before, launched = len(DRIVER.mallocs), len(DRIVER.launches)
        stream.begin_capture()
        y, saved = sbn.forward(on, plan=plan)
        grads = sbn.backward(on, saved)
        step += 1
        graph = stream.end_capture()
        assert all(launch.captured for launch in DRIVER.launches[launched:])
        assert len(DRIVER.mallocs) == before
        for now in range(3):
            graph.launch()
            expected, on_cpu = sbn.forward(x, plan=sbn.FeatureSampling(1 / 4).plan(x.shape, step=now))
            assert error(y.get(), expected) <= 1e-4
            assert error(grads.x.get(), sbn.backward(x, on_cpu).x) <= 1e-4
        assert len(DRIVER.mallocs) == before


@pytest.mark.parametrize("channel_axis", [1, -1])
def test_bfloat16_is_cupys_own(cupy, x, channel_axis):
    halves = x.astype(ml_dtypes.bfloat16)
    plan = sbn.FeatureSampling(1 / 4).plan(x.shape, channel_axis=channel_axis)
    y, saved = sbn.forward(cupy.array(halves), plan=plan, channel_axis=channel_axis)
    expected, on_cpu = sbn.forward(halves, plan=plan, channel_axis=channel_axis)
    dx = sbn.backward(y, saved).x
    assert isinstance(y, cupy.ndarray) and y.dtype == dx.dtype == halves.dtype
    assert error(y.get(), expected) <= TOLERANCE["bfloat16"]
    assert error(dx.get(), sbn.backward(expected, on_cpu).x) <= TOLERANCE["bfloat16"]


class Tensor:
    """An array of a framework that has a stream and memory of its own, as PyTorch has."""

    def __init__(self, array):
        self.array = array

    __dlpack__ = __dlpack_device__ = None  # never asked


@pytest.fixture
def framework(cupy, monkeypatch):
    """Register the framework; return its stream, and the memory that was taken from it."""
    stream, taken = cupy.cuda.Stream(non_blocking=True), []

    def view(tensor):
        array = tensor.array
        return DeviceView(array.data.ptr, array.shape, array.strides, array.dtype, 0, tensor, memory)

    def new(size, dtype, index):
        DRIVER.setDevice(index)
        address = DRIVER.malloc(size * dtype.itemsize)
        whole = np.ctypeslib.as_array(stub_driver.bytes_at(address, size * dtype.itemsize)).view(dtype)
        DRIVER.emulators[index].name(whole, written=False)
        taken.append(whole)
        return DeviceView(address, (size,), (dtype.itemsize,), dtype, index, whole, memory)

    def array(view, like):
        if not isinstance(view, DeviceView) or view.memory is not memory:
            return None
        return np.lib.stride_tricks.as_strided(view.owner, view.shape, view.strides)

    memory = DeviceMemory(new, lambda index: stream.ptr)
    monkeypatch.setitem(arrays.FRAMEWORKS, Tensor, Framework(view, array))
    return stream, taken


def test_a_framework_of_its_own_stream_and_memory_needs_none_of_cupys(cupy, framework, x):
    stream, taken = framework
    on, weight = Tensor(cupy.array(x)), Tensor(cupy.array(np.full(8, 2, np.float32)))
    pool = cupy.get_default_memory_pool()
    before = pool.used_bytes(), pool.total_bytes()
    y, grads = both(on, weight)
    assert (pool.used_bytes(), pool.total_bytes()) == before and taken and not DRIVER.waits
    assert {launch.stream for launch in DRIVER.launches} == {stream.ptr}
    expected = both(x, np.full(8, 2, np.float32))
    assert error(y, expected[0]) <= 1e-4 and error(grads.x, expected[1].x) <= 1e-4
    assert error(grads.weight, expected[1].weight) <= 1e-3


def test_a_call_waits_for_arrays_of_another_framework(cupy, framework, x):
    stream, _ = framework
    weight, theirs = np.full(8, 2, np.float32), cupy.cuda.Stream(non_blocking=True)
    with theirs:
        y, _ = sbn.forward(Tensor(cupy.array(x)), cupy.array(weight), plan=PLAN)
    assert (stream.ptr, theirs.ptr) in DRIVER.waits and kernels()[-1].stream == stream.ptr
    assert error(y, sbn.forward(x, weight, plan=PLAN)[0]) <= 1e-4
    DRIVER.waits.clear()
    with theirs:
        y, _ = sbn.forward(cupy.array(x), Tensor(cupy.array(weight)), plan=PLAN)
        assert (theirs.ptr, stream.ptr) in DRIVER.waits and kernels()[-1].stream == theirs.ptr
        assert error(y.get(), sbn.forward(x, weight, plan=PLAN)[0]) <= 1e-4


def test_statistics_wait_for_the_stream_that_leaves_them(cupy, framework, x):
    stream, _ = framework
    _, saved = sbn.forward(Tensor(cupy.array(x)), plan=PLAN)
    assert not DRIVER.waits
    mean = sbn.forward(x, plan=PLAN)[1].statistics.mean
    assert error(cupy.asnumpy(arrays.computable(saved.state.rows[0])), mean) <= 1e-6
    assert DRIVER.waits == [(0, stream.ptr)]
