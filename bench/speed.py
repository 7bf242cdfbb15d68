"""The time of a training step, and the share of it that normalization takes, before and after conversion.

Images and labels are random: nothing is learned, every step costs the same. A step is forward, loss,
backward and update: the median over alternating rounds (20th to 80th percentile). Gain is the share of
PyTorch's step that is saved, the median of the rounds'; the paper reports 23.2 %. The share is the
profiler's, in steps of its own: that of normalization, with the ReLU and the addition behind it, in the
step. Kept is what autograd holds for backward; a ReLU's output, which fusion spares, the next convolution
keeps. On a GPU a step is also replayed from a CUDA graph: there the host is no part of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import sbncore as sbn
from bench import memory, report, timing
from bench.machine import Machine
from bench.networks import NETWORKS, build
from bench.trainee import Settings, Trainee, check, converted, share

IMAGE, CLASSES = (3, 32, 32), 10
IMAGENETS = (3, 224, 224), 1000
FULL_BN = "nn.BatchNorm2d"
SAMPLERS: dict[str, sbn.Sampler] = {
    "FS 1/16, fused": sbn.FeatureSampling(1 / 16),
    "BS 1/16, fused": sbn.BatchSampling(1 / 16),
    "Full(), fused": sbn.Full(),
}
PROFILED = 8  # steps


class Cost(NamedTuple):
    """What training with one normalization costs."""

    seconds: np.ndarray  # of each round's step
    share: float  # of a step, that normalization takes
    kept: int  # bytes that autograd holds for backward
    graph: np.ndarray | None = None  # seconds of each round's step from a CUDA graph


def measure(settings: Settings, rounds: int, name: str = "resnet") -> dict[str, Cost]:
    """Check, then return the cost of each normalization in a network of ours or of torchvision's."""
    rng = np.random.default_rng(settings.seed)
    size, classes = (IMAGE, CLASSES) if name in NETWORKS else IMAGENETS
    images = rng.standard_normal((settings.batch, *size), dtype=np.float32)
    x, labels = settings.tensors(images, rng.integers(0, classes, settings.batch))
    network = build(name, size[0], classes, settings.seed)
    network = network.to(settings.device, memory_format=settings.layout)
    check(network, x, settings.seed)
    networks: dict[str, Any] = {FULL_BN: network}
    networks |= {name: converted(network, one, settings.seed) for name, one in SAMPLERS.items()}
    trainees = {name: Trainee(one.train(), settings, rounds + 100) for name, one in networks.items()}
    steps: dict[str, Any] = {
        name: {"step": partial(trainee.step, x, labels)} for name, trainee in trainees.items()
    }
    kept = {name: memory.kept(trainee.network, x) for name, trainee in trainees.items()}
    if settings.device == "cuda":
        for name, trainee in trainees.items():
            steps[name]["graph"] = trainee.captured(x, labels)
    times = timing.alternate(steps, rounds)
    return {
        name: Cost(
            times[name]["step"], share(trainee, x, labels, PROFILED), kept[name], times[name].get("graph")
        )
        for name, trainee in trainees.items()
    }


def table(found: dict[str, Cost]) -> list[str]:
    """Return the Markdown table; the first is what the others are compared with."""
    full, lines = found[FULL_BN], []
    for name, cost in found.items():
        gain = 1 - timing.ratio(cost.seconds, full.seconds)
        cells = [*_step(cost.seconds, full.seconds), f"{gain:.1%}", f"{cost.share:.1%}"]
        cells.append(f"{cost.kept / 1e6:.1f}")
        if cost.graph is not None and full.graph is not None:
            cells += _step(cost.graph, full.graph)
        lines.append([name, *cells])
    titles = ["normalization", "step, ms", "PyTorch / this", "gain", "share of normalization", "kept, MB"]
    if full.graph is not None:
        titles += ["graph, ms", "PyTorch / this"]
    return report.markdown(titles, lines)


def _step(seconds: np.ndarray, before: np.ndarray) -> list[str]:
    median, p20, p80 = timing.summary(seconds)
    return [f"{median:.1f} ({p20:.1f} to {p80:.1f})", f"{timing.ratio(before, seconds):.2f}"]


def run(
    settings: Settings, rounds: int, network: str, where: Machine, arguments: Sequence[str], out: Path | None
) -> None:
    """Measure, print, and write training-speed.md and .csv to a folder."""
    found = measure(settings, rounds, network)
    size = "×".join(map(str, IMAGE if network in NETWORKS else IMAGENETS[0]))
    about = f"{network}, batches of {settings.batch} of {size}, {settings.device}"
    about += ", channels-last" if settings.channels_last else ""
    about += f", {settings.autocast} by autocast." if settings.autocast else "."
    lines = [report.about(where, "training", arguments, about), "", str(__doc__), *table(found)]
    names = ("step_median", "step_p20", "step_p80")
    rows = [
        {
            "normalization": name,
            **dict(zip(names, timing.summary(cost.seconds), strict=True)),
            "share": cost.share,
            "kept": float(cost.kept),
        }
        for name, cost in found.items()
    ]
    for row, cost in zip(rows, found.values(), strict=True):
        if cost.graph is not None:
            row |= zip((f"graph_{name}" for name in names), timing.summary(cost.graph), strict=True)
    name = "training-speed" if settings.device == "cpu" else f"training-speed-{network}-{settings.device}"
    report.publish(out, name, "The time of a training step", lines, where, rows)
