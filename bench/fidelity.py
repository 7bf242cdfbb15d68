"""How near each sampler's estimates come on real activations, layer by layer.

A network is trained a little with full batch normalization. Then a batch of images, with samples of white
noise behind it for the virtual ones, goes through it by the running statistics, and `sbncore.fidelity`
judges every sampler on what goes into each normalization layer.
"""

from __future__ import annotations

import argparse
import csv
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

import sbncore as sbn
from bench.data import Data, load
from bench.problems import BadData, folder_option
from bench.progress import Progress
from bench.report import machine, markdown

FAMILIES = "fs", "fs-runs", "fs-grid", "fs-common", "bs", "bs-random", "ns", "vdn"
RATIOS = 4, 8, 16, 32, 64
BATCH, STEPS, DRAWS = 128, 150, 64
RATE = 0.2

READING = """\
Errors are root mean squares over draws and channels, in standard deviations of the whole batch: of the mean,
and of the standard deviation. Independent: how many independent values would have a mean as near; drawn: how
many values there were. Virtual samples are held against the real ones."""

Found = dict[tuple[str, str], sbn.Fidelity]  # (layer, sampler) -> what was found


def activations(name: str, data: Data, virtual: int, seed: int, steps: int) -> dict[str, np.ndarray]:
    """Return what goes into each normalization layer of a network after some training."""
    import torch

    from bench.networks import build
    from bench.trainee import Settings, Trainee

    settings = Settings(batch=BATCH, rate=RATE, seed=seed)
    x, labels = settings.tensors(data.x, data.labels)
    network = build(name, data.x.shape[1], data.classes, seed)
    trainee = Trainee(network.train(), settings, steps)
    progress, rng = Progress(steps), np.random.default_rng(seed)
    for _ in range(steps):
        chosen = rng.permutation(len(x))[:BATCH]
        trainee.step(x[chosen], labels[chosen])
        progress.step("training")
    real = x[rng.permutation(len(x))[:BATCH]]
    noise = torch.from_numpy(sbn.white_noise((virtual, *real.shape[1:]), seed=seed))
    found: dict[str, np.ndarray] = {}

    def keep(layer: str, given: tuple[torch.Tensor, ...]) -> None:
        found[layer] = given[0].numpy()

    for layer, module in network.eval().named_modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.register_forward_pre_hook(lambda _, given, layer=layer: keep(layer, given))
    with torch.no_grad():
        network(torch.cat([real, noise]))
    return found


def judge(layers: Mapping[str, np.ndarray], virtual: int, draws: int) -> Found:
    """Return the fidelity of every sampler on every layer."""
    from bench.normalizations import sampler

    found: Found = {}
    progress = Progress(len(layers) * len(FAMILIES) * len(RATIOS))
    for layer, x in layers.items():
        real = len(x) - virtual
        for family in FAMILIES:
            for ratio in RATIOS:
                name = f"{family}/{ratio}"
                how = sampler(name, real)
                # different virtual samples stand for different draws: there is one set of noise
                rows = np.concatenate([x[:real], x[real : real + how.virtual]]) if how.virtual else x[:real]
                found[layer, name] = sbn.fidelity(rows, how, draws=1 if how.virtual else draws)
                progress.step(f"{layer}, {name}")
    return found


def table(layers: Mapping[str, np.ndarray], found: Found, ratio: int, virtual: int) -> list[str]:
    """Return a ratio's table, a line for each layer and sampler."""
    lines = []
    for layer, x in layers.items():
        for family in FAMILIES:
            one = found[layer, f"{family}/{ratio}"]
            size = "×".join(map(str, (len(x) - virtual, *x.shape[1:])))
            cells = [f"{one.mean_error:.3f}", f"{one.std_error:.3f}", f"{one.count:.0f}"]
            cells += [f"{one.effective:.0f}", f"{one.correlation:.4f}"]
            lines.append([f"{layer}, {size}", f"{family}/{ratio}", *cells])
    titles = ["layer", "sampler", "mean off by", "deviation off by", "drawn", "independent", "correlation"]
    return markdown(titles, lines, text=2)


def draw(path: Path, layers: Sequence[str], found: Found, caption: str) -> None:
    """Write a PNG, a plot for each sampler: errors against the ratio, a line for each layer."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure((4 * len(FAMILIES) / 2, 7), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(caption, fontsize=8)
    for axes, family in zip(figure.subplots(2, len(FAMILIES) // 2, sharey=True).flat, FAMILIES, strict=True):
        for k, layer in enumerate(layers):
            ones = [found[layer, f"{family}/{ratio}"] for ratio in RATIOS]
            color = f"C{k % 10}"
            axes.plot(RATIOS, [one.mean_error for one in ones], color=color, marker=".", label=layer)
            axes.plot(RATIOS, [one.std_error for one in ones], color=color, linestyle=":")
        axes.set(xscale="log", yscale="log", title=family)
        axes.set_xticks(RATIOS, [f"1/{ratio}" for ratio in RATIOS])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    axes.legend(fontsize=6)
    figure.supylabel("error of the mean (solid) and the deviation (dotted), standard deviations", fontsize=8)
    figure.savefig(path, dpi=90)


def main(arguments: list[str]) -> None:
    options = _options(arguments)
    try:
        import torch
    except ImportError:
        sys.exit("fidelity needs PyTorch, which is not installed: pip install torch")
    try:
        data = load(options.data)
    except BadData as bad:
        sys.exit(str(bad))
    where = machine(sbn.get_num_threads())
    torch.set_num_threads(where.threads)
    virtual = max(1, BATCH // RATIOS[0])
    steps, draws = (10, 4) if options.quick else (STEPS, DRAWS)
    layers = activations(options.network, data, virtual, options.seed, steps)
    found = judge(layers, virtual, draws)
    about = f"{data.name}, the network {options.network} after {steps} steps of {BATCH}, {draws} draws"
    command = shlex.join(["python", "-m", "bench", "fidelity", *arguments])
    lines = [f"{where} {about}. `{command}`.", "", READING, "", *table(layers, found, options.ratio, virtual)]
    print("\n".join(lines))
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        stem = options.out / f"fidelity-{options.network}"
        text = "\n".join(["# Estimates on real activations", "", *lines]) + "\n"
        stem.with_suffix(".md").write_text(text, encoding="utf-8")
        draw(stem.with_suffix(".png"), list(layers), found, about)
        with stem.with_suffix(".csv").open("w", newline="", encoding="utf-8") as file:
            sheet = csv.writer(file, lineterminator="\n")
            names = ("mean_error", "std_error", "count", "effective", "correlation")
            sheet.writerow(["layer", "sampler", *names, "cpu", "date"])
            for (layer, name), one in found.items():
                figures = (f"{getattr(one, each):.4g}" for each in names)
                sheet.writerow([layer, name, *figures, where.cpu, where.date])


def _options(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench fidelity", description=__doc__)
    parser.add_argument("--network", choices=("plain", "resnet", "1d"), default="plain")
    parser.add_argument("--ratio", type=int, choices=RATIOS, default=16, help="of the printed table: one in")
    parser.add_argument("--data", metavar="FOLDER", help="as training")
    parser.add_argument("--seed", type=_natural, default=0)
    parser.add_argument("--out", type=folder_option, metavar="FOLDER", help="for table, figures, picture")
    parser.add_argument("--quick", action="store_true", help="few steps and draws")
    return parser.parse_args(arguments)


def _natural(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected an integer of at least 0, got {text!r}")
    return int(text)
