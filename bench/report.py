"""Results as CSV, Markdown tables and pictures."""

from __future__ import annotations

import csv
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from tabulate import tabulate

from bench.machine import Machine

Item = TypeVar("Item")
Key = TypeVar("Key")


def markdown(titles: Sequence[str], lines: Iterable[Sequence[Any]], text: int = 1) -> list[str]:
    """Return a Markdown table; the first ``text`` columns are words, the others numbers."""
    sides = ["left"] * text + ["right"] * (len(titles) - text)
    cells = [[str(cell) for cell in line] for line in lines]
    table = tabulate(cells, titles, "github", disable_numparse=True, colalign=sides if cells else None)
    return table.splitlines()


def command(name: str, arguments: Sequence[str]) -> str:
    """Return what was typed, as Markdown."""
    return f"`{shlex.join(['python', '-m', 'bench', name, *arguments])}`"


def write(folder: Path | None, name: str, title: str, lines: Sequence[str]) -> None:
    """Write a Markdown file to a folder, if there is to be one."""
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.md").write_text("\n".join([f"# {title}", "", *lines]) + "\n", encoding="utf-8")


def write_csv(path: Path, rows: Iterable[Mapping[str, Any]], where: Machine) -> None:
    """Write a row each, with the machine beside it; there is one at least."""
    flat = [{**row, **asdict(where)} for row in rows]
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, flat[0], lineterminator="\n")
        table.writeheader()
        for row in flat:
            table.writerow({k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items()})


def figure(width: float, height: float) -> Any:
    """Return an empty figure that needs no display; needs matplotlib."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    one = Figure((width, height), layout="constrained")
    FigureCanvasAgg(one)
    return one


def grouped(items: Iterable[Item], key: Callable[[Item], Key]) -> dict[Key, list[Item]]:
    """Return the items by their key, in the order in which they came."""
    groups: dict[Key, list[Item]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups
