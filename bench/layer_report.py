"""What a layer's benchmark writes: CSV, tables and a picture, on a GPU with its goals."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from bench import report, tables
from bench.contenders import installed
from bench.goals import gpu_goals
from bench.machine import Machine

READING = """\
Ours / copy: how many times as long as copying the tensor once takes (N bytes read, N written). The least
traffic is 2N for the forward and 3N for the exact backward: 1 and 1.5 copies. Peer / ours: how many times as
fast ours is, forward and backward together where nothing else is said; the peers compute full batch
normalization, NumPy on one thread. Ours draws a new plan in every forward and writes into buffers used
before; malloc keeps freed pages, so the peers' memory is warm too. A ratio is the median over the rounds of
the ratio within a round, a time the median (20th to 80th percentile). All agreed with the float64 reference
first."""
GPU_READING = """\
Microseconds on the device, by CUDA events, median over alternating rounds; buffers rotate, so that none is
still in the L2 cache. graph: ours in a CUDA graph; ours and PyTorch: called from Python, PyTorch eager with
autograd. Share: of the bandwidth that a copy of the same tensor reached, for the bytes that must move. All
agreed with the float64 reference first."""


def write(options: argparse.Namespace, rows: Sequence[tables.Row], where: Machine, about: str) -> None:
    """Write CSV, Markdown and PNG of the CPU's results, and print the short table."""
    (dtype,), out = options.dtypes, options.out
    extras = [dtype] * (dtype != "float32") + [options.activation or ""] + ["residual"] * options.residual
    stem = "-".join(["layer-cpu", *filter(None, extras)])
    what = ", ".join(filter(None, [dtype, options.residual and "residual", options.activation]))
    short = tables.headline_table(rows)
    for name, table in ((stem, short), (f"{stem}-long", tables.long_table(rows))):
        report.write(out, name, f"One BN layer on the CPU ({what})", [about, "", READING, "", *table])
    _write_rest(out / stem, rows, where)
    print("\n".join(short))


def write_gpu(
    out: Path, rows: Sequence[tables.Row], host: dict[str, float], where: Machine, about: str,
    complaints: Sequence[str],
) -> None:  # fmt: skip
    """Write CSV, Markdown and PNG of a GPU's results, and print the goals; complaints say what went wrong."""
    stem = "layer-" + re.sub(r"[^a-z0-9]+", "-", where.gpu.lower()).strip("-")
    goals = [f"- {goal}" for goal in gpu_goals(rows, host)]
    costs = ", ".join(f"{name} {cost:.1f}" for name, cost in host.items()) or "not measured"
    lines = [about, "", GPU_READING, "", *tables.gpu_table(rows), ""]
    if complaints:
        lines += ["## Not measured", "", *(f"- {complaint}" for complaint in complaints), ""]
    lines += ["## Goals", "", *goals, "", f"Host, microseconds a call: {costs}."]
    report.write(out, stem, "One BN layer on a GPU", lines)
    _write_rest(out / stem, rows, where)
    print("\n".join(goals))


def _write_rest(stem: Path, rows: Sequence[tables.Row], where: Machine) -> None:
    report.write_csv(stem.parent / f"{stem.name}.csv", (row.flat() for row in rows), where)
    if installed("matplotlib"):
        tables.draw(stem.parent / f"{stem.name}.png", rows, str(where))
    print(f"written: {stem}.csv, .md and, with matplotlib, .png", file=sys.stderr)
