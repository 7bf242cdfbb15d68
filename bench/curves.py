"""What a sweep found: Markdown tables, and a picture of its curves."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np

from bench.report import markdown
from bench.sweep import Run

READING = """\
Accuracy is on all images to test with, by the running statistics: the mean over the seeds ± their standard
deviation. The difference to the reference, full batch normalization of the same seeds, is the mean of the
seeds' differences ± its standard error. The loss is the mean of the last fortieth of the steps. "Steps to"
is the first of eight looks at 2,000 test images that reaches that accuracy, the median over the seeds. Cost
is the share of a step's time that normalization takes, with the ReLU behind it and its backward."""
REFERENCE = "full"
LEVELS = 0.90, 0.97  # of the reference's accuracy

Group = tuple[str, str, int]  # network, gradient, batch


def report(runs: Sequence[Run], about: str) -> list[str]:
    """Return the tables: one for each network, gradient and batch size, and one over batch sizes."""
    lines = [about, "", READING]
    groups = _grouped(runs, lambda run: (run.spec.network, run.spec.gradient, run.spec.batch))
    batches = sorted({batch for _, _, batch in groups})
    if len(batches) > 1:
        for network in dict.fromkeys(network for network, _, _ in groups):
            lines += ["", f"## {network}: accuracy by batch size", "", *_by_batch(runs, network, batches)]
    for (network, gradient, batch), group in groups.items():
        reference = [
            run for run in runs
            if (run.spec.norm, run.spec.network, run.spec.batch) == (REFERENCE, network, batch)
        ]  # fmt: skip
        title = f"{network}, {gradient} gradient, batches of {batch}, rate {group[0].spec.rate:g}"
        lines += ["", f"## {title}", "", *_table(group, reference)]
    return lines


def _table(runs: Sequence[Run], reference: Sequence[Run]) -> list[str]:
    best = float(np.mean([run.accuracy for run in reference])) if reference else None
    levels = [round(level * best, 2) for level in LEVELS] if best else []
    titles = ["normalization", "seeds", "accuracy, %", "minus full, points", "loss"]
    titles += [*(f"steps to {level:.0%}" for level in levels), "cost"]
    lines = []
    for norm, group in _grouped(runs, lambda run: run.spec.norm).items():
        steps = [_steps_to(group, level) for level in levels]
        loss = f"{np.mean([run.losses[-1] for run in group]):.3f}"
        share = f"{np.median([run.share for run in group]):.0%}"
        found = _spread([100 * run.accuracy for run in group])
        lines.append([norm, str(len(group)), found, _minus(group, reference), loss, *steps, share])
    return markdown(titles, lines, text=1)


def _by_batch(runs: Sequence[Run], network: str, batches: Sequence[int]) -> list[str]:
    lines = []
    chosen = [run for run in runs if run.spec.network == network]
    for norm, group in _grouped(chosen, lambda run: run.spec.norm).items():
        cells = []
        for batch in batches:
            found = [100 * run.accuracy for run in group if run.spec.batch == batch]
            cells.append(_spread(found) if found else "not run")
        lines.append([norm, *cells])
    return markdown(["normalization", *(f"batch {batch}" for batch in batches)], lines, text=1)


def _spread(values: Sequence[float]) -> str:
    return f"{np.mean(values):.2f} ± {np.std(values, ddof=1):.2f}" if len(values) > 1 else f"{values[0]:.2f}"


def _minus(group: Sequence[Run], reference: Sequence[Run]) -> str:
    full = {run.spec.seed: run.accuracy for run in reference}
    off = [100 * (run.accuracy - full[run.spec.seed]) for run in group if run.spec.seed in full]
    if not off:
        return "no reference"
    error = f" ± {np.std(off, ddof=1) / np.sqrt(len(off)):.2f}" if len(off) > 1 else ""
    return f"{np.mean(off):+.2f}{error}"


def _steps_to(group: Sequence[Run], level: float) -> str:
    first = [next((step for step, seen in run.accuracies if seen >= level), np.inf) for run in group]
    median = float(np.median(first))
    return f"{median:.0f}" if np.isfinite(median) else "never"


def _grouped(runs: Iterable[Run], key: Callable) -> dict:
    groups: dict = {}
    for run in runs:
        groups.setdefault(key(run), []).append(run)
    return groups


def draw(path: Path, runs: Sequence[Run], caption: str) -> None:
    """Write a PNG: the loss of every normalization against the steps, and where its accuracy ends."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    groups = _grouped(runs, lambda run: (run.spec.network, run.spec.gradient, run.spec.batch))
    figure = Figure((14, 5 * len(groups)), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(caption, fontsize=9)
    pairs = figure.subplots(len(groups), 2, squeeze=False)
    for (left, right), ((network, gradient, batch), group) in zip(pairs, groups.items(), strict=True):
        norms = _grouped(group, lambda run: run.spec.norm)
        colors = _colors(norms)
        for norm, same in norms.items():
            losses = np.mean([run.losses for run in same], axis=0)
            steps = (np.arange(len(losses)) + 0.5) * same[0].steps / len(losses)
            left.plot(steps, losses, label=norm, linewidth=0.8, color=colors[norm])
            found = [100 * run.accuracy for run in same]
            spread = np.std(found, ddof=1) if len(found) > 1 else 0
            right.errorbar(np.mean(found), norm, xerr=spread, fmt="o", markersize=3, color=colors[norm])
        left.set(xlabel="steps", ylabel="training loss", yscale="log")
        left.set_title(f"{network}, {gradient} gradient, batches of {batch}", fontsize=9)
        left.legend(fontsize=6, ncols=2)
        right.invert_yaxis()
        right.tick_params(axis="y", labelsize=6)
        right.set_xlabel("test accuracy, %, mean and standard deviation over the seeds")
        right.grid(alpha=0.3)
    figure.savefig(path, dpi=90)


def _colors(names: Iterable[str]) -> dict[str, tuple[float, float, float, float]]:
    """Return colours, of a family of names shades of one."""
    from matplotlib import colormaps

    families = list(dict.fromkeys(name.split("/")[0] for name in names))
    within: dict[str, list[str]] = _grouped(names, lambda name: name.split("/")[0])  # type: ignore[arg-type]
    return {
        name: (*(0.25 + 0.75 * (1 - k / (len(members) + 1)) * c for c in colormaps["tab10"](f % 10)[:3]), 1.0)
        for f, family in enumerate(families) for members in [within[family]] for k, name in enumerate(members)
    }  # fmt: skip
