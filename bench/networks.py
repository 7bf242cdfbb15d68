"""The networks that are trained: small ones, for small images; their weights follow from a seed alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from bench.report import installed

WIDTHS = 16, 32, 32, 64, 64
STRIDES = 1, 2, 1, 2, 1


class Plain(nn.Module):
    """Convolutions one behind another, each normalized and rectified, then the mean and a linear head."""

    def __init__(
        self, channels: int, classes: int, dimensions: int, strides: Sequence[int] = STRIDES
    ) -> None:
        super().__init__()
        conv, norm = (nn.Conv1d, nn.BatchNorm1d) if dimensions == 1 else (nn.Conv2d, nn.BatchNorm2d)
        size = 9 if dimensions == 1 else 3
        layers: list[nn.Module] = []
        for inputs, outputs, stride in zip((channels, *WIDTHS[:-1]), WIDTHS, strides, strict=True):
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


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside the identity, or beside a 1x1 convolution where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = _conv3x3(inputs, outputs, stride), nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.conv2, self.bn2 = _conv3x3(outputs, outputs), nn.BatchNorm2d(outputs)
        self.downsample: nn.Module | None = None
        if stride != 1 or inputs != outputs:
            conv = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.downsample = nn.Sequential(conv, nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += x if self.downsample is None else self.downsample(x)
        return self.relu(out)


class ResNet(nn.Module):
    """As torchvision writes its own: a stem, stages of two blocks that halve the image from the second on."""

    def __init__(self, channels: int, classes: int, widths: Sequence[int] = (16, 32, 64)) -> None:
        super().__init__()
        self.conv1, self.bn1 = _conv3x3(channels, widths[0]), nn.BatchNorm2d(widths[0])
        self.relu = nn.ReLU(inplace=True)
        pairs = zip((widths[0], *widths[:-1]), widths, (1, *[2] * (len(widths) - 1)), strict=True)
        self.stages = nn.Sequential(
            *(nn.Sequential(BasicBlock(i, o, stride), BasicBlock(o, o, 1)) for i, o, stride in pairs)
        )
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(widths[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        return self.fc(torch.flatten(self.avgpool(self.stages(x)), 1))


def _conv3x3(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)


NETWORKS: dict[str, Callable[[int, int], nn.Module]] = {
    "plain": lambda channels, classes: Plain(channels, classes, 2),
    "resnet": ResNet,
    "1d": Sequence1d,
}


def build(name: str, channels: int, classes: int, seed: int) -> nn.Module:
    """Return a network; torch's own random numbers stay as they were."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        network = NETWORKS[name](channels, classes) if name in NETWORKS else _torchvisions(name, classes)
        for module in network.modules():
            if isinstance(module, nn.Conv1d | nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return network


def torchvisions() -> tuple[str, ...]:
    """Return the names of torchvision's models, none where it is not installed."""
    if not installed("torchvision"):
        return ()
    import torchvision

    return tuple(torchvision.models.list_models(torchvision.models))


def _torchvisions(name: str, classes: int) -> nn.Module:
    import torchvision

    return torchvision.models.get_model(name, num_classes=classes)  # type: ignore[no-any-return]
