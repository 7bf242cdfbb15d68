"""Small models around sampled batch normalization, and the judge of what `fuse` makes of them."""

import copy
import operator

import torch
import torch.nn.functional as F
from torch import fx, nn

import sbncore as sbn
from sbncore.adapters.torch.fuse import fuse, unfuse
from sbncore.adapters.torch.layers import SampledBatchNorm, SampledBatchNorm2d

SAMPLER = sbn.FeatureSampling(1 / 2)


def norm(channels=4):
    layer = SampledBatchNorm2d(channels, sampler=SAMPLER, dtype=torch.float64)
    nn.init.uniform_(layer.weight)
    nn.init.uniform_(layer.bias, -0.5, 0.5)
    return layer


def conv(channels=4, out=4, stride=1):
    return nn.Conv2d(channels, out, 3, stride, 1, bias=False, dtype=torch.float64)


class Block(nn.Module):
    """torchvision's BasicBlock: one ReLU module, called twice."""

    def __init__(self, channels=4, out=4, stride=1, downsample=None):
        super().__init__()
        self.conv1, self.bn1 = conv(channels, out, stride), norm(out)
        self.relu = nn.ReLU(inplace=True)
        self.conv2, self.bn2 = conv(out, out), norm(out)
        self.downsample = downsample

    def forward(self, x):
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


class ResNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.bn1, self.relu = conv(3), norm(), nn.ReLU(inplace=True)
        down = nn.Sequential(conv(4, 6, 2), norm(6))
        self.layer1 = nn.Sequential(Block(), Block(4, 6, 2, down))
        self.fc = nn.Linear(6, 2, dtype=torch.float64)

    def forward(self, x):
        x = self.layer1(self.relu(self.bn1(self.conv1(x))))
        return self.fc(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))


class Of(nn.Module):
    """A module of the given children and forward."""

    def __init__(self, forward, **children):
        super().__init__()
        self.body = forward
        for name, child in children.items():
            setattr(self, name, child)

    def forward(self, x):
        return self.body(self, x)


class Leaves(fx.Tracer):
    def is_leaf_module(self, m, name):
        return isinstance(m, SampledBatchNorm) or not list(m.children())


def outcome(model, steps=2):
    """Outputs, gradients and buffers over training steps and one evaluation."""
    generator, found = torch.Generator().manual_seed(1), []
    for training in [True] * steps + [False]:
        x = torch.randn(4, 3, 6, 6, dtype=torch.float64, generator=generator).requires_grad_()
        y = model.train(training)(x)
        model.zero_grad()
        (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
        found += [y.detach(), x.grad, *(p.grad for p in model.parameters())]
    return [*found, *(b.clone() for b in model.buffers())]


def assert_same(model, *, fused, notes=()):
    """Fuse a copy; it has ``fused`` layers with a ReLU, says ``notes`` and computes what model computes."""
    model.train()
    assert_undone(model)
    other, said = fuse(copy.deepcopy(model))
    assert sum(layer.activation == "relu" for layer in norms(other)) == fused
    assert len(said) == len(notes) and all(part in line for part, line in zip(notes, said, strict=True)), said
    assert list(other.state_dict()) == list(model.state_dict())
    assert [type(m).__name__ for m in other.modules() if type(m) is not nn.Identity] == [
        type(m).__name__
        for (name, m) in model.named_modules()
        if type(other.get_submodule(name)) is not nn.Identity
    ]
    for a, b in zip(outcome(other), outcome(model), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    return other


def assert_undone(model):
    """Fuse a copy, undo it in a copy of that: classes, modules and results are the model's own."""
    other = copy.deepcopy(fuse(copy.deepcopy(model))[0])
    unfuse(other)
    if any(isinstance(module, fx.GraphModule) for module in other.modules()):
        return  # whose graph is another
    kinds = [(name, type(module)) for name, module in model.named_modules()]
    assert [(name, type(module)) for name, module in other.named_modules()] == kinds
    assert [layer.activation for layer in norms(other)] == [layer.activation for layer in norms(model)]
    assert not any("_fused" in vars(module) for module in other.modules())
    for a, b in zip(outcome(other), outcome(copy.deepcopy(model)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def norms(model):
    return [layer for layer in model.modules() if isinstance(layer, SampledBatchNorm)]


def calls(model):
    """How many additions and ReLUs the model's graph still has."""
    functions = {F.relu, torch.relu, torch.relu_, operator.add, operator.iadd, torch.add}
    methods = {"relu", "relu_", "add", "add_"}
    return sum(
        isinstance(model.get_submodule(node.target), nn.ReLU)
        if node.op == "call_module"
        else node.target in (methods if node.op == "call_method" else functions)
        for node in Leaves().trace(model).nodes
    )


def simple(forward, **children):
    """conv, bn, conv2, bn2, skip and what else the forward wants."""
    first = {"conv": conv(3), "bn": norm(), "conv2": conv(), "bn2": norm()}
    used = {name: child for name, child in first.items() if name in forward.__code__.co_names}
    return Of(forward, **used, **children)
