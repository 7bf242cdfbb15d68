"""A residual network trained by PyTorch, its batch normalization full and sampled, in one run.

All contenders begin with the same weights and see the same batches; step by step each takes one step, in
alternating order, so that all of them see the same machine. The clock runs for forward, loss, backward and
update. Before it does, the converted network with every value in its statistics must agree with PyTorch's.
"""

from __future__ import annotations

import argparse
import copy
import csv
import shlex
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np

import sbncore as sbn
from bench import timing
from bench.cases import WrongResult
from bench.data import BadData, Data, load
from bench.layer import BUSY, SPINNING
from bench.progress import Progress
from bench.report import Machine, machine

try:
    import torch

    from bench import memory
except ImportError:  # main says so
    torch = None

SAMPLERS: dict[str, sbn.Sampler] = {
    "full": sbn.Full(),
    "bs/8": sbn.BatchSampling(1 / 8),
    "fs/8": sbn.FeatureSampling(1 / 8),
    "fs/16": sbn.FeatureSampling(1 / 16),
    "fs/32": sbn.FeatureSampling(1 / 32),
    "ns/16": sbn.NaiveSampling(1 / 16),
}
FULL_BN = "nn.BatchNorm2d"
TOLERANCE = 1e-4  # of logits: float32's rounding through a dozen normalized layers
WARM_UP = 2  # steps of copies: kernels are compiled, algorithms and memory found
TESTED = 500  # images at a time
QUICK_IMAGES = 6000

READING = """\
The time of a step is that of forward, loss, backward and update: the median over the steps (20th to 80th
percentile). Every network took its step on the same batch, in alternating order. The ratio is PyTorch's
median over this one's: above 1 is faster than PyTorch. The accuracy is of one seed after the last epoch.
Kept is what autograd holds for backward; a ReLU's output, which fusion spares, the next convolution keeps."""


@dataclass(frozen=True)
class Settings:
    """What a training depends on besides network and data."""

    epochs: int = 5
    batch: int = 128
    rate: float = 0.05  # falls to 0 along a cosine
    momentum: float = 0.9
    decay: float = 5e-4
    seed: int = 0
    device: str = "cpu"
    channels_last: bool = False

    def __str__(self) -> str:
        return (
            f"{self.epochs} epochs of batches of {self.batch}, SGD at rate {self.rate:g} down to 0, momentum "
            f"{self.momentum:g}, weight decay {self.decay:g}, seed {self.seed}, {self.device}, "
            f"channels-{'last' if self.channels_last else 'first'}"
        )

    @property
    def layout(self) -> torch.memory_format:
        return torch.channels_last if self.channels_last else torch.contiguous_format


@dataclass(frozen=True)
class Epoch:
    """What one epoch showed: the mean loss, the accuracy after it, the seconds of every step."""

    loss: float
    accuracy: float
    seconds: np.ndarray


@dataclass
class Run:
    """A network's training."""

    name: str
    kept: int  # bytes that autograd keeps for backward
    peak: int | None  # bytes on the GPU during a step
    epochs: list[Epoch] = field(default_factory=list)

    @property
    def milliseconds(self) -> tuple[float, float, float]:
        """Median, 20th and 80th percentile over all steps."""
        return timing.summary(np.concatenate([epoch.seconds for epoch in self.epochs]))


class Trainee:
    """A network and its optimizer: what a step is."""

    def __init__(self, network: torch.nn.Module, settings: Settings, steps: int) -> None:
        self.network, self.loss = network, torch.nn.CrossEntropyLoss()
        self.optimizer = torch.optim.SGD(
            network.parameters(), settings.rate, settings.momentum, weight_decay=settings.decay
        )
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, steps)
        self.finish = torch.cuda.synchronize if settings.device == "cuda" else lambda: None

    def step(self, x: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, float]:
        """Take one step; return the loss and the seconds."""
        self.finish()
        begin = time.perf_counter()
        self.optimizer.zero_grad()
        loss = self.loss(self.network(x), labels)
        loss.backward()
        self.optimizer.step()
        self.finish()
        seconds = time.perf_counter() - begin
        self.schedule.step()
        return loss.detach(), seconds


