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
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

import sbncore as sbn
from bench.renorm import BatchRenorm

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
