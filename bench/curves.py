"""What a sweep found: Markdown tables, and a picture of its curves."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from bench.report import grouped, markdown
from bench.suites import REFERENCE_BATCH
from bench.sweep import Run

READING = """\
Accuracy is on all images to test with, by the running statistics: the mean over the seeds ± their standard
deviation. The difference to the reference, full batch normalization of the same seeds, is the mean of the
seeds' differences ± its standard error. The loss is the mean of the last fortieth of the steps. "Steps to"
is the first of eight looks at 2,000 test images that reaches that accuracy, the median over the seeds. Cost
is the share of a step's time that normalization takes, with the ReLU behind it and its backward."""
REFERENCE = "full"
LEVELS = 0.90, 0.97  # of the reference's accuracy
COLUMNS = 4  # of plots


def report(runs: Sequence[Run], about: str) -> list[str]:
    """Return the tables: one for each network, gradient and batch size, and one over batch sizes."""
    lines = [about, "", READING]
    if len({run.spec.batch for run in runs}) > 1:
        for (network, rate), group in grouped(runs, lambda run: (run.spec.network, _rate(run))).items():
            title = f"{network}, rate {rate:g} for {REFERENCE_BATCH} images: accuracy by batch size"
            lines += ["", f"## {title}", "", *_by_batch(group)]
    for setting, group in grouped(runs, _setting).items():
        same = (run for run in runs if _setting(run)[:3] == setting[:3])  # whatever its gradient
        reference = [run for run in same if run.spec.norm == REFERENCE]
        lines += ["", f"## {_title(group[0])}", "", *_table(group, reference)]
    return lines


def _rate(run: Run) -> float:
    """Return the rate for a batch of so many images as a suite's is said for."""
    return float(f"{run.spec.rate * REFERENCE_BATCH / run.spec.batch:.6g}")


def _table(runs: Sequence[Run], reference: Sequence[Run]) -> list[str]:
    best = float(np.mean([run.accuracy for run in reference])) if reference else None
    levels = [round(level * best, 2) for level in LEVELS] if best else []
    titles = ["normalization", "seeds", "accuracy, %", "minus full, points", "loss"]
    titles += [*(f"steps to {level:.0%}" for level in levels), "cost"]
    lines = []
    for norm, group in grouped(runs, lambda run: run.spec.norm).items():
        steps = [_steps_to(group, level) for level in levels]
        loss = f"{np.mean([run.losses[-1] for run in group]):.3f}"
        share = f"{np.median([run.share for run in group]):.0%}"
        found = _spread([100 * run.accuracy for run in group])
        lines.append([norm, str(len(group)), found, _minus(group, reference), loss, *steps, share])
    return markdown(titles, lines)


def _by_batch(runs: Sequence[Run]) -> list[str]:
    lines = []
    batches = sorted({run.spec.batch for run in runs})
    for norm, group in grouped(runs, lambda run: run.spec.norm).items():
        found = ([100 * run.accuracy for run in group if run.spec.batch == batch] for batch in batches)
        lines.append([norm, *(_spread(each) if each else "not run" for each in found)])
    return markdown(["normalization", *(f"batch {batch}" for batch in batches)], lines)


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


def _setting(run: Run) -> tuple[str, int, float, str]:
    return run.spec.network, run.spec.batch, _rate(run), run.spec.gradient


def _title(run: Run) -> str:
    spec = run.spec
    return f"{spec.network}, {spec.gradient} gradient, batches of {spec.batch}, rate {spec.rate:g}"


def draw(figure: Any, runs: Sequence[Run], caption: str) -> None:
    """Draw losses against the steps, a plot for every family of names, and final accuracies."""
    plots = [
        (_title(group[0]), names, grouped(group, lambda run: run.spec.norm))
        for group in grouped(runs, _setting).values()
        for names in (*_families(run.spec.norm for run in group), None)
    ]
    rows = -(-len(plots) // COLUMNS)
    figure.set_size_inches(4 * COLUMNS, 3.3 * rows)
    figure.suptitle(caption, fontsize=9)
    panels = figure.subplots(rows, COLUMNS, squeeze=False).ravel()
    for axes, (title, names, by_norm) in zip(panels[: len(plots)], plots, strict=True):
        axes.set_title(title, fontsize=7)
        axes.tick_params(labelsize=6)
        axes.grid(alpha=0.3)
        if names is None:
            _accuracies(axes, by_norm)
        else:
            _losses(axes, by_norm, names)
    for axes in panels[len(plots) :]:
        axes.set_axis_off()


def _losses(axes: Any, by_norm: Mapping[str, Sequence[Run]], names: Sequence[str]) -> None:
    top = 2.0
    for k, norm in enumerate(dict.fromkeys((REFERENCE, *names))):
        if norm in by_norm:
            same = by_norm[norm]
            losses = np.mean([run.losses for run in same], axis=0)
            top = max(top, losses[0])
            steps = (np.arange(len(losses)) + 0.5) * same[0].steps / len(losses)
            color = "black" if norm == REFERENCE else f"C{k % 10}"
            axes.plot(steps, losses, label=norm, linewidth=0.8, color=color)
    axes.set_yscale("log")
    axes.set_ylim(top=1.2 * top)  # what diverges leaves the picture
    axes.set_ylabel("training loss, by step", fontsize=7)
    axes.legend(fontsize=6)


def _accuracies(axes: Any, by_norm: Mapping[str, Sequence[Run]]) -> None:
    for norm, same in by_norm.items():
        found = [100 * run.accuracy for run in same]
        spread = np.std(found, ddof=1) if len(found) > 1 else 0
        axes.errorbar(np.mean(found), norm, xerr=spread, fmt="o", markersize=2, linewidth=0.8, color="C0")
    axes.invert_yaxis()
    axes.tick_params(axis="y", labelsize=4 if len(by_norm) > 20 else 6)
    axes.set_xlabel("test accuracy, %, mean and deviation over the seeds", fontsize=7)


def _families(names: Iterable[str]) -> list[list[str]]:
    """Return names that differ in their ratio alone together, and the rest."""
    found = grouped(dict.fromkeys(names), lambda name: re.sub(r"/\d+", "", name))
    rest = [name for same in found.values() if len(same) == 1 for name in same]
    return [same for same in found.values() if len(same) > 1] + ([rest] if rest != [REFERENCE] else [])
