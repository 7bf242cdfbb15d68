"""On a GPU: the product of the other engines' tests, and what only a GPU can show. `make gpu` runs it.

Needs CuPy, NumPy and pytest; PyTorch for bfloat16 and what concerns its tensors.
"""

import ctypes
import importlib.util
import itertools
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import product
import pytest
from conftest import TOLERANCE, error
from product import DTYPES, SAMPLERS, SHAPES

import sbncore as sbn
from sbncore import reference


def missing():
    if importlib.util.find_spec("cupy") is None:
        return "CuPy is not installed"
    try:  # without one CuPy is not imported: tests/stub_driver must be there before it
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return "there is no NVIDIA driver"
    from sbncore.cuda.device import cupy

    try:
        cupy()
    except RuntimeError as complaint:
        return str(complaint)
    return None


MISSING = missing()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(MISSING is not None, reason=str(MISSING))]
if MISSING is None:
    import cupy


def to(array):
    """An array on the GPU, its strides kept: CuPy's, or of bfloat16 PyTorch's."""
    if array.dtype.name != "bfloat16":
        memory = cupy.empty(array.size, array.dtype)
        order = sorted(range(array.ndim), key=lambda axis: -array.strides[axis])
        memory = memory.reshape([array.shape[axis] for axis in order])
        memory[...] = cupy.asarray(np.ascontiguousarray(array.transpose(order)))
        return memory.transpose(np.argsort(order).tolist())
    torch = pytest.importorskip("torch", reason="bfloat16 arrays are PyTorch's here")
    return torch.from_numpy(array.view(np.int16)).cuda().view(torch.bfloat16)


def back(array):
    if isinstance(array, cupy.ndarray):
        return array.get()
    return array.float().cpu().numpy()


def run(*arguments, **options):
    return product.run(*arguments, to=to, back=back, **options)


@pytest.fixture(autouse=True)
def free_memory():
    yield
    cupy.get_default_memory_pool().free_all_blocks()


OPTIONS = list(itertools.product([False, True], repeat=3))  # channels-last, ReLU, residual
WIDER = [(36, 8, 7, 7), (12, 5, 24, 10), (6, 64), (100, 2, 80, 80), (32, 256, 14, 14), (64, 320, 7, 7)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [*SHAPES, *WIDER])
def test_the_product_is_the_references(rng, dtype, shape):
    every = OPTIONS if shape in SHAPES else OPTIONS[::3]
    for k, ((name, sampler), options) in enumerate(itertools.product(SAMPLERS.items(), every)):
        gradients = ("exact", "detached") if name == "virtual" else ("exact", "sampled", "detached")
        run(rng, dtype, shape, sampler, *options, gradient=gradients[k % len(gradients)], step=k)
    run(rng, dtype, shape, sbn.Prior(0.25, SAMPLERS["run"]))
    run(rng, dtype, shape, sbn.Prior(1.0))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("shape", [(32, 64, 56, 56), (32, 512, 7, 7), (256, 64, 32, 32)])
def test_large_arrays(rng, dtype, last, shape):
    if dtype in DTYPES:
        run(rng, dtype, shape, sbn.FeatureSampling(1 / 16), last, True, True)
        run(rng, dtype, shape, sbn.Full(), last)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_the_gpu_and_the_cpu_draw_and_compute_the_same(rng, sampler, dtype):
    x, dy = rng.normal(size=(2, 33, 16, 14, 14)).astype(dtype)
    plan = SAMPLERS[sampler].plan(x.shape, seed=1, layer=2**63, step=2**40)
    y, saved = sbn.forward(x, plan=plan)
    y_gpu, saved_gpu = sbn.forward(to(x), plan=plan)
    assert error(back(y_gpu), y) <= TOLERANCE[dtype]
    exact, detached = (sbn.backward(to(dy), saved_gpu, gradient=g).x for g in ("exact", "detached"))
    assert error(back(exact), sbn.backward(dy, saved).x) <= TOLERANCE[dtype]
    if dtype == "float64":
        drawn = np.broadcast_to(plan.weights()[:, None] > 0, x.shape)
        assert ((back(exact) != back(detached)) == drawn).all()


@pytest.mark.parametrize("last", [False, True])
def test_results_are_the_same_from_run_to_run(last):
    results = []
    for _ in range(3):
        rng = np.random.default_rng(7)
        y, grads, _ = run(rng, "float16", (64, 64, 28, 28), SAMPLERS["run"], last, True, True)
        results.append([back(a).tobytes() for a in (y, grads.x, grads.residual, grads.weight, grads.bias)])
    assert results[0] == results[1] == results[2]


