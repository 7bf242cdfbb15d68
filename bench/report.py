"""Results as Markdown, CSV and pictures."""

from __future__ import annotations

import csv
import importlib.util
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from tabulate import tabulate

from bench.machine import Machine

Item = TypeVar("Item")
Key = TypeVar("Key")


def installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def markdown(titles: Sequence[str], lines: Iterable[Sequence[Any]], text: int = 1) -> list[str]:
    """Return a Markdown table; the first ``text`` columns are words, the others numbers."""
    sides = ["left"] * text + ["right"] * (len(titles) - text)
    cells = [[str(cell) for cell in line] for line in lines]
    return tabulate(cells, titles, "pipe", disable_numparse=True, colalign=sides).splitlines()


def about(where: Machine, name: str, arguments: Sequence[str], *more: str) -> str:
    """Return where a benchmark ran, what more is said of it, and what was typed."""
    return " ".join([str(where), *more, f"`{shlex.join(['python', '-m', 'bench', name, *arguments])}`."])


def write(out: Path, stem: str, title: str, lines: Sequence[str]) -> None:
    """Write a Markdown document to a folder."""
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{stem}.md").write_text("\n".join([f"# {title}", "", *lines]) + "\n", encoding="utf-8")


def publish(
    out: Path | None, stem: str, title: str, lines: Sequence[str], where: Machine,
    rows: Sequence[Mapping[str, Any]] = (), draw: Callable[[Any], None] | None = None,
) -> None:  # fmt: skip
    """Print a document, and write it to a folder, if there is one, with a CSV file and a picture beside it.

    Args:
        rows: Of the CSV file, which says of each where it was measured.
        draw: Draws on a figure of matplotlib's, if that is installed.
    """
    print("\n".join([f"# {title}", "", *lines]))
    if out is None:
        return
    write(out, stem, title, lines)
    if rows:
        with (out / f"{stem}.csv").open("w", newline="", encoding="utf-8") as file:
            table = csv.DictWriter(file, [*rows[0], *asdict(where)], lineterminator="\n")
            table.writeheader()
            for row in rows:
                cells = {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items()}
                table.writerow(cells | asdict(where))
    if draw is not None and installed("matplotlib"):
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        figure = Figure(layout="constrained")
        FigureCanvasAgg(figure)  # needs no display
        draw(figure)
        figure.savefig(out / f"{stem}.png", dpi=100)


def grouped(items: Iterable[Item], key: Callable[[Item], Key]) -> dict[Key, list[Item]]:
    """Return the items by their key, in the order in which they came."""
    groups: dict[Key, list[Item]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups
