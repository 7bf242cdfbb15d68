"""Many copies of the network `plain`, trained at once with draws of their own.

A copy has its own initial weights, order of images and draws; the first two are the same for every sample,
so that differences are paired. The copies are groups of one network's channels. Statistics are taken by
PyTorch from elements that its generator draws: an emulation, which can also draw anew for each group of
channels, or spread the starts evenly over the samples, as the engines do not.

Accuracy is that of the test images by the running statistics, "recalibrated" by statistics of whole batches
taken after training; the loss is the mean over the last epoch, and tells samples apart sooner. The errors are
those of mean, over the batch's deviation, and of log(var): root mean squares over channels and steps, by
layer.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from bench import report
from bench.data import Images, load
from bench.machine import machine
from bench.networks import STRIDES, WIDTHS
from bench.options import integer, parser
from sbncore.spacing import distance

BATCH, TESTED, RECALIBRATED = 128, 500, 10  # images, images at a time, batches of so many
MOMENTUM, DECAY, RUNNING, EPS = 0.9, 5e-4, 0.1, 1e-5
GOLDEN = (math.sqrt(5) - 1) / 2
EVERY = 20  # steps between two looks at the errors


@dataclass(frozen=True)
class Sample:
    """What statistics are taken from: all, runs of each map, or whole samples."""

    kind: str = "full"  # "maps" or "samples"
    ratio: float = 1 / 16
    at_least: int = 1024  # values of a channel
    runs: int = 4  # of a map
    group: int = 0  # channels that share a draw ("by 16 channels"), 0 all
    spread: bool = True  # runs over rows and columns, or evenly in memory
    even: bool = False  # starts a golden ratio of the map apart from sample to sample, the first at random
    noise: str = ""  # the sample whose errors, drawn for each channel, are added to the full statistics


FS, BS = partial(Sample, "maps"), partial(Sample, "samples", at_least=4096)
DEFAULT = "FS 1/16, the default"  # the converter's
SAMPLES = {
    "full BN": Sample(),
    DEFAULT: FS(),
    "FS 1/16, by 16 channels": FS(group=16),
    "FS 1/16, even": FS(even=True),
    "FS 1/16, even, by 16 channels": FS(group=16, even=True),
    "FS 1/16, one run": FS(runs=1),
    "FS 1/16, runs not spread": FS(spread=False),
    "FS 1/16, 4,096 values": FS(at_least=4096),
    "FS 1/8": FS(1 / 8),
    "BS 1/16, 4,096 values": BS(),
    "BS 1/16, 4,096 values, by 16 channels": BS(group=16),
    "full BN and the default's errors as noise": Sample(noise=DEFAULT),
    "full BN, other seeds": Sample(),
}


class Result(NamedTuple):
    """A figure of each copy, and the errors of each layer."""

    accuracy: np.ndarray
    recalibrated: np.ndarray
    loss: np.ndarray
    errors: list[tuple[float, float]]


@dataclass
class Ensemble:
    """Copies of a network that are trained together."""

    data: Images
    copies: int
    epochs: int
    rate: float
    device: str
    seed: int = 0
    errors: list[list[tuple[float, float]]] = field(default_factory=lambda: [[] for _ in WIDTHS])

    def __post_init__(self) -> None:
        self.draws = torch.Generator(self.device).manual_seed(1000 + self.seed)
        self.order = torch.Generator(self.device).manual_seed(self.seed)
        weights, inputs = torch.Generator().manual_seed(self.seed), self.data.x.shape[1]
        self.channels, self.parameters = inputs, list[Tensor]()
        for outputs in (*WIDTHS, self.data.classes):
            size = (3, 3) if len(self.parameters) < 3 * len(WIDTHS) else ()
            bound = 1 / math.sqrt(inputs * math.prod(size))
            shape = (self.copies * outputs, inputs, *size)
            self.parameters.append((torch.rand(shape, generator=weights) * 2 - 1).mul(bound).to(self.device))
            for value in (1.0, 0.0):
                self.parameters.append(torch.full((self.copies, outputs), value, device=self.device))
            inputs = outputs
        for each in self.parameters:
            each.requires_grad_()
        self.running = [
            [torch.full((self.copies, C), value, device=self.device) for value in (0.0, 1.0)] for C in WIDTHS
        ]
        self.amp = partial(torch.autocast, self.device, torch.bfloat16, enabled=self.device == "cuda")

    def train(self, sample: Sample, noise: list[tuple[float, float]]) -> Result:
        """Train all copies; ``noise`` is of mean and log(var), for each layer."""
        x, labels, x_test, labels_test = self._tensors()
        batches = len(x) // BATCH
        optimizer = torch.optim.SGD(self.parameters, self.rate, MOMENTUM, weight_decay=DECAY)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.epochs * batches)
        last = torch.zeros(self.copies, device=self.device)
        for step, chosen in enumerate(self._orders(len(x), batches)):
            logits = self.network(x[chosen].flatten(1, 2), sample, noise, RUNNING, step % EVERY == 1)
            losses = F.cross_entropy(logits.flatten(0, 1), labels[chosen].flatten(), reduction="none")
            loss = losses.view(len(chosen), self.copies).mean(0)
            optimizer.zero_grad()
            loss.sum().backward()
            optimizer.step()
            schedule.step()
            last = loss.detach() + (last if step % batches else 0)
        accuracy = self.accuracy(x_test, labels_test)
        with torch.no_grad():
            for k in range(RECALIBRATED):
                some = x[k * len(x) // RECALIBRATED :][:TESTED]
                self.network(some.repeat(1, self.copies, 1, 1), Sample(), [], 1 / (k + 1))
        found = [last / batches, self.accuracy(x_test, labels_test)]
        loss_, recalibrated = (each.cpu().numpy() for each in found)
        means = [tuple(np.sqrt(np.mean(each, 0)).tolist()) for each in self.errors if each]
        return Result(accuracy.cpu().numpy(), recalibrated, loss_, means)

    def _tensors(self) -> tuple[Tensor, ...]:
        data = self.data.x, self.data.labels, self.data.x_test, self.data.labels_test
        return tuple(torch.from_numpy(each).to(self.device) for each in data)

    def _orders(self, size: int, batches: int) -> Iterator[Tensor]:
        """Yield the images of each step, (BATCH, copies)."""
        permuted = partial(torch.randperm, size, device=self.device, generator=self.order)
        for _ in range(self.epochs):
            order = torch.stack([permuted() for _ in range(self.copies)], 1)
            yield from order[: batches * BATCH].split(BATCH)

    def accuracy(self, x: Tensor, labels: Tensor) -> Tensor:
        """Return the percentage of right answers of each copy."""
        right = torch.zeros(self.copies, device=self.device)
        with torch.no_grad():
            for some, wanted in zip(x.split(TESTED), labels.split(TESTED), strict=True):
                logits = self.network(some.repeat(1, self.copies, 1, 1), None, [])
                right = right + (logits.argmax(2) == wanted[:, None]).sum(0)
        return 100 * right / len(x)

    def network(
        self,
        x: Tensor,
        sample: Sample | None,
        noise: list[tuple[float, float]],
        share: float = 0,
        looks: bool = False,
    ) -> Tensor:
        """Return the logits (N, copies, classes); without a sample by the running statistics.

        ``share`` is the weight of the new statistics in those.
        """
        for k, (C, stride) in enumerate(zip(WIDTHS, STRIDES, strict=True)):
            convolution, weight, bias = self.parameters[3 * k : 3 * k + 3]
            with self.amp():
                x = F.conv2d(x, convolution, stride=stride, padding=1, groups=self.copies)
            h = x.float().unflatten(1, (self.copies, C)).flatten(3)  # (N, copies, C, S)
            if sample is None:
                mean, var = self.running[k]
            else:
                mean, var, count = self.moments(h, sample)
                if noise:
                    mean = mean + self._normal(mean) * noise[k][0] * var.detach().sqrt()
                    var = var * (self._normal(mean) * noise[k][1]).exp()
                with torch.no_grad():
                    self.running[k][0].lerp_(mean, share)
                    self.running[k][1].lerp_(var * (count / (count - 1)), share)
                    if looks:
                        full, full_var, _ = self.moments(h, Sample())
                        off = ((mean - full) ** 2 / full_var).mean(), ((var / full_var).log() ** 2).mean()
                        self.errors[k].append((float(off[0]), float(off[1])))
            scale = weight * (var + EPS).rsqrt()
            y = torch.relu((h - mean[..., None]) * scale[..., None] + bias[..., None])
            x = y.view_as(x)
        pooled = x.float().unflatten(1, (self.copies, -1)).flatten(3).mean(3)
        head, _, bias = self.parameters[-3:]
        return torch.einsum("nrc,roc->nro", pooled, head.unflatten(0, (self.copies, -1))) + bias

    def moments(self, h: Tensor, sample: Sample) -> tuple[Tensor, Tensor, int]:
        """Return mean and var (copies, C) of a sample, and how many values it has."""
        if sample.kind == "maps":
            h = h.gather(3, self.positions(sample, *h.shape))
        elif sample.kind == "samples":
            N, R, C, S = h.shape
            count = min(N, max(round(sample.ratio * N), math.ceil(sample.at_least / S)))
            groups = C // sample.group if sample.group else 1
            chosen = self._integers(N, (1, R, groups)) + torch.arange(count, device=h.device).view(-1, 1, 1)
            chosen = (chosen % N).repeat_interleave(C // groups, 2)
            h = h.gather(0, chosen[..., None].expand(count, R, C, S))
        var, mean = torch.var_mean(h, (0, 3), correction=0)
        return mean, var, h.shape[0] * h.shape[3]

    def positions(self, sample: Sample, N: int, R: int, C: int, S: int) -> Tensor:
        """Return the positions (N, R, C, m) of a sample of maps."""
        values = min(S, max(math.ceil(sample.ratio * S), math.ceil(sample.at_least / N)))
        length = -(-values // sample.runs)
        align, groups = math.gcd(length, 16, S), C // sample.group if sample.group else 1
        starts = S // align
        if sample.even:
            first = torch.rand((1, R, groups), device=self.device, generator=self.draws)
            steps = GOLDEN * torch.arange(N, device=self.device).view(-1, 1, 1)
            start = ((first + steps) % 1 * starts).long().clamp(max=starts - 1)
        else:
            start = self._integers(starts, (N, R, groups))
        k = torch.arange(length * sample.runs, device=self.device)
        apart = S // sample.runs
        if sample.spread:
            side = math.isqrt(S)
            apart = distance((side, side), length * sample.runs, length, align)
        offsets = k // length * apart + k % length
        found = (start[..., None] * align + offsets) % S
        return found.repeat_interleave(C // groups, 2)

    def _integers(self, below: int, shape: tuple[int, ...]) -> Tensor:
        return torch.randint(0, below, shape, device=self.device, generator=self.draws)

    def _normal(self, like: Tensor) -> Tensor:
        return torch.randn(like.shape, device=self.device, generator=self.draws)


def main(arguments: list[str]) -> None:
    one = parser("ensemble", __doc__, "a few copies and images")
    one.formatter_class = argparse.RawDescriptionHelpFormatter
    add = one.add_argument
    add("--data", metavar="FOLDER", help="as bench training's; default: Fashion-MNIST")
    add("--images", type=integer, help="to train on; default: all")
    add("--copies", type=integer, default=32, help="that are trained at once")
    add("--rounds", type=integer, default=3, help="of other seeds")
    add("--epochs", type=integer, default=6)
    add("--rate", type=float, default=0.2)
    add("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    add("--samples", nargs="+", type=int, metavar="K", help="of these numbers; the first is always one")
    options = one.parse_args(arguments)
    data = load(options.data)
    if options.quick:
        options.images, options.copies, options.rounds, options.epochs = options.images or 1000, 2, 1, 2
    data = data.subset(options.images) if options.images else data
    chosen = [name for k, name in enumerate(SAMPLES) if not options.samples or k in (0, *options.samples)]
    parts: dict[str, list[Result]] = {name: [] for name in chosen}
    for k, name in (bar := tqdm([(k, name) for k in range(options.rounds) for name in chosen])):
        bar.set_description(name)
        sample, seed = SAMPLES[name], k + 1000 * name.endswith("other seeds")
        noise = parts[sample.noise][-1].errors if sample.noise else []
        ensemble = Ensemble(data, options.copies, options.epochs, options.rate, options.device, seed)
        parts[name].append(ensemble.train(sample, noise))
        bar.write(" | ".join(line(name, parts[name][-1], parts[chosen[0]][-1])))  # lest a run cut off be lost
    gpu = torch.cuda.get_device_name() if options.device == "cuda" else ""
    where = machine(gpu, [f"CUDA {torch.version.cuda}"] if gpu else [])
    lines = table({name: joined(results) for name, results in parts.items()})
    about = f"{data.name}, {len(data.x)} images, {options.epochs} epochs, rate {options.rate:g}"
    stem = f"ensemble-{Path(options.data).name if options.data else 'fashion-mnist'}"
    lines = [report.about(where, "ensemble", arguments), "", about + ".", "", *lines]
    report.publish(options.out, stem, "Samples, by many copies of one network", lines, where)


def joined(results: list[Result]) -> Result:
    """Return the results of all rounds as one."""
    accuracy, recalibrated, loss = map(np.concatenate, zip(*(one[:3] for one in results), strict=True))
    return Result(accuracy, recalibrated, loss, results[-1].errors)


def table(results: dict[str, Result]) -> list[str]:
    """Return a table of the samples beside the first, which is full BN."""
    full = next(iter(results.values()))
    titles = [
        "sample",
        "accuracy, %",
        "minus full",
        "recalibrated, minus full",
        "loss minus full",
        "errors of the mean, %",
        "of log(var), %",
    ]
    lines = [line(name, result, full) for name, result in results.items()]
    about = f"{len(full.accuracy)} copies of each; differences are paired, ± their standard error."
    return [about, "", *report.markdown(titles, lines)]


def line(name: str, result: Result, full: Result) -> list[str]:
    """Return a sample's line of the table."""
    cells = [name, f"{result.accuracy.mean():.2f}"]
    for mine, theirs, digits in zip(result[:3], full[:3], (2, 2, 4), strict=True):
        off = mine - theirs
        error = off.std(ddof=1) / math.sqrt(len(off))
        cells.append(f"{off.mean():+.{digits}f} ± {error:.{digits}f}" if result is not full else "")
    return cells + [" ".join(f"{100 * each[k]:.1f}" for each in result.errors) for k in (0, 1)]
