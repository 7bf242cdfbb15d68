"""What the GPU benchmark measured: cases, the bytes each must move, tables, and the goals for them."""

from __future__ import annotations

import csv
import datetime
import math
import re
import subprocess
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.timing import geometric_mean

ITEMSIZE = {"float16": 2, "bfloat16": 2, "float32": 4}
SAMPLED = 16  # one value of so many
MB = 1_000_000

READING = """\
Microseconds on the device, by CUDA events, median over alternating rounds; buffers rotate, so that none is
still in the L2 cache. graph: ours in a CUDA graph; ours and PyTorch: called from Python, PyTorch eager with
autograd. Share: of the bandwidth that a copy of the same tensor reached, for the bytes that must move. All
agreed with the float64 reference first."""


@dataclass(frozen=True)
class Case:
    """A layer: the shape (N, C, H, W), the element type, the memory's layout, and what is fused."""

    shape: tuple[int, ...]
    dtype: str
    last: bool
    relu: bool
    residual: bool

    @property
    def C(self) -> int:
        return self.shape[1]

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.elements * ITEMSIZE[self.dtype]

    @property
    def variant(self) -> str:
        return "BN" + "+add" * self.residual + "+ReLU" * self.relu

    @property
    def layout(self) -> str:
        return "channels-last" if self.last else "channels-first"

    def moved(self, phase: str) -> int:
        """Bytes that a phase of the exact gradient must move: tensors, the sample again, a mask's bits."""
        masked = self.relu and self.residual
        tensors, sample, bits = {"forward": (2 + self.residual, 1, 1), "backward": (3 + masked, 3, 1)}.get(
            phase, (5 + self.residual + masked, 4, 2)
        )
        return tensors * self.nbytes + sample * self.nbytes // SAMPLED + masked * bits * self.elements // 8

    def __str__(self) -> str:
        return f"{'×'.join(map(str, self.shape))} {self.dtype} {self.layout} {self.variant}"


@dataclass(frozen=True)
class Row:
    """Microseconds of a contender's phase; contenders: copy, ours, graph (ours, captured), PyTorch's."""

    case: Case
    name: str
    phase: str
    median: float
    p20: float
    p80: float
    moved: int
    share: float  # of the bandwidth that the copy of this case reached


@dataclass(frozen=True)
class Goal:
    """A line to be reached: at least ``wanted``, or at most."""

    what: str
    wanted: float
    found: float | None
    most: bool = False

    def __str__(self) -> str:
        if self.found is None:
            return f"{self.what}: not measured"
        reached = self.found <= self.wanted if self.most else self.found >= self.wanted
        bound = "at most" if self.most else "at least"
        return f"{self.what}: {self.found:.2f}, {bound} {self.wanted:g}: {'reached' if reached else 'missed'}"


def goals(rows: list[Row], host: dict[str, float]) -> list[Goal]:
    """Hold the rows against the goals; means are geometric."""

    def share(phase: str, low: float, high: float = math.inf) -> float | None:
        return _mean(
            row.share for row in rows
            if row.name == "graph" and row.phase == phase and low <= row.case.nbytes / MB < high
        )  # fmt: skip

    def speed(chosen: Callable[[Case], bool], low: float = 33) -> float | None:
        times = {(r.case, r.name): r.median for r in rows if r.phase == "both" and r.case.nbytes >= low * MB}
        cases = [case for case, name in times if name == "PyTorch" and chosen(case)]
        return _mean(times[case, "PyTorch"] / times[case, "ours"] for case in cases)

    bandwidth = max((row.moved / row.median for row in rows if row.name == "copy"), default=math.nan)
    over = [
        row.median - row.moved / bandwidth for row in rows
        if row.name == "graph" and row.phase in ("forward", "backward") and 10 <= row.case.nbytes / MB < 17
    ]  # fmt: skip
    return [
        Goal("forward, 100 MB and more, share of the copy's bandwidth", 0.92, share("forward", 100)),
        Goal("exact backward, 100 MB and more, share of the copy's bandwidth", 0.90, share("backward", 100)),
        Goal("forward at 33 MB, share of the copy's bandwidth", 0.80, share("forward", 30, 37)),
        Goal("exact backward at 33 MB, share of the copy's bandwidth", 0.80, share("backward", 30, 37)),
        Goal("at 13 MB, under a graph, the worst, microseconds over bytes / fastest copy", 3,
             max(over, default=None), True),
        Goal("PyTorch eager / ours, fused ReLU, the paper's figure", 1.98, speed(lambda c: c.relu)),
        Goal("PyTorch eager / ours, BN+ReLU, 100 MB and more", 2.4,
             speed(lambda c: c.relu > c.residual, 100)),
        Goal("PyTorch eager / ours, BN+add+ReLU", 2.0, speed(lambda c: c.residual)),
        Goal("PyTorch eager / ours, BN, channels-last", 1.5, speed(lambda c: c.last and not c.relu)),
        Goal("PyTorch eager / ours, BN, channels-first", 2.5, speed(lambda c: not c.last and not c.relu)),
        Goal("host, microseconds of a forward", 15, host.get("ours forward"), True),
        Goal("host, microseconds of a backward", 15, host.get("ours backward"), True),
    ]  # fmt: skip


