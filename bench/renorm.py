"""Batch renormalization, to compare with (Ioffe, Batch Renormalization, arXiv 1702.03275, section 3)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class BatchRenorm(nn.Module):
    """``y = weight (xhat r + d) + bias``, r and d the way from the batch's to the running statistics.

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
