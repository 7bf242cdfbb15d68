"""A network and its optimizer: a training step, normalization's share of it, the accuracy."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

import sbncore as sbn
from bench.cases import WrongResult

TOLERANCE = 1e-4  # of logits: float32's rounding through a dozen normalized layers
TESTED = 500  # images at a time
NORMALIZATION = {
    "aten::batch_norm", "aten::group_norm", "aten::relu_", "aten::add_", "NativeBatchNormBackward0",
    "NativeGroupNormBackward0", "ReluBackward0", "BatchNorm", "BatchNormBackward",
}  # fmt: skip


@dataclass(frozen=True)
class Settings:
    """What a step depends on besides network and data."""

    batch: int = 128
    rate: float = 0.05  # falls to 0 along a cosine
    momentum: float = 0.9
    decay: float = 5e-4
    seed: int = 0
    device: str = "cpu"
    channels_last: bool = False
    autocast: str | None = None  # "float16" or "bfloat16"

    @property
    def layout(self) -> torch.memory_format:
        return torch.channels_last if self.channels_last else torch.contiguous_format

    def tensors(self, x: np.ndarray, labels: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Return images and labels on the device, in the layout."""
        images = torch.from_numpy(x).to(self.device)
        return images.contiguous(memory_format=self.layout), torch.from_numpy(labels).to(self.device)


class Trainee:
    """A network, trained by stochastic gradient descent."""

    def __init__(self, network: torch.nn.Module, settings: Settings, steps: int) -> None:
        self.network, self.loss = network, torch.nn.CrossEntropyLoss()
        self.optimizer = torch.optim.SGD(
            network.parameters(), settings.rate, settings.momentum, weight_decay=settings.decay
        )
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, steps)
        self.on_gpu = settings.device == "cuda"
        kind = None if settings.autocast is None else getattr(torch, settings.autocast)
        self.autocast = torch.autocast(settings.device, kind, enabled=kind is not None)
        self.finish = torch.cuda.synchronize if self.on_gpu else lambda: None

    def step(self, x: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, float]:
        """Take one step; return the loss and the seconds."""
        self.finish()
        begin = time.perf_counter()
        loss = self._step(x, labels)
        self.finish()
        seconds = time.perf_counter() - begin
        self.schedule.step()
        return loss, seconds

    def _step(self, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        self.optimizer.zero_grad()
        with self.autocast:
            loss = self.loss(self.network(x), labels)
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def captured(self, x: torch.Tensor, labels: torch.Tensor) -> Callable[[], None]:
        """Return what replays a step from a CUDA graph, on these images, and waits for it."""
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):  # libraries choose their kernels
                self._step(x, labels)
        torch.cuda.current_stream().wait_stream(stream)
        with torch.cuda.graph(graph):
            loss = self._step(x, labels)

        def replay() -> None:
            graph.replay()
            self.finish()

        replay()
        if not bool(loss.isfinite()):
            raise WrongResult(f"a step replayed from a graph has loss {loss.item()}")
        return replay


def share(trainee: Trainee, x: torch.Tensor, labels: torch.Tensor, steps: int) -> float:
    """Return the part of a step in normalization, with the ReLU and the addition behind it, profiled."""
    with torch.profiler.profile() as profile:
        spent = sum(trainee.step(x, labels)[1] for _ in range(steps))
    events = [event for event in profile.key_averages() if event.key in NORMALIZATION]
    times = (event.device_time_total if trainee.on_gpu else event.cpu_time_total for event in events)
    return sum(times) / 1e6 / spent


def accuracy(network: torch.nn.Module, x: torch.Tensor, labels: torch.Tensor) -> float:
    """Return the share of right answers, by the running statistics."""
    network.eval()
    with torch.inference_mode():
        parts = zip(x.split(TESTED), labels.split(TESTED), strict=True)
        right = sum(int((network(some).argmax(1) == wanted).sum()) for some, wanted in parts)
    network.train()
    return right / len(x)


def converted(network: torch.nn.Module, sampler: sbn.Sampler, seed: int) -> torch.nn.Module:
    """Return a copy of the network with sampled layers, fused."""
    from sbncore.adapters.torch import convert_sampled_batchnorm

    return convert_sampled_batchnorm(copy.deepcopy(network), sampler, seed=seed, fuse=True)


def check(network: torch.nn.Module, x: torch.Tensor, seed: int) -> None:
    """Raise WrongResult unless the conversion by ``Full()`` agrees on one batch's forward, in training."""
    # a GPU would round what convolutions are given to 10 bits: rounding errors grow a thousandfold
    with torch.no_grad(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        wanted = copy.deepcopy(network).train()(x)
        got = converted(network, sbn.Full(), seed).train()(x)
    off = float((got - wanted).abs().max() / wanted.abs().max().clamp(min=1))
    if not off <= TOLERANCE:
        raise WrongResult(
            f"the network converted by Full() is off by {off:.1e}, more than {TOLERANCE:.0e} allows"
        )
