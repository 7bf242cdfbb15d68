"""A layer's calls on a GPU, from addresses, on the emulator: the CPU's results and running statistics."""

import functools
import itertools

import emulation
import pytest
from conftest import TOLERANCE, error
from product import SAMPLERS

torch = pytest.importorskip("torch")

import sbncore as sbn  # noqa: E402
from sbncore import call  # noqa: E402
from sbncore.adapters.torch import engine, names  # noqa: E402
from sbncore.cuda import call as cuda  # noqa: E402
from sbncore.plans import Draw, Plan  # noqa: E402
from sbncore.signature import Scalars  # noqa: E402

NAMES = {"float64": "double", "float32": "float", "float16": "float16", "bfloat16": "bfloat16"}


@pytest.fixture
def emulated(monkeypatch):
    """Return a function that lets the kernels of a dtype run on tensors in the CPU's memory."""

    def run(dtype):
        device = emulation.EmulatedDevice([emulation.build((NAMES[dtype],))])

        def address(tensor):
            if tensor is None:
                return 0
            memory = tensor.detach()
            if not memory.is_contiguous():
                memory = memory.permute(0, 2, 3, 1)
            device.name(memory.reshape(-1).view(torch.uint8).numpy())
            return tensor.data_ptr()

        monkeypatch.setattr(cuda, "device_at", lambda index: device)
        monkeypatch.setattr(engine, "address", address)
        calls = functools.cache(lambda signature: cuda.Call(signature._replace(device=0)))
        monkeypatch.setattr(engine, "call_for", calls)
        monkeypatch.setattr(engine, "_prepared", {})

    return run


def results(x, dy, residual, weight, bias, plan, relu, gradient="exact"):
    """A forward's and a backward's, through `engine`."""
    mean, var = torch.zeros_like(weight), torch.ones_like(weight)
    scalars, prior = Scalars(1e-5, 0.1, 1.25), (weight, bias) if plan.prior else (None, None)
    vectors = (weight, bias, mean, var, *prior)
    y, state, mask = engine.forward(x, vectors, residual, plan, scalars, relu)
    needs = [True, True, True, residual is not None]
    if type(plan.draw.step) is not int:  # as the operator finds it
        plan = Plan(plan.recipe, plan.draw._replace(step=engine.step_in(state)))
    return [y, mean, var, *engine.backward(dy, x, (state, mask), plan, gradient, relu, needs)]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", [*SAMPLERS, "prior"])
def test_the_results_are_the_cpus(emulated, dtype, name):
    """The step is in device memory, but where parts overlap."""
    torch.manual_seed(0)
    sampler = sbn.Prior(0.25, sbn.FeatureSampling(1 / 4)) if name == "prior" else SAMPLERS[name]
    recipe, kind = sampler.plan((33, 8, 7, 8)).recipe, getattr(torch, dtype)
    parameter = torch.float64 if dtype == "float64" else torch.float32
    cases = []
    for last, relu, add in itertools.product([False, True], repeat=3):
        x, residual, dy = torch.randn(3, 33, 8, 7, 8).to(kind)
        if last:
            x, residual, dy = (a.to(memory_format=torch.channels_last) for a in (x, residual, dy))
        weight, bias = torch.rand(2, 8, dtype=parameter) + 0.5
        case = [x, dy, residual if add else None, weight, bias, Plan(recipe, Draw(3, 2, 5)), relu]
        if relu:  # where the sign of z is in the rounding
            case[1] = torch.where(results(*case)[0].abs() < 1e-3, 0, dy)
        cases.append((case, results(*case)))
    emulated(dtype)
    for case, expected in cases:
        if recipe.disjoint:
            case[5] = Plan(recipe, Draw(3, 2, torch.tensor(5)))
        for got, want in zip(results(*case), expected, strict=True):
            if want is not None:
                assert error(got.double().numpy(), want.double().numpy()) <= TOLERANCE[dtype]


def test_a_step_in_the_cpus_memory_is_read_at_once():
    x, sample = torch.randn(8, 4, 6), engine.Sample(names.name_of(SAMPLERS["twice"]), 1, 2)
    assert engine.plan_of(x, sample, torch.tensor(5)) == engine.plan_of(x, sample, torch.tensor([5]))
    assert type(engine.plan_of(x, sample, torch.tensor(5)).draw.step) is int


def test_the_repair_of_ranks_is_the_cpus(emulated):
    """From given sums, as several processes add them up."""
    torch.manual_seed(0)
    x, dy = torch.randn(2, 33, 8, 7, 8, dtype=torch.float64)
    plan, relu = SAMPLERS["run"].plan(x.shape, seed=1), True
    found = []
    for _ in range(2):
        _, state, mask = engine.forward(x, (None,) * 6, None, plan, Scalars(1e-5), relu)
        needs = [True, True, True, False]
        dx, dweight, dbias, _ = engine.backward(dy, x, (state, mask), plan, "detached", relu, needs)
        engine.repair(dx, dy, x, (state, mask), plan, relu, (dweight, dbias))
        found.append(dx)
        found.append(engine.backward(dy, x, (state, mask), plan, "exact", relu, needs)[0])
        emulated("float64")
    for one in found[1:]:
        assert error(one.numpy(), found[0].numpy()) <= 1e-11


def test_a_call_is_found_by_its_signature():
    x = torch.randn(8, 4, 6)
    layer = sbn.FeatureSampling(1 / 2)
    call.call_for.cache_clear()
    for step in range(3):
        plan = layer.plan(x.shape, step=step)
        engine.forward(x, (None,) * 6, None, plan, Scalars(1e-5), False)
        sbn.forward(x.numpy(), plan=plan)
    assert call.call_for.cache_info().misses == 1
