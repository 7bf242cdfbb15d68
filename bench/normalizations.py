"""How a network may be normalized, by name.

A name is one of the alternatives (``batch norm``, PyTorch's; ``group norm``; ``batch renorm``) or a sampler,
in parts joined by ``+``, whose weights are equal unless a number and ``*`` stand before them:

    full                                    all of it
    bs/16   bs-random/16   ns/16            one in 16 of the data
    fs/16   fs-runs/16   fs-rows/16   fs-patch/16   fs-grid/16   fs-common/16
    fs-runs/16@1024                         the same, but 1,024 values per channel at least
    vdn/16   vdn:4                          virtual samples: one for 16 of the batch, or 4
    bs/32+vdn/32   0.8*full+0.2*vdn:4       hybrids
    prior:0.3|full                          30 % the running statistics, the rest as behind the bar
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

import sbncore as sbn

PARTS: dict[str, Callable[..., sbn.Sampler]] = {
    "bs": sbn.BatchSampling,
    "bs-random": partial(sbn.BatchSampling, pattern="random"),
    "fs": sbn.FeatureSampling,
    "fs-runs": partial(sbn.FeatureSampling, pattern="runs"),
    "fs-rows": partial(sbn.FeatureSampling, pattern="rows"),
    "fs-patch": partial(sbn.FeatureSampling, pattern="patch"),
    "fs-grid": partial(sbn.FeatureSampling, pattern="grid"),
    "fs-common": partial(sbn.FeatureSampling, pattern="patch", place="common"),
    "ns": sbn.NaiveSampling,
}
GROUP = 8  # channels
ALTERNATIVES = BATCH_NORM, GROUP_NORM, BATCH_RENORM = "batch norm", "group norm", "batch renorm"


def sampler(name: str, batch: int) -> sbn.Sampler:
    """Return the sampler of a name, for a batch size.

    Raises:
        ValueError: for a name that is none.
    """
    if found := re.fullmatch(r"prior:([0-9.]+)\|(.+)", name):
        return sbn.Prior(float(found[1]), sampler(found[2], batch))
    pairs = [(_weight(part), _part(part.rpartition("*")[2], batch)) for part in name.split("+")]
    if len(pairs) == 1:
        return pairs[0][1]
    total = sum(weight for weight, _ in pairs)
    return sbn.Mixture([(weight / total, part) for weight, part in pairs])


def _weight(part: str) -> float:
    before = part.rpartition("*")[0]
    try:
        return float(before or 1)
    except ValueError:
        raise ValueError(f"expected a weight before the '*', got {part!r}") from None


def _part(part: str, batch: int) -> sbn.Sampler:
    if part == "full":
        return sbn.Full()
    if found := re.fullmatch(r"vdn:(\d+)", part):
        return sbn.VirtualSamples(int(found[1]))
    found = re.fullmatch(r"([a-z-]+)/([1-9]\d*)(?:@([1-9]\d*))?", part)
    if found and found[1] == "vdn" and not found[3]:
        return sbn.VirtualSamples(max(1, round(batch / int(found[2]))))
    if not found or found[1] not in PARTS:
        known = ", ".join(f"{each}/16" for each in (*PARTS, "vdn"))
        raise ValueError(f"expected full, {known}, fs-runs/16@1024 or vdn:4 as normalization, got {part!r}")
    return PARTS[found[1]](1 / int(found[2]), at_least=int(found[3] or 1))


def normalized(
    network: nn.Module, name: str, *, batch: int, steps: int, gradient: str = "exact", seed: int = 0
) -> nn.Module:
    """Return the network, its batch normalization replaced in place; ``steps`` is how many it will train."""
    from sbncore.adapters.torch import VirtualBatch, convert_sampled_batchnorm

    if name == BATCH_NORM:
        return network
    if name == GROUP_NORM:
        return _replaced(network, lambda one: nn.GroupNorm(one.num_features // GROUP, one.num_features))
    if name == BATCH_RENORM:
        return _replaced(network, lambda one: BatchRenorm(one, rise=max(1, steps // 4)))
    how = sampler(name, batch)
    network = convert_sampled_batchnorm(network, how, gradient=gradient, seed=seed, fuse=True)
    return VirtualBatch(network, how.virtual, seed=seed) if how.virtual else network


def _replaced(network: nn.Module, by: Callable[[nn.Module], nn.Module]) -> nn.Module:
    for module in list(network.modules()):
        for name, child in module.named_children():
            if isinstance(child, _BatchNorm):
                like = child.weight
                setattr(module, name, by(child).to(like.device, torch.float32))
    return network


class BatchRenorm(nn.Module):
    """Batch renormalization (Ioffe, arXiv 1702.03275, section 3), to compare with.

    ``y = weight (xhat r + d) + bias``, r and d the way from the batch's to the running statistics.

    ``r = clip(std / running_std, 1/r_max, r_max)`` and ``d = clip((mean - running_mean) / running_std,
    -d_max, d_max)`` are constants to the gradient; r_max and d_max grow from 1 and 0, which is batch
    normalization, over the first ``rise`` steps.
    """

    def __init__(self, like: nn.Module, rise: int, r_max: float = 3.0, d_max: float = 5.0) -> None:
        super().__init__()
        self.weight, self.bias, self.eps, self.momentum = like.weight, like.bias, like.eps, like.momentum
        self.rise, self.r_max, self.d_max, self.steps = rise, r_max, d_max, 0
        self.register_buffer("running_mean", torch.zeros_like(like.running_mean))
        self.register_buffer("running_var", torch.ones_like(like.running_var))

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        axes = [0, *range(2, x.ndim)]
        spread = (1, -1, *[1] * (x.ndim - 2))
        var, mean = torch.var_mean(x, axes, correction=0)
        with torch.no_grad():
            part = min(1.0, self.steps / self.rise)
            r_max, d_max = 1 + part * (self.r_max - 1), part * self.d_max
            std, running = (var + self.eps).sqrt(), (self.running_var + self.eps).sqrt()
            r = (std / running).clamp(1 / r_max, r_max)
            d = ((mean - self.running_mean) / running).clamp(-d_max, d_max)
            values = x.numel() // x.shape[1]
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * (values / max(1, values - 1)), self.momentum)
            self.steps += 1
        scale = self.weight * r * (var + self.eps).rsqrt()
        offset = self.bias + self.weight * d - mean * scale
        return x * scale.view(spread) + offset.view(spread)
