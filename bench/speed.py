"""The time of a training step, and the share of it that normalization takes, before and after conversion.

Images and labels are random: nothing is learned, every step costs the same. The share is the profiler's:
the time within batch normalization, the ReLU and the addition behind it, forward and backward, over that of
the steps; it is taken in steps of its own, since a profiler costs time.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

import sbncore as sbn
from bench import timing
from bench.progress import Progress
from bench.report import Machine, markdown
from bench.training import FULL_BN, Settings, Trainee, check, converted

IMAGE, CLASSES = (3, 32, 32), 10
SAMPLERS: dict[str, sbn.Sampler] = {
    "FS 1/16, fused": sbn.FeatureSampling(1 / 16),
    "BS 1/16, fused": sbn.BatchSampling(1 / 16),
    "Full(), fused": sbn.Full(),
}
PROFILED = 8  # steps
NORMALIZATION = {
    "aten::batch_norm", "aten::relu_", "aten::add_", "NativeBatchNormBackward0", "ReluBackward0", "BatchNorm",
    "BatchNormBackward",
}  # fmt: skip
READING = """\
A step is forward, loss, backward and update: the median over alternating rounds (20th to 80th percentile).
Gain is the share of PyTorch's step that is saved, the median of the rounds'; the paper reports 23.2 %. The
share is that of normalization, with the ReLU and the addition behind it, in the step."""


def measure(settings: Settings, rounds: int) -> dict[str, tuple[np.ndarray, float]]:
    """Check the networks, then return the seconds of every round's step and normalization's share."""
    from bench.resnet import resnet

    rng = np.random.default_rng(settings.seed)
    images = rng.standard_normal((settings.batch, *IMAGE), dtype=np.float32)
    x = torch.from_numpy(images).to(settings.device).contiguous(memory_format=settings.layout)
    labels = torch.from_numpy(rng.integers(0, CLASSES, settings.batch)).to(settings.device)
    network = resnet(CLASSES, seed=settings.seed, channels=IMAGE[0])
    network = network.to(settings.device, memory_format=settings.layout)
    check(network, x, settings, fuse=True)
    networks: dict[str, Any] = {FULL_BN: network}
    networks |= {name: converted(network, one, settings.seed, True) for name, one in SAMPLERS.items()}
    trainees = {name: Trainee(one.train(), settings, rounds + 100) for name, one in networks.items()}
    for trainee in trainees.values():
        for _ in range(3):
            trainee.step(x, labels)
    seconds = {name: np.empty(rounds) for name in trainees}
    progress, names = Progress(rounds), list(trainees)
    for r in range(rounds):
        shift = r % len(names)
        for name in names[shift:] + names[:shift]:
            seconds[name][r] = trainees[name].step(x, labels)[1]
        progress.step("steps")
    return {name: (seconds[name], share(trainees[name], x, labels)) for name in names}


def share(trainee: Trainee, x: torch.Tensor, labels: torch.Tensor) -> float:
    """Return the part of a step that is spent in normalization."""
    with torch.profiler.profile() as profile:
        spent = sum(trainee.step(x, labels)[1] for _ in range(PROFILED))
    events = [event for event in profile.key_averages() if event.key in NORMALIZATION]
    device = trainee.finish is torch.cuda.synchronize if torch.cuda.is_available() else False
    times = (event.device_time_total if device else event.cpu_time_total for event in events)
    return sum(times) / 1e6 / spent


def table(found: Mapping[str, tuple[np.ndarray, float]]) -> list[str]:
    """Return the Markdown table; the first is what the others are compared with."""
    before, lines = found[FULL_BN][0], []
    for name, (seconds, part) in found.items():
        median, p20, p80 = timing.summary(seconds)
        ratio = timing.ratio(before, seconds)
        gain = 1 - timing.ratio(seconds, before)
        cells = [f"{median:.1f} ({p20:.1f} to {p80:.1f})", f"{ratio:.2f}", f"{gain:.1%}", f"{part:.1%}"]
        lines.append([name, *cells])
    titles = ["normalization", "step, ms", "PyTorch / this", "gain", "share of normalization"]
    return markdown(titles, lines, text=1)


def run(settings: Settings, rounds: int, where: Machine, command: str, out: Path | None) -> None:
    """Measure, print, and write training-speed.md and .csv to a folder."""
    found = measure(settings, rounds)
    size = "×".join(map(str, IMAGE))
    about = f"A small ResNet, batches of {settings.batch} of {size}, {settings.device}"
    about += ", channels-last." if settings.channels_last else "."
    lines = [f"{where} {about} `{command}`.", "", READING, "", *table(found)]
    print("\n".join(lines))
    if out is None:
        return
    out.mkdir(parents=True, exist_ok=True)
    text = "\n".join(["# The time of a training step", "", *lines]) + "\n"
    (out / "training-speed.md").write_text(text, encoding="utf-8")
    with (out / "training-speed.csv").open("w", newline="", encoding="utf-8") as file:
        sheet = csv.writer(file, lineterminator="\n")
        beside = asdict(where)
        sheet.writerow(["normalization", "step_median", "step_p20", "step_p80", "share", *beside])
        for name, (seconds, part) in found.items():
            figures = (*timing.summary(seconds), part)
            sheet.writerow([name, *(f"{value:.4g}" for value in figures), *beside.values()])