@pytest.mark.parametrize("shape", [(70_000, 3, 2), (2, 70_000, 3), (70_000, 9), (1, 1, 100_000)])
@pytest.mark.parametrize("last", [False, True])
def test_more_rows_and_channels_than_a_grid_has_blocks_along_its_second_axis(rng, shape, last):
    run(rng, "float32", shape, sbn.Full(), last)
    run(rng, "float32", shape, sbn.NaiveSampling(1 / 2), last)


def test_far_from_zero_an_outlier_and_a_constant(rng):
    x = rng.normal(1e4, 1, (16, 8, 24, 24)).astype(np.float32)
    x[0, 0] = 3e3
    x[:, 1] = 0.1
    for sampler in (sbn.Full(), sbn.FeatureSampling(1 / 16)):
        plan = sampler.plan(x.shape)
        var = reference.moments(x, plan.weights())[1]
        for array in (to(x), to(product.channels_last(x))):
            y, saved = sbn.forward(array, plan=plan)
            got = back(saved.statistics.var)
            np.testing.assert_allclose(got, var, rtol=1e-3)
            assert got[1] == 0 and (back(y)[:, 1] == 0).all()
    x[2, 2, 3] = np.inf
    y = back(sbn.forward(to(x), activation="relu")[0])
    assert np.isnan(y[:, 2]).all() and np.isfinite(y[:, 3]).all()


def test_batch_norm_and_the_phases(rng):
    x = rng.normal(2, 3, (32, 8, 7, 7)).astype(np.float32)
    running = [np.zeros(8, np.float32), np.ones(8, np.float32)]
    on = [to(a) for a in running]
    for sampler in (sbn.FeatureSampling(1 / 4), sbn.Prior(0.25, sbn.FeatureSampling(1 / 4))):
        sbn.batch_norm(x, *running, training=True, sampler=sampler)
        sbn.batch_norm(to(x), *on, training=True, sampler=sampler)
    for got, want in zip(on, running, strict=True):
        np.testing.assert_allclose(back(got), want, rtol=1e-5)
    y, _ = sbn.batch_norm(to(x), *on)
    np.testing.assert_allclose(back(y), sbn.batch_norm(x, *running)[0], rtol=1e-4, atol=1e-4)
    merged = sbn.merge(sbn.moments(to(x[:10])), sbn.moments(to(x[10:])))
    np.testing.assert_allclose(back(merged.var), sbn.moments(x).var, rtol=1e-5)
    np.testing.assert_allclose(back(sbn.normalize(to(x), merged)), sbn.forward(x)[0], atol=1e-4)


def test_bad_input_is_refused_and_moves_nothing(rng):
    x = to(rng.normal(size=(8, 4, 5)).astype(np.float32))
    running = [to(np.zeros(4, np.float32)), to(np.ones(4, np.float32))]
    with pytest.raises(TypeError, match="weight: expected an array on cuda:0 as x, got one on the CPU"):
        sbn.batch_norm(x, *running, np.ones(4, np.float32), training=True)
    with pytest.raises(ValueError, match="weight: expected shape"):
        sbn.batch_norm(x, *running, to(np.ones(5, np.float32)), training=True)
    assert (back(running[0]) == 0).all() and (back(running[1]) == 1).all()


def test_two_streams(rng):
    xs = [rng.normal(size=(64, 64, 28, 28)).astype(np.float32) for _ in range(2)]
    on, streams = [to(x) for x in xs], [cupy.cuda.Stream(non_blocking=True) for _ in xs]
    plan = sbn.FeatureSampling(1 / 16).plan(xs[0].shape)
    cupy.cuda.Device().synchronize()
    for _ in range(20):
        results = []
        for x, stream in zip(on, streams, strict=True):
            with stream:
                y, saved = sbn.forward(x, plan=plan)
                results.append((y, sbn.backward(x, saved).x))
    for x, stream, (y, dx) in zip(xs, streams, results, strict=True):
        stream.synchronize()
        expected, saved = sbn.forward(x, plan=plan)
        assert error(back(y), expected) <= 2e-5
        assert error(back(dx), sbn.backward(x, saved).x) <= 2e-5


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("name", ["run", "random", "scattered"])
def test_a_captured_graph_draws_anew_at_every_replay(rng, last, name):
    """Capture also proves that nothing waits for the device: that is illegal within it."""
    x, dy = rng.normal(size=(2, 36, 16, 14, 14))
    arrange = product.channels_last if last else np.ascontiguousarray
    x_gpu, dy_gpu = to(arrange(x)), to(arrange(dy))
    step = cupy.zeros((), "int64")
    plan = SAMPLERS[name].plan(x.shape, seed=3, step=step)
    stream = cupy.cuda.Stream(non_blocking=True)

    def work():
        y, saved = sbn.forward(x_gpu, plan=plan)
        grads = sbn.backward(dy_gpu, saved)
        step.__iadd__(1)
        return y, saved, grads

    cupy.cuda.Device().synchronize()
    with stream:
        kept = [work() for _ in range(2)]  # compiles, and fills the memory pool
        del kept
        step.fill(0)
        stream.synchronize()
        stream.begin_capture()
        y, _saved, grads = work()
        graph = stream.end_capture()
        for now in range(3):
            graph.launch()
            stream.synchronize()
            expected, saved = sbn.forward(x, plan=SAMPLERS[name].plan(x.shape, seed=3, step=now))
            assert error(back(y), expected) <= 1e-11
            assert error(back(grads.x), sbn.backward(dy, saved).x) <= 1e-11


