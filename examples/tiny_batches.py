"""Batches of two images in PyTorch: batch normalization, group normalization, and virtual samples.

One epoch on scikit-learn's digits, each from the same initial weights. Two images say little of a channel's
mean and variance; `VirtualBatch` appends samples of white noise, whose statistics every layer takes instead.
Run it: python examples/tiny_batches.py
"""

import torch
from sklearn.datasets import load_digits
from torch import nn

import sbncore as sbn
from sbncore.adapters.torch import VirtualBatch, convert_sampled_batchnorm

torch.set_num_threads(1)
digits = load_digits()
x = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 8 - 1
labels = torch.tensor(digits.target)


def network(norm):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1, bias=False), norm(16), nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1, bias=False), norm(32), nn.ReLU(),
        nn.Conv2d(32, 32, 3, padding=1, bias=False), norm(32), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10),
    )  # fmt: skip


def trained(model, batch=2, count=1500):
    """Train for one epoch and return the test accuracy."""
    optimizer = torch.optim.SGD(model.parameters(), 0.01, 0.9)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    for chosen in order.split(batch):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[chosen]), labels[chosen]).backward()
        optimizer.step()
    model.eval()
    with torch.no_grad():
        return (model(x[count:]).argmax(1) == labels[count:]).float().mean().item()


virtual = convert_sampled_batchnorm(network(nn.BatchNorm2d), sbn.VirtualSamples(4))
models = {
    "batch normalization": network(nn.BatchNorm2d),
    "group normalization": network(lambda channels: nn.GroupNorm(4, channels)),
    "4 virtual samples": VirtualBatch(virtual, 4),
}
for name, model in models.items():
    print(f"{name:<22}{trained(model):.1%}")
