"""A layer's results: a row for each phase of ours against each peer, tables of them, and a picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench.cases import MB, Case
from bench.report import figure, grouped, markdown
from bench.timing import geometric_mean

HEADLINE = "FeatureSampling(1/16)"
PHASES = ("forward", "backward", "both")
TITLES = {"PyTorch": "PyTorch eager"}


@dataclass(frozen=True)
class Row:
    """One phase of ours against one peer; times in milliseconds."""

    case: Case
    sampler: str
    call: str  # "python", or "graph": captured in a CUDA graph
    phase: str  # forward, backward, or both: a forward and the backward after it
    peer: str  # copy, NumPy, PyTorch, ...
    ours_median: float
    ours_p20: float
    ours_p80: float
    peer_median: float
    peer_p20: float
    peer_p80: float
    peer_over_ours: float  # median of the rounds' ratios
    rounds: int  # in which both took part
    plan_median: float  # drawing the plan, which forward's time contains; 0 where it does not
    bytes: int  # that ours must move

    @property
    def share(self) -> float:
        """The share of a copy's bandwidth; the peer is the copy."""
        return self.peer_over_ours * self.bytes / (2 * self.case.nbytes)

    def flat(self) -> dict[str, Any]:
        """Return it as a line of a CSV file."""
        case = self.case
        about = {"shape": case.size, "layout": f"channels-{case.layout}", "dtype": case.dtype}
        about |= {"activation": "relu" * case.relu, "residual": "residual" * case.residual}
        return {**about, **{name: value for name, value in asdict(self).items() if name != "case"}}


def headline_table(rows: Sequence[Row]) -> list[str]:
    """Return the README's table: one sampler, a line for each shape and layout, and the means."""
    sampler = _headline(rows)
    chosen = [row for row in rows if row.sampler == sampler]
    found = _peers(chosen)
    wanted = [("forward", "copy"), ("backward", "copy"), *(("both", peer) for peer in found)]
    titles = ["forward / copy", "backward / copy", *(f"{TITLES.get(peer, peer)} / ours" for peer in found)]
    return [f"{sampler}:", "", *_ratio_table(chosen, wanted, titles, [])]


def long_table(rows: Sequence[Row]) -> list[str]:
    """Return a table with every sampler, phase and peer, and their means over the shapes and layouts."""
    wanted = [(phase, peer) for peer in ("copy", *_peers(rows)) for phase in PHASES]
    titles = [f"{phase} / copy" if peer == "copy" else f"{peer} / ours, {phase}" for phase, peer in wanted]
    times = ["forward, ms", "backward, ms", "plan, ms", "copy, ms"]
    out = []
    for sampler, chosen in grouped(rows, lambda row: row.sampler).items():
        out += [f"## {sampler}", "", *_ratio_table(chosen, wanted, titles, times), ""]
    return out[:-1]


def _ratio_table(
    rows: Sequence[Row], wanted: Sequence[tuple[str, str]], titles: list[str], times: list[str]
) -> list[str]:
    """Peer / ours, but ours / copy: a copy is the yardstick, the others are what is to be beaten."""
    lines, columns = [], []
    for case, group in grouped(rows, lambda row: row.case).items():
        found = {(row.phase, row.peer): row for row in group}
        ratios = [found[key].peer_over_ours if key in found else None for key in wanted]
        ratios = [r and (1 / r if peer == "copy" else r) for r, (_, peer) in zip(ratios, wanted, strict=True)]
        columns.append(ratios)
        one, other = (found[phase, "copy"] for phase in PHASES[:2])
        cells = [_spread(one), _spread(other), f"{one.plan_median:.2f}", f"{one.peer_median:.2f}"]
        lines.append([case.size, f"channels-{case.layout}", *cells[: len(times)], *map(_cell, ratios)])
    known = [[ratio for ratio in column if ratio is not None] for column in zip(*columns, strict=True)]
    means = (f"**{_cell(geometric_mean(column) if column else None)}**" for column in known)
    lines.append(["**geometric mean**", "", *[""] * len(times), *means])
    return markdown(["shape", "layout", *times, *titles], lines, text=2)


