"""The time of a training step, and the share of it that normalization takes, before and after conversion.

Images and labels are random: nothing is learned, every step costs the same. The share is the profiler's:
the time within batch normalization, the ReLU and the addition behind it, forward and backward, over that of
the steps; it is taken in steps of its own, since a profiler costs time.
"""

from __future__ import annotations

import csv
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

import sbncore as sbn
from bench import memory, timing
from bench.networks import build
from bench.progress import Progress
from bench.report import Machine, markdown
from bench.share import share
from bench.trainee import Settings, Trainee, check, converted

IMAGE, CLASSES = (3, 32, 32), 10
FULL_BN = "nn.BatchNorm2d"
SAMPLERS: dict[str, sbn.Sampler] = {
    "FS 1/16, fused": sbn.FeatureSampling(1 / 16),
    "BS 1/16, fused": sbn.BatchSampling(1 / 16),
    "Full(), fused": sbn.Full(),
}
PROFILED = 8  # steps
READING = """\
A step is forward, loss, backward and update: the median over alternating rounds (20th to 80th percentile).
Gain is the share of PyTorch's step that is saved, the median of the rounds'; the paper reports 23.2 %. The
share is that of normalization, with the ReLU and the addition behind it, in the step. Kept is what autograd
holds for backward; a ReLU's output, which fusion spares, the next convolution keeps."""

Found = dict[str, tuple[np.ndarray, float, int]]  # seconds of the steps, normalization's share, bytes kept


def measure(settings: Settings, rounds: int) -> Found:
    """Check, then return the seconds of every round's step, normalization's share, and the bytes kept."""
    rng = np.random.default_rng(settings.seed)
    images = rng.standard_normal((settings.batch, *IMAGE), dtype=np.float32)
    x, labels = settings.tensors(images, rng.integers(0, CLASSES, settings.batch))
    network = build("resnet", IMAGE[0], CLASSES, settings.seed)
    network = network.to(settings.device, memory_format=settings.layout)
    check(network, x, settings.seed)
    networks: dict[str, Any] = {FULL_BN: network}
    networks |= {name: converted(network, one, settings.seed) for name, one in SAMPLERS.items()}
    trainees = {name: Trainee(one.train(), settings, rounds + 100) for name, one in networks.items()}
    kept = {}
    for name, trainee in trainees.items():
        kept[name] = memory.kept(trainee.network, x)
        for _ in range(3):
            trainee.step(x, labels)
    seconds = {name: np.empty(rounds) for name in trainees}
    progress, names = Progress(rounds), list(trainees)
    for r in range(rounds):
        shift = r % len(names)
        for name in names[shift:] + names[:shift]:
            seconds[name][r] = trainees[name].step(x, labels)[1]
        progress.step("steps")
    return {name: (seconds[name], share(trainees[name], x, labels, PROFILED), kept[name]) for name in names}


def table(found: Found) -> list[str]:
    """Return the Markdown table; the first is what the others are compared with."""
    before, lines = found[FULL_BN][0], []
    for name, (seconds, part, nbytes) in found.items():
        median, p20, p80 = timing.summary(seconds)
        ratio = timing.ratio(before, seconds)
        gain = 1 - timing.ratio(seconds, before)
        cells = [f"{median:.1f} ({p20:.1f} to {p80:.1f})", f"{ratio:.2f}", f"{gain:.1%}", f"{part:.1%}"]
        cells += [f"{nbytes / 1e6:.1f}"]
        lines.append([name, *cells])
    titles = ["normalization", "step, ms", "PyTorch / this", "gain", "share of normalization", "kept, MB"]
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
        sheet.writerow(["normalization", "step_median", "step_p20", "step_p80", "share", "kept", *beside])
        for name, (seconds, part, nbytes) in found.items():
            figures = (*timing.summary(seconds), part, nbytes)
            sheet.writerow([name, *(f"{value:.4g}" for value in figures), *beside.values()])
