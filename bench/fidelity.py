"""How near each sampler's estimates come on real activations, layer by layer.

A network is trained a little with full batch normalization. Then a batch of images, with samples of white
noise behind it for the virtual ones, goes through it by the running statistics, and `sbncore.fidelity`
judges every sampler on what goes into each normalization layer.

Errors are root mean squares over draws and channels, in standard deviations of the whole batch: of the
mean, and of the standard deviation. Independent: how many independent values would have a mean as near;
drawn: how many values there were. Virtual samples are held against the real ones.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from tqdm import tqdm

import sbncore as sbn
from bench import report
from bench.data import Images, load
from bench.machine import machine, set_threads
from bench.options import BadData, integer, parser

FAMILIES = "fs", "fs-runs", "fs-grid", "fs-common", "bs", "bs-random", "ns", "vdn"
RATIOS = 4, 8, 16, 32, 64
BATCH, STEPS, DRAWS = 128, 150, 64
RATE = 0.2

Found = dict[tuple[str, str], sbn.Fidelity]  # (layer, sampler) -> what was found


def activations(name: str, data: Images, virtual: int, seed: int, steps: int) -> dict[str, np.ndarray]:
    """Return what goes into each normalization layer of a network after some training."""
    import torch

    from bench.networks import build
    from bench.trainee import Settings, Trainee

    set_threads(sbn.get_num_threads())

    settings = Settings(batch=BATCH, rate=RATE, seed=seed)
    x, labels = settings.tensors(data.x, data.labels)
    network = build(name, data.x.shape[1], data.classes, seed)
    trainee = Trainee(network.train(), settings, steps)
    rng = np.random.default_rng(seed)
    for _ in tqdm(range(steps), desc="training"):
        chosen = rng.permutation(len(x))[:BATCH]
        trainee.step(x[chosen], labels[chosen])
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
    names = [f"{family}/{ratio}" for family in FAMILIES for ratio in RATIOS]
    for layer, name in tqdm([(layer, name) for layer in layers for name in names], desc="samplers"):
        x, real = layers[layer], len(layers[layer]) - virtual
        how = sampler(name, real)
        # different virtual samples stand for different draws: there is one set of noise
        found[layer, name] = sbn.fidelity(x[: real + how.virtual], how, draws=1 if how.virtual else draws)
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
    return report.markdown(titles, lines, text=2)


def draw(figure: Any, layers: Sequence[str], found: Found, caption: str) -> None:
    """Draw a plot for each sampler: errors against the ratio, a line for each layer."""
    figure.set_size_inches(2 * len(FAMILIES), 7)
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


def main(arguments: list[str]) -> None:
    one = parser("fidelity", __doc__, "few steps and draws")
    one.add_argument("--network", choices=("plain", "resnet", "1d"), default="plain")
    one.add_argument("--ratio", type=int, choices=RATIOS, default=16, help="of the printed table: one in")
    one.add_argument("--data", metavar="FOLDER", help="as training")
    one.add_argument("--seed", type=partial(integer, least=0), default=0)
    options = one.parse_args(arguments)
    if not report.installed("torch"):
        sys.exit("fidelity needs PyTorch, which is not installed: pip install torch")
    try:
        data = load(options.data)
    except BadData as bad:
        sys.exit(str(bad))
    where, virtual = machine(), max(1, BATCH // RATIOS[0])
    steps, draws = (10, 4) if options.quick else (STEPS, DRAWS)
    layers = activations(options.network, data, virtual, options.seed, steps)
    found = judge(layers, virtual, draws)
    about = f"{data.name}, the network {options.network} after {steps} steps of {BATCH}, {draws} draws"
    lines = [report.about(where, "fidelity", arguments, f"{about}."), "", str(__doc__)]
    names = ("mean_error", "std_error", "count", "effective", "correlation")
    rows = [
        {"layer": layer, "sampler": name, **{each: float(getattr(figures, each)) for each in names}}
        for (layer, name), figures in found.items()
    ]
    report.publish(
        options.out,
        f"fidelity-{options.network}",
        "Estimates on real activations",
        [*lines, *table(layers, found, options.ratio, virtual)],
        where,
        rows,
        lambda figure: draw(figure, list(layers), found, about),
    )