def test_more_than_2_to_the_31_elements():
    shape = (40, 64, 1024, 832)
    if cupy.cuda.runtime.memGetInfo()[0] < 5 * 2 * np.prod(shape, dtype=np.int64):
        pytest.skip("needs 22 GB of free memory")
    generator = cupy.random.default_rng(1)
    x = cupy.empty(shape, np.float16)
    for n in range(shape[0]):
        x[n] = generator.standard_normal(shape[1:], dtype=np.float32).astype(np.float16)
    plan = sbn.FeatureSampling(1 / 16).plan(shape)
    y, saved = sbn.forward(x, plan=plan, activation="relu")
    dx = sbn.backward(x, saved).x
    for c in (0, 63):
        one = x[:, c : c + 1].get().astype(np.float64)
        y_true, truth = reference.forward(one, p=plan.weights(), activation="relu")
        sure = np.abs(truth.z) > 1e-3
        true = reference.backward(one, truth)["x"]
        assert error(y[:, c : c + 1].get(), y_true) <= TOLERANCE["float16"]
        assert error(dx[:, c : c + 1].get()[sure], true[sure]) <= TOLERANCE["float16"]


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_torch_tensors(rng, dtype):
    torch = pytest.importorskip("torch")
    x = torch.randn(32, 8, 7, 7, device="cuda", dtype=getattr(torch, dtype))
    x_last = x.to(memory_format=torch.channels_last)
    for tensor in (x, x_last):
        y, saved = sbn.forward(tensor)
        assert isinstance(y, torch.Tensor) and y.dtype == x.dtype and y.device == x.device
        assert y.stride() == tensor.stride()
        expected = torch.nn.functional.batch_norm(tensor.double(), None, None, training=True)
        assert error(y.double().cpu().numpy(), expected.cpu().numpy()) <= TOLERANCE[dtype]
        assert sbn.backward(y, saved).x.stride() == tensor.stride()


def test_an_array_on_another_device_than_the_current_one(rng):
    if cupy.cuda.runtime.getDeviceCount() < 2:
        pytest.skip("needs two GPUs")
    x = rng.normal(size=(32, 8, 7, 7)).astype(np.float32)
    with cupy.cuda.Device(1):
        on = cupy.asarray(x)
    y, saved = sbn.forward(on)
    assert y.device.id == 1 and sbn.backward(on, saved).x.device.id == 1
    with cupy.cuda.Device(1):
        assert error(y.get(), sbn.forward(x)[0]) <= 2e-5


SANITIZED = """
import numpy as np, cupy, sbncore as sbn
rng = np.random.default_rng(0)
for shape in ((33, 8, 7, 7), (40, 2, 16, 16), (5, 3, 3)):
    for axis in (1, -1):
        for sampler in (sbn.FeatureSampling(1 / 4), sbn.Full(), sbn.NaiveSampling(1 / 4)):
            x = cupy.asarray(rng.normal(size=shape).astype(np.float32))
            plan = sampler.plan(shape, channel_axis=axis)
            y, saved = sbn.forward(x, plan=plan, channel_axis=axis, residual=x, activation="relu")
            sbn.backward(x, saved)
cupy.cuda.Device().synchronize()
"""


