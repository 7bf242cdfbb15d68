"""SampledBatchNorm1d, 2d, 3d: torch's batch normalization layers, their statistics from a sample."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

import sbncore as sbn
from sbncore import checks
from sbncore.adapters.torch import names, ops, replay
from sbncore.adapters.torch.function import BatchNorm, Options
from sbncore.adapters.torch.ranks import group_of, over_ranks
from sbncore.drawing import integer

FULL = sbn.Full()
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


class SampledBatchNorm(_BatchNorm):
    """What the layers share.

    In training ``y = act(weight * (x - mean) * rstd + bias + residual)``, mean and var those of the places
    that the sampler draws, and ``running += momentum * (statistic - running)``, the variance unbiased. In
    evaluation torch's own ``F.batch_norm`` by the running statistics.

    Args:
        num_features, eps, momentum, affine, track_running_stats, device, dtype, bias: as torch's. eps is
            positive.
        sampler: how to draw; `sbncore.Full` is torch's batch normalization.
        gradient: "exact", "sampled" or "detached", as `sbncore.forward`.
        activation: None or "relu", fused.
        process_group: ranks that share their statistics, "world" for all there are; None is this one alone.
        seed, layer: integers that name the draws. Layers of one model should differ in ``layer``
            (`convert_sampled_batchnorm` numbers them), ranks that do not share statistics in ``seed``.
            The step is ``num_batches_tracked``.
        skip_nonfinite: leave a channel's running statistics as they were where its mean or variance is not
            finite (a step that GradScaler will skip).

    forward takes (N, C, *spatial) and optionally a residual of the same shape, dtype and device.

    Raises:
        What torch's layer raises for the same input, but before the counter or a statistic has moved.
        ValueError, TypeError: for the keyword arguments, naming them, and for a sample of a single value.

    Source: Chen et al., IEEE TNNLS 32(1), 2021, section III.
    """

    untracked: Tensor | None

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        bias: bool = True,
        sampler: sbn.Sampler = FULL,
        gradient: str = "exact",
        activation: str | None = None,
        process_group: Any = None,
        seed: int = 0,
        layer: int = 0,
        skip_nonfinite: bool = False,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype)
        if not bias:
            self.register_parameter("bias", None)
        self.configure(sampler, gradient, activation, process_group, seed, layer, skip_nonfinite)

    def configure(
        self,
        sampler: sbn.Sampler,
        gradient: str,
        activation: str | None,
        process_group: Any,
        seed: int,
        layer: int,
        skip_nonfinite: bool,
    ) -> None:
        """Set what torch's layer has not; arguments as the class's."""
        checks.choice(gradient, "gradient", checks.GRADIENTS)
        checks.choice(activation, "activation", (None, "relu"))
        self.sampler, self.gradient, self.activation = sampler, gradient, activation
        self._check_gradient()
        self.process_group, self.skip_nonfinite = process_group, bool(skip_nonfinite)
        self.seed, self.layer = integer("seed", seed), integer("layer", layer)
        # counts the draws where num_batches_tracked does not
        self.register_buffer("untracked", None, persistent=False)

    @property
    def sampler(self) -> sbn.Sampler:
        """How to draw; may be set anew at any time."""
        return self._sampler

    @sampler.setter
    def sampler(self, sampler: sbn.Sampler) -> None:
        if not isinstance(sampler, sbn.Sampler):
            raise TypeError(f"sampler: expected a Sampler, got {type(sampler).__name__}")
        self._sampler, self._name = sampler, names.name_of(sampler)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        names.name_of(self._sampler)

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """Return y; in training, move the running statistics and the counter once all is well."""
        self._check_input_dim(input)
        if residual is not None and residual.shape != input.shape:
            raise ValueError(
                f"residual: expected shape {tuple(input.shape)} as input, got {tuple(residual.shape)}"
            )
        running_mean = self.running_mean
        if not self.training and running_mean is not None:
            return self._evaluated(input, residual)
        tracked = self.training and self.track_running_stats and running_mean is not None
        if input.shape[1] != self.num_features and (self.affine or tracked):
            raise RuntimeError(
                f"input: expected {self.num_features} channels, got shape {tuple(input.shape)}"
            )
        if input.dtype not in DTYPES:
            raise NotImplementedError(f"input: expected one of {DTYPES}, got {input.dtype}")
        self._check_gradient()
        counter = self.num_batches_tracked if tracked else self._untracked(input.device)
        step, counts = replay.step_of(self, counter)
        arguments = (
            input, self.weight, self.bias, residual, running_mean if tracked else None,
            self.running_var if tracked else None, step, self._options(),
        )  # fmt: skip
        group = None if self.process_group is None else group_of(self.process_group)
        if group is None:
            y, mean, var = BatchNorm.apply(*arguments, counts and self.momentum is not None)
        else:
            y, mean, var = over_ranks(*arguments, group)
        if counts and self.training:
            if tracked and mean is not None:
                self._move(mean, var)
            counter.add_(1)
        return y

    def _check_gradient(self) -> None:
        if self.gradient == "sampled" and self._sampler.virtual:
            raise ValueError("gradient: 'sampled' expects a sample of the batch, got virtual samples too")

    def _options(self) -> Options:
        momentum = 1.0 if self.momentum is None else float(self.momentum)
        return Options(
            self._name, ops.word(self.seed), ops.word(self.layer), momentum, float(self.eps),
            self.activation == "relu", self.skip_nonfinite, self.gradient,
        )  # fmt: skip

    def _evaluated(self, input: Tensor, residual: Tensor | None) -> Tensor:
        y = F.batch_norm(
            input, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps
        )
        if residual is not None:
            y = y.add_(residual)
        return y.relu_() if self.activation == "relu" else y

    def _move(self, mean: Tensor, var: Tensor) -> None:
        if self.momentum is None:  # mean and var are then this step's own
            share = 1 / (self.num_batches_tracked + 1).to(torch.float64)
            self.running_mean.lerp_(mean, share.to(mean.dtype))
            self.running_var.lerp_(var, share.to(var.dtype))
        else:
            self.running_mean.copy_(mean)
            self.running_var.copy_(var)

    def _untracked(self, device: torch.device) -> Tensor:
        if self.untracked is None:
            self.untracked = torch.zeros((), dtype=torch.int64, device=device)
        return self.untracked

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"expected at least 2D input (got {input.dim()}D input)")

    def extra_repr(self) -> str:
        """Return torch's line and what is different from its layer."""
        line = f"{super().extra_repr()}, sampler={self.sampler}, layer={self.layer}"
        if self.seed:
            line += f", seed={self.seed}"
        if self.gradient != "exact":
            line += f", gradient={self.gradient!r}"
        return line if self.activation is None else f"{line}, activation={self.activation!r}"


class SampledBatchNorm1d(SampledBatchNorm, nn.BatchNorm1d):
    """`SampledBatchNorm` of (N, C) or (N, C, L), a `torch.nn.BatchNorm1d`."""

    _check_input_dim = nn.BatchNorm1d._check_input_dim


class SampledBatchNorm2d(SampledBatchNorm, nn.BatchNorm2d):
    """`SampledBatchNorm` of (N, C, H, W), a `torch.nn.BatchNorm2d`."""

    _check_input_dim = nn.BatchNorm2d._check_input_dim


class SampledBatchNorm3d(SampledBatchNorm, nn.BatchNorm3d):
    """`SampledBatchNorm` of (N, C, D, H, W), a `torch.nn.BatchNorm3d`."""

    _check_input_dim = nn.BatchNorm3d._check_input_dim
