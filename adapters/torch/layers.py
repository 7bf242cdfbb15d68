"""SampledBatchNorm1d, 2d, 3d: torch's batch normalization layers, their statistics from a sample."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

import sbncore as sbn
from sbncore import checks
from sbncore.adapters.torch import names, ops, refusals, replay
from sbncore.adapters.torch.function import BatchNorm, Options
from sbncore.adapters.torch.ranks import group_of, over_ranks, process_group

FULL = sbn.Full()
OPTIONS = checks.OPTIONS | {
    "process_group": process_group,
    "own_rows": lambda value: checks.flag(value, "own_rows"),
}


class SampledBatchNorm(_BatchNorm):
    """What the layers share.

    In training ``y = act(weight * (x - mean) * rstd + bias + residual)``, mean and var those of the places
    that the sampler draws, and ``running += momentum * (statistic - running)``, the variance unbiased. In
    evaluation torch's own ``F.batch_norm`` by the running statistics.

    Args:
        num_features, eps, momentum, affine, track_running_stats, device, dtype, bias: as torch's. eps is
            positive.
        sampler: how to draw; `sbncore.Full` is torch's batch normalization. One with virtual samples expects
            a `VirtualBatch` around the layer, or ``own_rows``.
        gradient: "exact", "sampled" or "detached", as `sbncore.forward`.
        activation: None or "relu", fused.
        process_group: ranks that share their statistics, "world" for all there are; None is this one alone.
        seed, layer: integers that name the draws. Layers of one model should differ in ``layer``
            (`convert_sampled_batchnorm` numbers them), ranks that do not share statistics in ``seed``.
            The step is ``num_batches_tracked``.
        skip_nonfinite: leave a channel's running statistics as they were where its mean or variance is not
            finite (a step that GradScaler will skip).
        own_rows: the caller appends the virtual samples to every batch and removes them, without a
            `VirtualBatch`.

    All of these, eps and momentum too, may be set anew at any time, and are checked when they are.

    forward takes (N, C, *spatial) and optionally a residual of the same shape, dtype and device.

    Raises:
        What torch's layer raises for the same input, but before the counter or a statistic has moved.
        ValueError, TypeError: for the keyword arguments, naming them, and for a sample of a single value.

    Source: Chen et al., IEEE TNNLS 32(1), 2021, section III.
    """

    sampler: sbn.Sampler
    gradient: str
    activation: str | None
    process_group: Any
    seed: int
    layer: int
    skip_nonfinite: bool
    own_rows: bool
    untracked: Tensor

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
        own_rows: bool = False,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype)
        if not bias:
            self.register_parameter("bias", None)
        self.configure(
            sampler=sampler,
            gradient=gradient,
            activation=activation,
            process_group=process_group,
            seed=seed,
            layer=layer,
            skip_nonfinite=skip_nonfinite,
            own_rows=own_rows,
        )

    def configure(self, **options: Any) -> None:
        """Set what torch's layer has not; arguments as the class's keyword-only ones, all of them."""
        options = {"eps": self.eps, "momentum": self.momentum} | options
        for name in options:
            self.__dict__.pop(name, None)  # the new ones need not agree with the old
        for name, value in options.items():
            setattr(self, name, value)
        # Counts the draws where num_batches_tracked does not. Here, since none can be made while tracing, and
        # no buffer, since torch's layer has none.
        like = self.weight if self.running_mean is None else self.running_mean
        self.untracked = torch.zeros((), dtype=torch.int64, device=None if like is None else like.device)

    def __setattr__(self, name: str, value: Any) -> None:
        rule = OPTIONS.get(name)
        if rule is not None:
            value = rule(value)
            if name in ("sampler", "gradient"):
                both = {name: value}
                sampler, gradient = (both.get(k, self.__dict__.get(k)) for k in ("sampler", "gradient"))
                if sampler is not None and gradient is not None:
                    checks.gradient_for(gradient, sampler)
            if name == "sampler":
                self._name, self._has_prior = names.name_of(value), names.has_prior(value)
        super().__setattr__(name, value)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._name = names.name_of(self.sampler)  # another process may call it otherwise

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        moved = fn(self.untracked)
        if moved is not self.untracked:  # to_empty leaves it undefined, half and the like change its type
            new = torch.zeros((), dtype=torch.int64, device=moved.device)
            self.untracked = new if self.untracked.is_meta or new.is_meta else new.copy_(self.untracked)
        return self

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """Return y; in training, move the running statistics and the counter once all is well."""
        if isinstance(input, fx.Proxy):
            return refusals.leaf(self, input, residual)
        self._check_input_dim(input)
        if residual is not None and residual.shape != input.shape:
            raise ValueError(
                f"residual: expected shape {tuple(input.shape)} as input, got {tuple(residual.shape)}"
            )
        mean, var = self.running_mean, self.running_var
        if not self.training and mean is not None:
            return self._evaluated(input, residual)
        if mean is None or not (self.training and self.track_running_stats):
            mean = var = None
        weight, bias = self.weight, self.bias
        refusals.check(self, input, weight, bias, mean, var)
        counter = None if mean is None else self.num_batches_tracked
        if counter is None:
            counter = self.untracked
        replayed: Any = ()
        if self.training:
            state = (counter,) if mean is None or var is None else (counter, mean, var)
            read, counts = replay.read(state, self._has_prior)
            step, *replayed = read
        else:
            step, counts = torch.zeros((), dtype=torch.int64, device=input.device), False
        if step.device != input.device:
            step = step.to(input.device)
        arguments = input, weight, bias, residual, *(replayed or (mean, var)), step, self._options()
        group = None if self.process_group is None else group_of(self.process_group)
        if group is None:
            moves = counts is True and self.momentum is not None
            in_place = moves and (not replayed or replayed[0] is mean)
            y, new_mean, new_var = BatchNorm.apply(*arguments, in_place)
        else:
            y, new_mean, new_var = over_ranks(*arguments, group)
        if counts is not False:
            if mean is not None and var is not None and new_mean is not None:
                self._move((mean, new_mean), (var, new_var), counts=counts)
            counter.add_(1 if counts is True else counts)
        return y

    def _options(self) -> Options:
        momentum = self.momentum
        if momentum is None:  # as torch: of no number of batches there is no average
            momentum = 0.0 if self.num_batches_tracked is None else 1.0
        return Options(
            self._name,
            ops.word(self.seed),
            ops.word(self.layer),
            momentum,
            self.eps,
            self.activation == "relu",
            self.skip_nonfinite,
            self.gradient,
        )

    def _evaluated(self, input: Tensor, residual: Tensor | None) -> Tensor:
        mean, var = self.running_mean, self.running_var
        refusals.check_memory(mean, var)
        if mean is not None and var is not None:
            mean, var = replay.constants(mean, var, input, self.weight)
        y = F.batch_norm(input, mean, var, self.weight, self.bias, False, 0.0, self.eps)
        if residual is not None:
            y = y.add_(residual)
        return y.relu_() if self.activation == "relu" else y

    def _move(self, *pairs: tuple[Tensor, Tensor], counts: Literal[True] | Tensor) -> None:
        """Set running statistics to new ones, or if momentum is None let them approach this step's own."""
        share = None
        if self.momentum is None and self.num_batches_tracked is not None:
            share = 1 / (self.num_batches_tracked + 1).to(torch.float64)
        for running, new in pairs:
            if share is not None:
                new = running.lerp(new, share.to(new.dtype))
            running.copy_(new if counts is True else torch.where(counts > 0, new, running))

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
