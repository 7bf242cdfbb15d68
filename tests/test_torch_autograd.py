"""The layers under torch's autograd, compiler and exporter: second derivatives, no graph breaks, memory."""

import copy
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from product import SAMPLERS

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

import sbncore as sbn  # noqa: E402
from sbncore.adapters.torch import SampledBatchNorm1d, SampledBatchNorm2d, names, ops  # noqa: E402
from sbncore.adapters.torch.function import BatchNorm, Options  # noqa: E402

FS = sbn.FeatureSampling(1 / 4)


def function(sampler, gradient="exact", relu=False, seed=1):
    """The layer's mathematics as a pure function of tensors; a prior's moments stay what they are."""
    options = Options(names.name_of(sampler), ops.word(seed), 2, 0.1, 1e-5, relu, False, gradient)
    mean, var = torch.linspace(-1, 1, 3).double(), torch.linspace(0.5, 2, 3).double()
    step = torch.tensor(3)

    def run(x, weight=None, bias=None, residual=None):
        return BatchNorm.apply(x, weight, bias, residual, mean, var, step, options)[0]

    return run


def leaves(*shapes):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(s, dtype=torch.float64, generator=generator).requires_grad_() for s in shapes]


@pytest.mark.parametrize("name, prior", [
    *((name, 0) for name in SAMPLERS), ("run", 0.25), ("virtual", 0.25), ("twice", 0.25), ("run", 1),
])  # fmt: skip
def test_gradients_and_their_gradients_are_the_derivatives(name, prior):
    sampler = SAMPLERS[name] if prior == 0 else sbn.Prior(prior, SAMPLERS[name])
    arguments = leaves((4, 3, 2, 4), 3, 3, (4, 3, 2, 4))
    for relu in (False, True):
        run = function(sampler, relu=relu)
        z = function(sampler)(*arguments).detach()
        with torch.no_grad():
            arguments[3] += torch.where(z.abs() < 0.05, 0.2, 0.0)  # away from the kink
        torch.autograd.gradcheck(run, arguments)
        torch.autograd.gradgradcheck(run, arguments)
    x, weight, _, _ = arguments
    torch.autograd.gradgradcheck(function(sampler), [x])
    torch.autograd.gradgradcheck(lambda x, weight: function(sampler)(x, weight), [x, weight])


def test_a_third_derivative():
    (x,) = leaves((4, 3, 2))
    run = function(sbn.Prior(0.25, FS))

    def second(x):
        (first,) = torch.autograd.grad(run(x).pow(3).sum(), x, create_graph=True)
        return torch.autograd.grad(first.pow(2).sum(), x, create_graph=True)[0]

    torch.autograd.gradcheck(second, [x], atol=1e-3)


@pytest.mark.parametrize("gradient", ["exact", "sampled", "detached"])
@pytest.mark.parametrize("relu", [False, True])
def test_the_differentiable_backward_is_the_engines(gradient, relu):
    arguments = leaves((5, 3, 2, 4), 3, 3, (5, 3, 2, 4))
    y = function(FS, gradient, relu)(*arguments)
    (dy,) = leaves(y.shape)
    plain = torch.autograd.grad(y, arguments, dy, retain_graph=True)
    again = torch.autograd.grad(y, arguments, dy, create_graph=True)
    for a, b in zip(plain, again, strict=True):
        assert b.requires_grad and (a - b).abs().max() < 1e-12
    penalty = torch.autograd.grad(sum(each.square().sum() for each in again), arguments[0])[0]
    assert penalty.abs().max() > 0


def test_a_gradient_penalty_is_torchs():
    """As WGAN-GP's: the loss holds a gradient's norm. Torch judges in float64: its float32 is further off."""
    torch.manual_seed(1)
    theirs = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 1)).double()
    theirs[0].weight.data *= 10  # a deviation of 0.05 amplifies the linear layer's own rounding beyond 1e-5

    def gradients(layer, dtype):
        model = copy.deepcopy(theirs)
        model[1] = layer
        model.to(dtype)
        x = torch.linspace(-1, 2, 32, dtype=dtype).sin().view(8, 4).requires_grad_()
        critic = (model(x)[:, 0] * x.detach()[:, 1]).sum()  # a plain sum's gradient is 0 but for rounding
        (g,) = torch.autograd.grad(critic, x, create_graph=True)
        ((g.norm(dim=1) - 1) ** 2).mean().backward()
        return [p.grad.double() for p in model.parameters() if p.grad is not None]

    truth = gradients(theirs[1], torch.float64)
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        for a, b in zip(gradients(SampledBatchNorm1d(6, dtype=dtype), dtype), truth, strict=True):
            assert (a - b).abs().max() <= tolerance * max(1, b.abs().max())


def test_torchs_own_checks_of_the_operators():
    x, residual = torch.randn(2, 4, 3, 5, 5)
    weight, bias, mean, var = torch.rand(4, 3)
    for relu, other, running, tensor in (
        (True, residual, (mean, var), x), (True, None, (None, None), x), (False, None, (mean, var), x),
        (True, residual, (mean, var), x.to(memory_format=torch.channels_last)),
    ):  # fmt: skip
        draw = (torch.tensor(7), names.name_of(FS), 1, 2)
        forward = (tensor, weight, bias, other, *running, *draw, 0.1, 1e-5, relu, False)
        torch.library.opcheck(ops.FORWARD, forward)
        y, state, mask, *_ = ops.FORWARD(*forward)
        for needs in ([True] * 4, [False, True, False, True]):
            backward = (y, tensor, weight, bias, state, mask, *draw[1:], relu, "exact", needs)
            torch.library.opcheck(ops.BACKWARD, backward)


