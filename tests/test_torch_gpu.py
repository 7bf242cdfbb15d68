"""A layer's calls on a GPU, from addresses, on the emulator: the CPU's results and running statistics."""

import itertools

import emulation
import numpy as np
import pytest
from conftest import TOLERANCE, error
from product import SAMPLERS

torch = pytest.importorskip("torch")

from sbncore.adapters.torch import gpu, names, ops, quick  # noqa: E402

NAMES = {"float64": "double", "float32": "float", "float16": "float16", "bfloat16": "bfloat16"}


@pytest.fixture
def emulated(monkeypatch):
    """Return a function that lets the kernels of a dtype run on tensors in the CPU's memory."""

    def run(dtype):
        device = emulation.EmulatedDevice([emulation.build((NAMES[dtype],))])

        def address(tensor):
            memory = tensor.detach()
            if not memory.is_contiguous():
                memory = memory.permute(0, 2, 3, 1)
            device.name(memory.reshape(-1).view(torch.uint8).numpy())
            return tensor.data_ptr()

        launch = device.launch
        monkeypatch.setattr(device, "launch", lambda launches, record, stream: launch(launches, record))
        monkeypatch.setattr(gpu, "device_at", lambda index: device)
        monkeypatch.setattr(gpu, "address", address)
        monkeypatch.setattr(gpu.Call, "_stream", lambda self: 0)
        gpu.call_for.cache_clear()

    yield run
    gpu.call_for.cache_clear()


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", ["full", "run", "patch", "strided"])
def test_the_results_are_the_cpus(emulated, dtype, name):
    emulated(dtype)
    torch.manual_seed(0)
    sampler, kind = names.name_of(SAMPLERS[name]), getattr(torch, dtype)
    parameter = torch.float64 if dtype == "float64" else torch.float32
    for last, relu, add in itertools.product([False, True], repeat=3):
        x, residual, dy = torch.randn(3, 33, 8, 7, 8).to(kind)
        if last:
            x, residual, dy = (a.to(memory_format=torch.channels_last) for a in (x, residual, dy))
        residual = residual if add else None
        weight, bias = torch.randn(2, 8, dtype=parameter)
        results = []
        for module in (quick, gpu):
            shape = module.shape_of(x)
            call = module.call_for(shape, sampler, relu and add)
            mean, var = torch.zeros(8, dtype=parameter), torch.ones(8, dtype=parameter)
            step = 5 if module is quick else torch.tensor(5)
            y, state, mask, *_ = call.forward(
                x, call.vectors(weight, bias, mean, var), residual, mean, var, (3, 2, step), 0.1, 1e-5, relu,
                False, True,
            )  # fmt: skip
            if relu:  # where the sign of z is in the rounding
                dy = torch.where(y.abs() < 1e-3, 0, dy)
            gradients = call.backward(
                dy, x, weight, bias, state, mask, 3, 2, relu, "exact", [True, True, True, add]
            )
            results.append([y, mean, var, *gradients])
        for got, want in zip(results[1], results[0], strict=True):
            assert error(got.double().numpy(), want.double().numpy()) <= TOLERANCE[dtype]


def test_the_step_that_backward_finds_is_an_array_of_one():
    x, draw = torch.randn(8, 4, 6), (names.name_of(SAMPLERS["twice"]), 1, 2)
    assert ops.plan_of(x, draw, torch.tensor(5)) == ops.plan_of(x, draw, np.array([5]))


def test_what_does_not_suit_is_left_to_the_general_path():
    x = torch.randn(4, 8, 6, 6)
    shape, full = gpu.shape_of(x), names.name_of(SAMPLERS["full"])
    assert gpu.fits(torch.empty_like(x), shape) and not gpu.fits(x.double(), shape)
    assert not gpu.fits(torch.empty(x.numel() + 1)[1:].view(x.shape), shape)
    call = gpu.call_for(shape, full, False)
    assert call.vectors(torch.ones(7)) is None and call.vectors(torch.ones(16)[::2]) is None
    assert call.vectors(torch.ones(8).double(), None) is None
    for name in ("random", "scattered", "twice"):
        assert gpu.call_for(shape, names.name_of(SAMPLERS[name]), False) is None
    assert gpu.call_for(gpu.shape_of(x[..., ::2]), full, False) is None
