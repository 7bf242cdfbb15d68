"""Which sampler each layer of a model can do with, judged by what goes into it."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import sbncore as sbn


def suggest_samplers(
    model: nn.Module,
    batch: Any,
    *,
    tolerance: float = 0.1,
    candidates: Iterable[sbn.Sampler] | None = None,
    draws: int = 16,
    seed: int = 0,
) -> dict[str, sbn.Sampler]:
    """Return `sbncore.suggest` of every BatchNorm layer's input, by the layers' names.

    One forward of a copy in training mode, without gradients; the model, its statistics and torch's random
    numbers stay as they are. ``convert_sampled_batchnorm(model, suggested)`` takes what is returned.

    Args:
        model: any module with torch's BatchNorm layers, or sampled ones, before or after some training.
        batch: what to call the model with, a tensor or a tuple of arguments: a training batch, not a small
            one, since errors depend on its size.
        tolerance, candidates, draws, seed: as `sbncore.suggest`.

    Raises:
        TypeError: for a model that is none. ValueError: for one without BatchNorm layers that are called.
        As `sbncore.suggest`.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    chosen: dict[str, sbn.Sampler] = {}
    candidates = None if candidates is None else list(candidates)
    options: dict[str, Any] = {
        "tolerance": tolerance, "candidates": candidates, "draws": draws, "seed": seed,
    }  # fmt: skip

    def judge(name: str) -> Any:
        def hook(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            chosen.setdefault(name, sbn.suggest(arguments[0].detach(), eps=module.eps, **options))

        return hook

    copied = copy.deepcopy(model).train()
    for name, module in copied.named_modules():
        if isinstance(module, _BatchNorm):
            module.register_forward_pre_hook(judge(name))
    with torch.no_grad(), torch.random.fork_rng():
        copied(*(batch if isinstance(batch, tuple) else (batch,)))
    if not chosen:
        raise ValueError("model: expected BatchNorm layers that a forward calls, found none")
    return chosen