def machine(cupy: Any, torch: Any) -> dict[str, str]:
    """Return the GPU's name, driver, versions, commit and date."""
    import sbncore

    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return {
        "gpu": torch.cuda.get_device_properties(0).name,
        "driver": _printed(query).splitlines()[0] if _printed(query) else "unknown",
        "versions": f"sbncore {sbncore.__version__}, CuPy {cupy.__version__}, PyTorch {torch.__version__}, "
        f"CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}",
        "commit": _printed(["git", "describe", "--always", "--dirty", "--exclude=*"]) or "unknown",
        "date": datetime.date.today().isoformat(),
    }


def write(
    folder: Path,
    rows: list[Row],
    host: dict[str, float],
    where: dict[str, str],
    complaints: Sequence[str] = (),
) -> None:
    """Write CSV, Markdown and PNG, and print the goals; complaints say what was wrong or failed."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = folder / ("layer-" + re.sub(r"[^a-z0-9]+", "-", where["gpu"].lower()).strip("-"))
    with stem.with_suffix(".csv").open("w", newline="", encoding="utf-8") as file:
        titles = ["shape", "dtype", "layout", "variant", "contender", "phase"]
        titles += ["median_us", "p20_us", "p80_us"]
        table = csv.writer(file, lineterminator="\n")
        table.writerow([*titles, "bytes", "share_of_copy_bandwidth", *where])
        for r in rows:
            c = r.case
            table.writerow(
                ["×".join(map(str, c.shape)), c.dtype, c.layout, c.variant, r.name, r.phase,
                 *(f"{t:.4g}" for t in (r.median, r.p20, r.p80)), r.moved, f"{r.share:.4g}",
                 *where.values()]
            )  # fmt: skip
    lines = [f"- {goal}" for goal in goals(rows, host)]
    about = "{gpu}, driver {driver}. {versions}. Commit {commit}, {date}.".format(**where)
    costs = ", ".join(f"{name} {cost:.1f}" for name, cost in host.items()) or "not measured"
    text = ["# One BN layer on a GPU", "", about, "", READING, "", *tables(rows), ""]
    if complaints:
        text += ["## Not measured", "", *(f"- {complaint}" for complaint in complaints), ""]
    text += ["## Goals", "", *lines, "", f"Host, microseconds a call: {costs}."]
    stem.with_suffix(".md").write_text("\n".join(text) + "\n", encoding="utf-8")
    print("\n".join(lines))
    written = f"{stem}.csv, .md"
    try:
        plot(rows, stem.with_suffix(".png"), about)
        written += ", .png"
    except ImportError:
        print("matplotlib is not installed: no PNG")
    print(f"written: {written}")


def tables(rows: list[Row]) -> list[str]:
    """Return a Markdown table for each element type and layout."""
    columns = [("graph", "forward"), ("graph", "backward"), ("ours", "both"), ("PyTorch", "both"),
               ("torch.compile", "both"), ("copy", "copy")]  # fmt: skip
    titles = ["shape", "variant", "MB", *(f"{name}, {phase}, us" for name, phase in columns[:-1]), "copy, us",
              "forward, share", "backward, share", "PyTorch / ours"]  # fmt: skip
    found = {(row.case, row.name, row.phase): row for row in rows}
    out: list[str] = []
    for dtype, last in dict.fromkeys((row.case.dtype, row.case.last) for row in rows):
        out += [f"## {dtype}, channels-{'last' if last else 'first'}", "", "| " + " | ".join(titles) + " |"]
        out += ["|---|---|" + "---:|" * (len(titles) - 2)]
        for case in dict.fromkeys(r.case for r in rows if (r.case.dtype, r.case.last) == (dtype, last)):
            cells = [found.get((case, *column)) for column in columns]
            ratio = "" if cells[2] is None or cells[3] is None else f"{cells[3].median / cells[2].median:.2f}"
            shares = ["" if cell is None else f"{cell.share:.0%}" for cell in cells[:2]]
            figures = ["" if cell is None else f"{cell.median:.1f}" for cell in cells]
            about = ["×".join(map(str, case.shape)), case.variant, f"{case.nbytes / MB:.1f}"]
            out.append("| " + " | ".join([*about, *figures, *shares, ratio]) + " |")
        out.append("")
    return out[:-1]


def plot(rows: list[Row], path: Path, about: str) -> None:
    """Draw PyTorch / ours for BN+ReLU, a bar for each shape, type and layout."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    times = {(row.case, row.name): row.median for row in rows if row.phase == "both"}
    groups = list(dict.fromkeys((row.case.dtype, row.case.last) for row in rows))
    figure, axes = pyplot.subplots(len(groups), 1, figsize=(12, 2.2 * len(groups) + 1), squeeze=False)
    for (dtype, last), axis in zip(groups, axes[:, 0], strict=True):
        wanted = (dtype, last, "BN+ReLU")
        cases = [c for c, name in times if name == "ours" and (c.dtype, c.last, c.variant) == wanted]
        heights = [times.get((c, "PyTorch"), 0.0) / times[c, "ours"] for c in cases]
        axis.bar(["×".join(map(str, c.shape)) for c in cases], heights, color="tab:blue")
        axis.axhline(1.98, color="tab:red", linewidth=1)
        axis.set_ylabel(f"{dtype}\nchannels-{'last' if last else 'first'}")
        axis.tick_params(axis="x", rotation=30, labelsize=6)
    figure.suptitle(f"BN+ReLU, forward and backward: PyTorch eager / ours (line: 1.98)\n{about}", fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _mean(values: Iterable[float]) -> float | None:
    found = list(values)
    return geometric_mean(found) if found else None


def _printed(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent)
    except OSError:
        return ""
    return done.stdout.strip()
