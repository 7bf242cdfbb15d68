"""Goals, and how measured figures are held against them; those of the GPU."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from bench.cases import MB, Case
from bench.tables import GRAPH, Row
from bench.timing import geometric_mean


@dataclass(frozen=True)
class Goal:
    """A figure to be reached: at least ``wanted``, or at most."""

    what: str
    wanted: float
    found: float | None
    most: bool = False

    @property
    def reached(self) -> bool:
        assert self.found is not None
        return self.found <= self.wanted if self.most else self.found >= self.wanted

    def __str__(self) -> str:
        if self.found is None:
            return f"{self.what}: not measured"
        bound = f"{'at most' if self.most else 'at least'} {self.wanted:g}"
        return f"{self.what}: {self.found:.2f}, {bound}: {'reached' if self.reached else 'missed'}"


def gpu_goals(rows: Sequence[Row], host: Mapping[str, float]) -> list[Goal]:
    """Hold the rows against the goals; means are geometric."""
    copies = [row for row in rows if row.peer == "copy"]
    graphs = [row for row in copies if row.sampler.endswith(GRAPH)]
    eager = [
        row
        for row in rows
        if (row.phase, row.peer) == ("both", "PyTorch")
        and row.sampler not in {graph.sampler for graph in graphs}
    ]

    def share(phase: str, low: float, high: float = math.inf) -> float | None:
        return _mean(r.share for r in graphs if r.phase == phase and low <= r.case.nbytes / MB < high)

    def speed(chosen: Callable[[Case], bool], low: float = 33) -> float | None:
        return _mean(r.peer_over_ours for r in eager if r.case.nbytes >= low * MB and chosen(r.case))

    fastest = max((2 * row.case.nbytes / row.peer_median for row in copies), default=math.nan)
    over = [
        1e3 * (row.ours_median - row.bytes / fastest)
        for row in graphs
        if row.phase != "both" and 10 <= row.case.nbytes / MB < 17
    ]
    wanted: list[tuple[str, float, float | None]] = [
        ("forward, 100 MB and more, share of the copy's bandwidth", 0.92, share("forward", 100)),
        ("exact backward, 100 MB and more, share of the copy's bandwidth", 0.90, share("backward", 100)),
        ("forward at 33 MB, share of the copy's bandwidth", 0.80, share("forward", 30, 37)),
        ("exact backward at 33 MB, share of the copy's bandwidth", 0.80, share("backward", 30, 37)),
        ("PyTorch eager / ours, fused ReLU, the paper's figure", 1.98, speed(lambda c: c.relu)),
        ("PyTorch eager / ours, BN+ReLU, 100 MB and more", 2.4, speed(lambda c: c.relu > c.residual, 100)),
        ("PyTorch eager / ours, BN+add+ReLU", 2.0, speed(lambda c: c.residual)),
        ("PyTorch eager / ours, BN, channels-last", 1.5, speed(lambda c: c.layout == "last" and not c.relu)),
        (
            "PyTorch eager / ours, BN, channels-first",
            2.5,
            speed(lambda c: c.layout == "first" and not c.relu),
        ),
    ]
    worst = max(over, default=None)
    bounded = [
        ("at 13 MB, under a graph, the worst, microseconds over bytes / fastest copy", 3, worst),
        ("host, microseconds of a forward", 15, host.get("ours forward")),
        ("host, microseconds of a backward", 15, host.get("ours backward")),
    ]
    return [Goal(*each) for each in wanted] + [Goal(*each, most=True) for each in bounded]


def _mean(values: Iterable[float]) -> float | None:
    found = list(values)
    return geometric_mean(found) if found else None