@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "initcheck", "synccheck"])
def test_the_sanitizer_finds_nothing(tool):
    sanitizer = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    if sanitizer is None:
        pytest.skip("compute-sanitizer is not installed")
    command = [sanitizer, "--tool", tool, "--error-exitcode", "9", sys.executable, "-c", SANITIZED]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_pytorch_layer_is_the_cpus(name):
    """Outputs, gradients, running statistics and draws of three steps; the step stays on the device."""
    torch = pytest.importorskip("torch")
    from sbncore.adapters.torch import SampledBatchNorm2d

    for last, relu in itertools.product((False, True), repeat=2):
        torch.manual_seed(0)
        options = {"sampler": SAMPLERS[name], "activation": "relu" if relu else None, "layer": 3}
        options["own_rows"] = SAMPLERS[name].virtual > 0
        layers = [SampledBatchNorm2d(8, dtype=torch.float64, **options) for _ in range(2)]
        layers[1].cuda()
        for _ in range(3):
            x, residual, dy = torch.randn(3, 36, 8, 7, 8, dtype=torch.float64)
            if last:
                x, residual, dy = (a.to(memory_format=torch.channels_last) for a in (x, residual, dy))
            results = []
            for layer, device in zip(layers, ("cpu", "cuda"), strict=True):
                leaves = [a.to(device).detach().requires_grad_() for a in (x, residual)]
                layer.zero_grad()
                y = layer(*leaves)
                y.backward(dy.to(device))
                found = [y.detach(), *(a.grad for a in leaves), layer.weight.grad, layer.bias.grad]
                results.append([a.cpu() for a in (*found, layer.running_mean, layer.running_var)])
            for a, b in zip(*results, strict=True):
                assert error(b.numpy(), a.numpy()) <= 1e-11
        assert layers[1].num_batches_tracked.is_cuda and layers[1].num_batches_tracked == 3


def test_the_pytorch_layer_compiled_and_in_a_graph():
    torch = pytest.importorskip("torch")
    from sbncore.adapters.torch import SampledBatchNorm2d

    sampler = sbn.FeatureSampling(1 / 4)
    make = lambda: SampledBatchNorm2d(8, sampler=sampler, activation="relu", device="cuda")  # noqa: E731
    eager, compiled, layer = make(), make(), make()
    run = torch.compile(compiled, fullgraph=True)
    x = torch.randn(36, 8, 7, 8, device="cuda")
    for _ in range(3):
        assert torch.allclose(run(x), eager(x), atol=1e-5)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream), torch.no_grad():
        layer(x)
        layer.reset_running_stats()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            y = layer(x)
    eager.reset_running_stats()
    for _ in range(3):  # draws anew at every replay
        graph.replay()
        torch.cuda.synchronize()
        assert torch.allclose(y, eager(x), atol=1e-5)
    assert layer.num_batches_tracked == 3


def test_the_pytorch_layer_takes_tensors_at_odd_addresses():
    torch = pytest.importorskip("torch")
    from sbncore.adapters.torch import SampledBatchNorm2d

    whole = torch.randn(2, 32 * 8 * 49 + 1, device="cuda", dtype=torch.float16)
    x, residual = (row[1:].view(32, 8, 7, 7) for row in whole)
    results = []
    for make in (lambda t: t, torch.clone):
        leaves = [make(t).detach().requires_grad_() for t in (x, residual)]
        y = SampledBatchNorm2d(8, activation="relu", device="cuda")(*leaves)
        y.sum().backward()
        results.append([y, *(leaf.grad for leaf in leaves)])
    for a, b in zip(*results, strict=True):
        assert error(back(a.detach()), back(b.detach())) <= TOLERANCE["float16"]


def test_a_pytorch_training_step_peaks_below_torchs():
    torch = pytest.importorskip("torch")
    from bench import memory
    from sbncore.adapters.torch import SampledBatchNorm2d

    x = torch.randn(64, 64, 56, 56, device="cuda", requires_grad=True)
    residual, dy = torch.randn_like(x), torch.randn_like(x)
    theirs = torch.nn.BatchNorm2d(64, device="cuda")
    ours = SampledBatchNorm2d(64, activation="relu", device="cuda")
    steps = {
        "theirs": lambda: torch.relu(theirs(x) + residual).backward(dy),
        "ours": lambda: ours(x, residual).backward(dy),
    }
    peaks = {}
    for name, step in steps.items():
        step()
        x.grad = None
        peaks[name] = memory.peak(step)
        x.grad = None
    assert peaks["ours"] < peaks["theirs"]


def test_the_documented_training_step_is_captured_and_replayed(rng):
    torch = pytest.importorskip("torch")
    pytest.importorskip("torchvision")
    text = (Path(__file__).parents[1] / "docs" / "gpu.md").read_text(encoding="utf-8")
    _, step = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    names = {}
    exec(step.replace("128, 3, 224, 224", "8, 3, 64, 64").replace("zeros(128", "zeros(8"), names)
    x, labels = names["x"], names["labels"]
    x.copy_(torch.from_numpy(rng.normal(size=(8, 3, 64, 64))))
    labels.copy_(torch.arange(8))
    losses = []
    for _ in range(3):
        names["graph"].replay()
        losses.append(names["loss"].item())
    assert all(np.isfinite(losses)) and len(set(losses)) == 3  # it trains, on the images that were copied
    assert names["model"].bn1.num_batches_tracked == 3 + 3