class Network(nn.Module):
    """A stem and a residual block, fused."""

    def __init__(self, sampler, **options):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3), SampledBatchNorm2d(8, sampler=sampler, **options)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1)
        self.bn2 = SampledBatchNorm2d(8, sampler=sampler, layer=1, activation="relu", **options)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = torch.relu(self.bn1(self.conv1(x)))
        return self.head(self.bn2(self.conv2(x), x).mean((2, 3)))


def compiled_training(name, options, backend):
    """Four steps as eager's, without a graph break; from the third on, without a recompilation."""
    sampler = sbn.Prior(0.25, FS) if name == "prior" else SAMPLERS[name]
    torch.manual_seed(0)
    eager = Network(sampler, **options)
    model = copy.deepcopy(eager)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    for step in range(4):
        x = torch.randn(4, 3, 9, 9)
        with torch._dynamo.config.patch(error_on_recompile=step > 1):
            loss = compiled(x).square().sum()
            loss.backward()
        expected = eager(x).square().sum()
        expected.backward()
        assert torch.allclose(loss, expected, rtol=1e-5)
        for a, b in zip(model.parameters(), eager.parameters(), strict=True):
            assert torch.allclose(a.grad, b.grad, rtol=1e-4, atol=1e-5)
        for a, b in zip(model.buffers(), eager.buffers(), strict=True):
            assert torch.allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name, options", [
    ("run", {}), ("twice", {"momentum": None}), ("virtual", {"track_running_stats": False, "own_rows": True}),
    ("prior", {"gradient": "detached"}),
])  # fmt: skip
def test_a_compiled_training_is_the_eager_one_without_breaks_or_recompilations(name, options):
    compiled_training(name, options, "aot_eager")


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs g++")
def test_inductors_training_is_the_eager_one():
    """In an interpreter of its own: it imports setuptools, which minds who imported distutils before it."""
    here = Path(__file__).parent
    code = "import test_torch_autograd as t; t.compiled_training('run', {}, 'inductor')"
    path = os.pathsep.join([str(here), str(here.parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_a_compiled_training_with_batches_of_changing_size():
    eager = Network(FS)
    model = copy.deepcopy(eager)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
    for n in (4, 6, 9):
        x = torch.randn(n, 3, 9, 9)
        loss, expected = compiled(x).square().sum(), eager(x).square().sum()
        loss.backward()
        expected.backward()
        assert torch.allclose(loss, expected, rtol=1e-5)


def test_export_for_evaluation():
    model = Network(FS)
    x = torch.randn(4, 3, 9, 9)
    model(x)
    model.eval()
    exported = torch.export.export(model, (x,))
    assert torch.allclose(exported.module()(x), model(x), atol=1e-6)
    assert not [node for node in exported.graph.nodes if "sbncore" in str(node.target)]


def saved_bytes(run):
    """The distinct memory that autograd keeps between forward and backward, by its storage."""
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = run()
    return sum(kept.values()), y


def test_memory_kept_is_x_the_statistics_and_a_bit_an_element():
    x, residual = torch.randn(2, 8, 16, 20, 20).unbind()
    x, residual = x.clone(), residual.clone()
    C, size = 16, x.numel() * 4
    small = 2 * C * 4 + 6 * C * 8 + 8  # weight, bias; the statistics in float64, the step
    arguments = [each.clone().requires_grad_() for each in (x, residual)]
    for fused, other, extra in ((None, None, 0), ("relu", None, 0), ("relu", arguments[1], x.numel() / 8)):
        layer = SampledBatchNorm2d(C, sampler=FS, activation=fused)
        kept, _ = saved_bytes(lambda layer=layer, other=other: layer(arguments[0], other))
        assert kept == size + small + extra
    torchs = nn.BatchNorm2d(C)
    plain, _ = saved_bytes(lambda: torchs(arguments[0]))
    assert kept - extra <= plain + 6 * C * 8 + 8
    relu, _ = saved_bytes(lambda: torch.relu(torchs(arguments[0])))
    added, _ = saved_bytes(lambda: torch.relu(torchs(arguments[0]) + arguments[1]))
    assert relu >= 2 * size and added >= 2 * size and kept < relu


def test_torch_hears_of_what_changed_x_before_backward():
    x = torch.randn(4, 3, 5, 5, requires_grad=True)
    middle = x * 1
    y = SampledBatchNorm2d(3)(middle)
    middle.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_backward_only_of_what_is_asked():
    x, weight, bias, residual = leaves((5, 3, 2, 4), 3, 3, (5, 3, 2, 4))
    y = function(FS, relu=True)(x, weight, bias, residual)
    dy = torch.ones_like(y)
    whole = torch.autograd.grad(y, [x, weight, bias, residual], dy, retain_graph=True)
    for k, each in enumerate((x, weight, bias, residual)):
        (alone,) = torch.autograd.grad(y, each, dy, retain_graph=True)
        assert torch.equal(alone, whole[k])
    y.backward(dy)
    with pytest.raises(RuntimeError, match="second time"):
        y.backward(dy)


def test_the_draw_of_backward_is_forwards():
    """Where p is not 0, and there alone, the exact gradient differs from the detached one."""
    (x,) = leaves((5, 3, 4, 4))
    y = function(FS, seed=2**63)(x)
    dy = torch.randn_like(y)
    exact = torch.autograd.grad(y, x, dy)[0]
    detached = torch.autograd.grad(function(FS, "detached", seed=2**63)(x), x, dy)[0]
    plan = FS.plan(x.shape, seed=2**63, layer=2, step=3)
    drawn = np.broadcast_to(plan.weights()[:, None] > 0, x.shape)
    assert ((exact != detached).numpy() == drawn).all()