def gpu_table(rows: Sequence[Row]) -> list[str]:
    """Return a table for each element type and layout; times in microseconds."""
    columns = [("graph", "forward", "copy"), ("graph", "backward", "copy"), ("python", "both", "copy")]
    peers = ["PyTorch", "torch.compile"]
    titles = ["shape", "variant", "MB", "graph, forward, us", "graph, backward, us", "ours, both, us"]
    titles += [*(f"{peer}, both, us" for peer in peers), "copy, us"]
    titles += ["forward, share", "backward, share", "PyTorch / ours"]
    out: list[str] = []
    for (dtype, layout), group in grouped(rows, lambda row: (row.case.dtype, row.case.layout)).items():
        lines = []
        for case, same in grouped(group, lambda row: row.case).items():
            found = {(row.call, row.phase, row.peer): row for row in same}
            ours = [found[column] for column in columns]
            others = [found.get(("python", "both", peer)) for peer in peers]
            cells = [f"{1e3 * row.ours_median:.1f}" for row in ours]
            cells += [f"{1e3 * row.peer_median:.1f}" if row else "" for row in others]
            cells += [f"{1e3 * ours[0].peer_median:.1f}", *(f"{row.share:.0%}" for row in ours[:2])]
            cells += [f"{others[0].peer_over_ours:.2f}" if others[0] else ""]
            lines.append([case.size, case.variant, f"{case.nbytes / MB:.1f}", *cells])
        out += [f"## {dtype}, channels-{layout}", "", *markdown(titles, lines, text=2), ""]
    return out[:-1]


def draw(path: Path, rows: Sequence[Row], caption: str) -> None:
    """Write a PNG of milliseconds: the bars of ours, a copy and the peers for each case; needs matplotlib."""
    both = [row for row in rows if row.phase == "both"]
    headline = _headline(rows)
    panels = grouped(both, lambda row: (row.case.dtype, row.case.layout, row.case.variant))
    widest = max(len({row.case for row in group}) for group in panels.values())
    one = figure(max(8, 1.1 * widest), 1 + 3.2 * len(panels))
    plots = one.subplots(len(panels), squeeze=False)[:, 0]
    for axes, (panel, group) in zip(plots, panels.items(), strict=True):
        cases = list(dict.fromkeys(row.case for row in group))
        times: dict[str, dict[Case, float]] = {}
        for row in group:
            ours = row.sampler + (", graph" if row.call == "graph" else "")
            times.setdefault(ours, {})[row.case] = row.ours_median
            if row.sampler == headline:
                peer = "a copy of the tensor" if row.peer == "copy" else row.peer
                times.setdefault(peer, {})[row.case] = row.peer_median
        width = 0.85 / len(times)
        for k, (name, values) in enumerate(times.items()):
            places = [cases.index(case) + (k - (len(times) - 1) / 2) * width for case in values]
            axes.bar(places, list(values.values()), width, label=name)
        axes.set(yscale="log", ylabel="forward + backward, ms", title="{}, channels-{}, {}".format(*panel))
        axes.set_xticks(range(len(cases)), [case.size for case in cases], rotation=30, ha="right", fontsize=7)
        axes.legend(fontsize=7, ncols=min(4, len(times)))
    one.suptitle(caption, fontsize=6, wrap=True)
    one.savefig(path, dpi=110)


def _headline(rows: Sequence[Row]) -> str:
    return HEADLINE if HEADLINE in {row.sampler for row in rows} else rows[-1].sampler


def _peers(rows: Sequence[Row]) -> list[str]:
    return [peer for peer in dict.fromkeys(row.peer for row in rows) if peer != "copy"]


def _cell(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.2f}" if value < 9.95 else f"{value:.1f}"


def _spread(row: Row) -> str:
    return f"{row.ours_median:.2f} ({row.ours_p20:.2f} to {row.ours_p80:.2f})"
