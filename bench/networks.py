"""The networks that are trained: small ones, for small images; their weights follow from a seed alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from bench.resnet import ResNet

WIDTHS = 16, 32, 32, 64, 64
STRIDES = 1, 2, 1, 2, 1


class Plain(nn.Module):
    """Convolutions one behind another, each normalized and rectified, then the mean and a linear head."""

    def __init__(
        self, channels: int, classes: int, dimensions: int, strides: Sequence[int] = STRIDES
    ) -> None:
        super().__init__()
        conv, norm = (nn.Conv1d, nn.BatchNorm1d) if dimensions == 1 else (nn.Conv2d, nn.BatchNorm2d)
        layers: list[nn.Module] = []
        for inputs, outputs, stride in zip((channels, *WIDTHS[:-1]), WIDTHS, strides, strict=True):
            size = 3 if dimensions == 2 else 9
            layers += [conv(inputs, outputs, size, stride, padding=size // 2, bias=False)]
            layers += [norm(outputs), nn.ReLU(inplace=True)]
        self.features = nn.Sequential(*layers)
        self.fc = nn.Linear(WIDTHS[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.features(x).flatten(2).mean(2))


class Sequence1d(nn.Module):
    """The pixels of an image, row behind row, as a signal through 1-D convolutions."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.network = Plain(channels, classes, 1, (2, 2, 2, 2, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x.flatten(2))


NETWORKS: dict[str, Callable[[int, int], nn.Module]] = {
    "plain": lambda channels, classes: Plain(channels, classes, 2),
    "resnet": lambda channels, classes: ResNet(channels, classes),
    "1d": Sequence1d,
}


def build(name: str, channels: int, classes: int, seed: int) -> nn.Module:
    """Return a network; torch's own random numbers stay as they were."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        network = NETWORKS[name](channels, classes)
        for module in network.modules():
            if isinstance(module, nn.Conv1d | nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return network