def train(networks: Mapping[str, torch.nn.Module], data: Data, settings: Settings) -> list[Run]:
    """Train all networks side by side, on their device and in their layout already; show a progress bar."""
    x, labels = _tensors(data.x, data.labels, settings)
    test = _tensors(data.x_test, data.labels_test, settings)
    batches = len(x) // settings.batch
    steps = settings.epochs * batches
    pairs = []
    for name, network in networks.items():
        rehearsal = Trainee(copy.deepcopy(network).train(), settings, WARM_UP)
        first = x[: settings.batch], labels[: settings.batch]
        for _ in range(WARM_UP):
            rehearsal.step(*first)
        peak = memory.peak(partial(rehearsal.step, *first)) if settings.device == "cuda" else None
        run = Run(name, memory.kept(rehearsal.network, first[0]), peak)
        del rehearsal
        pairs.append((Trainee(network.train(), settings, steps), run))
    progress = Progress(steps)
    for epoch in range(settings.epochs):
        order = np.random.default_rng([settings.seed, 1, epoch]).permutation(len(x))
        seconds = {run.name: np.empty(batches) for _, run in pairs}
        losses: dict[str, list[torch.Tensor]] = {run.name: [] for _, run in pairs}
        for k in range(batches):
            chosen = order[k * settings.batch : (k + 1) * settings.batch]
            batch = x[chosen], labels[chosen]
            shift = k % len(pairs)  # nobody always follows the same neighbour through the caches
            for trainee, run in pairs[shift:] + pairs[:shift]:
                loss, seconds[run.name][k] = trainee.step(*batch)
                losses[run.name].append(loss)
            progress.step(f"epoch {epoch + 1} of {settings.epochs}")
        for trainee, run in pairs:
            mean = float(np.mean([float(loss) for loss in losses[run.name]]))
            run.epochs.append(Epoch(mean, accuracy(trainee.network, *test), seconds[run.name]))
    return [run for _, run in pairs]


def accuracy(network: torch.nn.Module, x: torch.Tensor, labels: torch.Tensor) -> float:
    """Return the share of right answers, by the running statistics."""
    network.eval()
    with torch.inference_mode():
        parts = zip(x.split(TESTED), labels.split(TESTED), strict=True)
        right = sum(int((network(some).argmax(1) == wanted).sum()) for some, wanted in parts)
    network.train()
    return right / len(x)


