"""Small models and comparisons for the tests of VirtualBatch."""

from collections import namedtuple

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import sbncore as sbn
from sbncore.adapters.torch.layers import SampledBatchNorm2d

K = 3
Pair = namedtuple("Pair", "first second")


class Net(nn.Module):
    """A convolution, a sampled layer, dropout, a classifier; ``checkpointed`` recomputes the middle."""

    def __init__(self, dropout=0.5, sampler=None, checkpointed=None):
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, padding=1)
        self.norm = SampledBatchNorm2d(4, sampler=sampler or sbn.VirtualSamples(K))
        self.drop = nn.Dropout(dropout)
        self.head = nn.Linear(4, 5)
        self.checkpointed = checkpointed

    def middle(self, x):
        return self.drop(self.norm(self.conv(x)).relu())

    def forward(self, x):
        if self.checkpointed is None:
            x = self.middle(x)
        else:
            x = checkpoint(self.middle, x, **self.checkpointed)
        return self.head(x.mean((2, 3)))


class Seen(nn.Module):
    """Keeps what it is given."""

    def forward(self, x, *args, **kwargs):
        self.x, self.args, self.kwargs = x, args, kwargs
        return x


def gradients(model, x, seed=1):
    torch.manual_seed(seed)
    x = x.clone().requires_grad_()
    y = model(x)
    model.zero_grad()
    (y**2).sum().backward()
    return [y.detach(), x.grad, *(p.grad.clone() for p in model.parameters())]


def assert_same(ours, theirs):
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)
