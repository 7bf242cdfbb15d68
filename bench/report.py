"""Where a benchmark ran, and its results as CSV and as Markdown tables."""

from __future__ import annotations

import csv
import datetime
import importlib.metadata
import os
import platform
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import sbncore
from bench.timing import geometric_mean

HEADLINE = "FeatureSampling(1/16)"
PHASES = ("forward", "backward", "both")
TITLES = {"PyTorch": "PyTorch eager"}


@dataclass(frozen=True)
class Row:
    """One phase of ours against one peer; times in milliseconds."""

    shape: str
    layout: str
    dtype: str
    activation: str
    residual: str
    sampler: str
    phase: str  # forward, backward, or both: the sum of a forward and the backward after it
    peer: str  # copy, NumPy, PyTorch, ...
    ours_median: float
    ours_p20: float
    ours_p80: float
    peer_median: float
    peer_p20: float
    peer_p80: float
    peer_over_ours: float  # median of the rounds' ratios
    rounds: int  # in which both took part
    plan_median: float  # drawing the plan, which forward's time contains


@dataclass(frozen=True)
class Machine:
    """What a time depends on besides the code."""

    cpu: str
    cores: int
    threads: int
    openmp: str  # how its threads wait, OMP_WAIT_POLICY: it decides how PyTorch fares on a busy machine
    load: str  # of the last minute, before the run
    date: str
    versions: str

    def __str__(self) -> str:
        busy = f", load {self.load} before the run" if self.load else ""
        used = f"{self.threads} threads used, OpenMP waits {self.openmp}{busy}"
        return f"{self.cpu}, {self.cores} cores, {used}. {self.versions}. {self.date}."


def machine(threads: int) -> Machine:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    versions = [f"Python {platform.python_version()}", f"sbncore {sbncore.__version__}"]
    for name in ("NumPy", "Numba", "PyTorch"):
        try:
            package = "torch" if name == "PyTorch" else name.lower()
            versions.append(f"{name} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            versions.append(f"{name} not installed")
    load = f"{os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    today = datetime.date.today().isoformat()
    policy = os.environ.get("OMP_WAIT_POLICY", "by default")
    return Machine(_cpu(), cores, threads, policy, load, today, ", ".join(versions))


def write_csv(path: Path, rows: Sequence[Row], where: Machine) -> None:
    """Write a row each, with the machine beside it."""
    names = [field.name for field in (*fields(Row), *fields(Machine))]
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, names, lineterminator="\n")
        table.writeheader()
        for row in rows:
            values = asdict(row) | asdict(where)
            table.writerow({k: f"{v:.4g}" if isinstance(v, float) else v for k, v in values.items()})


def headline_table(rows: Sequence[Row]) -> list[str]:
    """Return the README's table: one sampler, a line for each shape and layout, and the means."""
    samplers = {row.sampler for row in rows}
    sampler = HEADLINE if HEADLINE in samplers else rows[-1].sampler
    chosen = [row for row in rows if row.sampler == sampler]
    found = _peers(chosen)
    wanted = [("forward", "copy"), ("backward", "copy"), *(("both", peer) for peer in found)]
    titles = ["forward / copy", "backward / copy", *(f"{TITLES.get(peer, peer)} / ours" for peer in found)]
    lines, columns = [], []
    for (shape, layout), group in _grouped(chosen, "shape", "layout"):
        cells = _ratios(group, wanted)
        columns.append(cells)
        lines.append([shape, layout, *map(_cell, cells)])
    lines.append(["**geometric mean**", "", *(f"**{_cell(mean)}**" for mean in _means(columns))])
    return [f"{sampler}:", "", *markdown(["shape", "layout", *titles], lines, text=2)]


def long_table(rows: Sequence[Row]) -> list[str]:
    """Return a table with every sampler, phase and peer, and their means over the shapes and layouts."""
    wanted = [(one, peer) for peer in ("copy", *_peers(rows)) for one in PHASES]
    titles = ["shape", "layout", "forward, ms", "backward, ms", "plan, ms", "copy, ms"]
    titles += [f"{one} / copy" if peer == "copy" else f"{peer} / ours, {one}" for one, peer in wanted]
    out = []
    for (sampler,), of_sampler in _grouped(rows, "sampler"):
        lines, columns = [], []
        for (shape, layout), group in _grouped(of_sampler, "shape", "layout"):
            forward, backward = (
                next(row for row in group if row.peer == "copy" and row.phase == one) for one in PHASES[:2]
            )
            cells = _ratios(group, wanted)
            columns.append(cells)
            times = [_spread(forward), _spread(backward), f"{forward.plan_median:.2f}"]
            lines.append([shape, layout, *times, f"{forward.peer_median:.2f}", *map(_cell, cells)])
        lines.append(["**geometric mean**", *[""] * 5, *(f"**{_cell(mean)}**" for mean in _means(columns))])
        out += [f"## {sampler}", "", *markdown(titles, lines, text=2), ""]
    return out[:-1]


def _peers(rows: Iterable[Row]) -> list[str]:
    return [peer for peer in dict.fromkeys(row.peer for row in rows) if peer != "copy"]


def _ratios(group: Iterable[Row], wanted: Sequence[tuple[str, str]]) -> list[float | None]:
    """Peer / ours, but ours / copy: a copy is the yardstick, the others are what is to be beaten."""
    found = {(row.phase, row.peer): row.peer_over_ours for row in group}
    inverted = {key: 1 / value if key[1] == "copy" else value for key, value in found.items()}
    return [inverted.get(key) for key in wanted]


def _means(table: Sequence[Sequence[float | None]]) -> list[float | None]:
    columns = [[cell for cell in column if cell is not None] for column in zip(*table, strict=True)]
    return [geometric_mean(column) if column else None for column in columns]


def _cell(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.2f}" if value < 9.95 else f"{value:.1f}"


def _spread(row: Row) -> str:
    return f"{row.ours_median:.2f} ({row.ours_p20:.2f} to {row.ours_p80:.2f})"


def _grouped(rows: Iterable[Row], *names: str) -> list[tuple[tuple[str, ...], list[Row]]]:
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(getattr(row, name) for name in names), []).append(row)
    return list(groups.items())


def markdown(titles: Sequence[str], lines: Iterable[Sequence[str]], text: int) -> list[str]:
    """Return a Markdown table; the first ``text`` columns are words, the others numbers."""
    rule = ["---"] * text + ["---:"] * (len(titles) - text)
    return ["| " + " | ".join(cells) + " |" for cells in (titles, rule, *lines)]


def _cpu() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