def check(network: torch.nn.Module, x: torch.Tensor, settings: Settings, fuse: bool) -> None:
    """Raise WrongResult unless the conversion by ``Full()`` agrees on one batch's forward, in training."""
    # a GPU would round what convolutions are given to 10 bits: rounding errors grow a thousandfold
    with torch.no_grad(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        wanted = copy.deepcopy(network).train()(x)
        got = converted(network, sbn.Full(), settings.seed, fuse).train()(x)
    off = float((got - wanted).abs().max() / wanted.abs().max().clamp(min=1))
    if not off <= TOLERANCE:
        name = f"the network converted by Full(){', fused,' if fuse else ''}"
        raise WrongResult(f"{name} is off by {off:.1e}, more than {TOLERANCE:.0e} allows")


def converted(network: torch.nn.Module, sampler: sbn.Sampler, seed: int, fuse: bool) -> torch.nn.Module:
    """Return a copy of the network with sampled layers."""
    from sbncore.adapters.torch import convert_sampled_batchnorm

    return convert_sampled_batchnorm(copy.deepcopy(network), sampler, seed=seed, fuse=fuse)


def table(runs: list[Run]) -> list[str]:
    """Return the runs as a Markdown table; the first is what the others are compared with."""
    peaks = [run.peak for run in runs if run.peak is not None]
    titles = ["normalization", "test accuracy", "time per step, ms", "PyTorch / this", "kept, MB"]
    titles += ["peak, MB"] if peaks else []
    lines = [f"| {' | '.join(titles)} |", f"| --- |{' ---: |' * (len(titles) - 1)}"]
    yardstick = runs[0].milliseconds[0]
    for run in runs:
        median, p20, p80 = run.milliseconds
        times = f"{median:.1f} ({p20:.1f} to {p80:.1f})"
        cells = [run.name, f"{run.epochs[-1].accuracy:.1%}", times, f"{yardstick / median:.2f}"]
        cells += [f"{nbytes / 1e6:.1f}" for nbytes in (run.kept, run.peak) if nbytes is not None]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def write(folder: Path, lines: list[str], runs: list[Run], beside: dict[str, object]) -> None:
    """Write training.md, and training.csv with a row for every network and epoch and what is ``beside``."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "training.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    names = ["normalization", "epoch", "steps", "loss", "accuracy", "step_median", "step_p20", "step_p80"]
    with (folder / "training.csv").open("w", newline="", encoding="utf-8") as file:
        sheet = csv.writer(file, lineterminator="\n")
        sheet.writerow([*names, *beside])
        for run in runs:
            for number, epoch in enumerate(run.epochs, 1):
                found = (epoch.loss, epoch.accuracy, *timing.summary(epoch.seconds))
                cells = [run.name, number, len(epoch.seconds), *(f"{value:.4g}" for value in found)]
                sheet.writerow([*cells, *beside.values()])


def main(arguments: list[str]) -> None:
    options = _options(arguments)
    if torch is None:
        sys.exit("training needs PyTorch, which is not installed: pip install torch")
    command = shlex.join(["python", "-m", "bench", "training", *arguments])
    try:
        if options.speed:
            _speed(options, command)
        else:
            _train(options, _subset(load(options.data), options), command)
    except BadData as bad:
        sys.exit(str(bad))
    except WrongResult as wrong:
        sys.exit(f"wrong result, nothing is timed: {wrong}")


def _subset(data: Data, options: argparse.Namespace) -> Data:
    if options.images is not None and options.images > len(data.x):
        raise BadData(f"--images: expected at most the {len(data.x)} of {data.name}, got {options.images}")
    data = data.first(options.images or (QUICK_IMAGES if options.quick else len(data.x)))
    if options.batch > len(data.x):
        raise BadData(f"--batch: expected at most the {len(data.x)} images there are, got {options.batch}")
    return data


def _machine(options: argparse.Namespace) -> Machine:
    """Set the threads; return where they are."""
    if options.device == "cuda" and not torch.cuda.is_available():
        sys.exit("--device cuda: expected a CUDA device, PyTorch finds none")
    threads = options.threads or sbn.get_num_threads()
    sbn.set_num_threads(threads)
    torch.set_num_threads(threads)
    where = machine(threads)
    if options.device == "cuda":
        where = replace(where, cpu=f"{torch.cuda.get_device_name()}, {where.cpu}")
    if float(where.load or 0) > BUSY * where.cores:
        print(f"the machine is busy (load {where.load}): {SPINNING}", file=sys.stderr)
    return where


def _speed(options: argparse.Namespace, command: str) -> None:
    from bench import speed

    where = _machine(options)
    settings = Settings(
        batch=options.batch, seed=options.seed, device=options.device, channels_last=options.channels_last
    )
    speed.run(settings, options.rounds, where, command, options.out)


def _train(options: argparse.Namespace, data: Data, command: str) -> None:
    from bench.resnet import resnet

    where = _machine(options)
    named = ("epochs", "batch", "seed", "device", "channels_last")
    settings = Settings(**{name: getattr(options, name) for name in named})
    network = resnet(data.classes, seed=options.seed).to(options.device, memory_format=settings.layout)
    first, _ = _tensors(data.x[: settings.batch], data.labels[: settings.batch], settings)
    check(network, first, settings, options.fuse)
    sampled = converted(network, SAMPLERS[options.sampler], options.seed, options.fuse)
    name = f"sampled {options.sampler}{', fused' if options.fuse else ''}"
    runs = train({FULL_BN: network, name: sampled}, data, settings)
    images = f"{data.name}, {len(data.x):,} images of {'×'.join(map(str, data.x.shape[2:]))}"
    lines = [f"{where} {images}, {settings}. `{command}`.", "", READING, "", *table(runs)]
    print("\n".join(lines))
    if options.out is not None:
        beside = {"data": data.name, "images": len(data.x)} | asdict(settings) | asdict(where)
        write(options.out, ["# A residual network, trained", "", *lines], runs, beside)
        print(f"written: {options.out / 'training'}.md and .csv", file=sys.stderr)


def _options(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench training", description=__doc__)
    parser.add_argument("--sampler", choices=SAMPLERS, default="fs/16", help="default: fs/16")
    parser.add_argument(
        "--fuse", action=argparse.BooleanOptionalAction, default=True,
        help="ReLU and the addition before it into the sampled layers; default: --fuse",
    )  # fmt: skip
    parser.add_argument("--epochs", type=_positive, help=f"default: {Settings.epochs}, or 2 with --quick")
    parser.add_argument("--images", type=_positive, help="how many to train on; default: all")
    parser.add_argument("--batch", type=_positive, help=f"default: {Settings.batch}, or 64 with --quick")
    parser.add_argument("--seed", type=_integer, default=0)
    parser.add_argument("--threads", type=_positive, help="default: all cores")
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="IDX files, named as MNIST's")
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="for training.md and training.csv")
    parser.add_argument(
        "--speed", action="store_true",
        help="only the time of a step, of random images, and normalization's share of it",
    )  # fmt: skip
    parser.add_argument("--rounds", type=_positive, help="steps of each, with --speed; default: 40")
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_IMAGES:,} images, 2 epochs")
    options = parser.parse_args(arguments)
    if options.speed:
        for name in ("epochs", "images", "data"):
            if getattr(options, name) is not None:
                parser.error(f"--{name} is not for --speed, which trains on random images")
        if not options.fuse or options.sampler != "fs/16":
            parser.error("--sampler, --no-fuse are not for --speed, which times its own, fused")
    elif options.rounds is not None:
        parser.error("--rounds needs --speed")
    options.rounds = options.rounds or (10 if options.quick else 40)
    options.epochs = options.epochs or (2 if options.quick else Settings.epochs)
    options.batch = options.batch or (64 if options.quick or options.speed else Settings.batch)
    return options


def _integer(text: str, least: int = 0) -> int:
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"expected an integer of at least {least}, got {text!r}")
    return int(text)


def _positive(text: str) -> int:
    return _integer(text, 1)


def _tensors(x: np.ndarray, labels: np.ndarray, settings: Settings) -> tuple[torch.Tensor, torch.Tensor]:
    images = torch.from_numpy(x).to(settings.device)
    return images.contiguous(memory_format=settings.layout), torch.from_numpy(labels).to(settings.device)
