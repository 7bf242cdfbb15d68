"""A layer's results as a picture: for each shape and layout the bars of ours, a copy and the peers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from bench.report import HEADLINE, Row


def draw(path: Path, rows: Sequence[Row], caption: str) -> None:
    """Write a PNG of milliseconds, forward and backward together; needs matplotlib."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    samplers = list(dict.fromkeys(row.sampler for row in rows))
    headline = HEADLINE if HEADLINE in samplers else samplers[-1]
    both = [row for row in rows if row.phase == "both"]
    peers = list(dict.fromkeys(row.peer for row in both))
    cases = list(dict.fromkeys((row.shape, row.layout) for row in both))
    times = {name: [_ours(both, case, name) for case in cases] for name in samplers}
    times |= {peer: [_peer(both, case, peer, headline) for case in cases] for peer in peers}
    figure = Figure((max(8, 1.1 * len(cases)), 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    width = 0.85 / len(times)
    for k, (name, values) in enumerate(times.items()):
        places = [i + (k - (len(times) - 1) / 2) * width for i in range(len(cases))]
        axes.bar(places, values, width, label="a copy of the tensor" if name == "copy" else name)
    axes.set_yscale("log")
    axes.set_ylabel("forward + backward, ms")
    labels = [f"{shape}\n{layout}" for shape, layout in cases]
    axes.set_xticks(range(len(cases)), labels, rotation=45, ha="right", fontsize=7)
    axes.legend(fontsize=8, ncols=min(4, len(times)))
    axes.set_title(caption, fontsize=6, wrap=True)
    figure.savefig(path, dpi=110)


def _ours(rows: Sequence[Row], case: tuple[str, str], sampler: str) -> float:
    return next(r.ours_median for r in rows if (r.shape, r.layout) == case and r.sampler == sampler)


def _peer(rows: Sequence[Row], case: tuple[str, str], peer: str, sampler: str) -> float:
    found = (r for r in rows if (r.shape, r.layout) == case and r.peer == peer and r.sampler == sampler)
    return next(found).peer_median
