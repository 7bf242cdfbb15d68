"""The share of a training step that normalization takes, by PyTorch's profiler."""

from __future__ import annotations

import torch

from bench.trainee import Trainee

NORMALIZATION = {
    "aten::batch_norm", "aten::group_norm", "aten::relu_", "aten::add_", "NativeBatchNormBackward0",
    "NativeGroupNormBackward0", "ReluBackward0", "BatchNorm", "BatchNormBackward",
}  # fmt: skip


def share(trainee: Trainee, x: torch.Tensor, labels: torch.Tensor, steps: int) -> float:
    """Return the part of a step spent in normalization, with the ReLU and the addition behind it."""
    with torch.profiler.profile() as profile:
        spent = sum(trainee.step(x, labels)[1] for _ in range(steps))
    events = [event for event in profile.key_averages() if event.key in NORMALIZATION]
    device = trainee.finish is torch.cuda.synchronize if torch.cuda.is_available() else False
    times = (event.device_time_total if device else event.cpu_time_total for event in events)
    return sum(times) / 1e6 / spent
