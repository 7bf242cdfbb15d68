"""A layer's results: a row for each phase of ours against each peer, tables of them, and a picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from bench.cases import Case
from bench.report import grouped, markdown
from bench.timing import geometric_mean

HEADLINE = "FeatureSampling(1/16)"
GRAPH = ", graph"  # behind a contender's name: captured in a CUDA graph
PHASES = ("forward", "backward", "both")
TITLES = {"PyTorch": "PyTorch eager"}


@dataclass(frozen=True)
class Row:
    """One phase of ours against one peer; times in milliseconds."""

    case: Case
    sampler: str
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


def table(rows: Sequence[Row], long: bool = False) -> list[str]:
    """Return a table for each sampler, element type and variant, with the means over shapes and layouts.

    The short ones, the README's, are of the headline's sampler, and leave out times and phases.
    """
    chosen = rows if long else [row for row in rows if row.sampler.removesuffix(GRAPH) == _headline(rows)]
    out: list[str] = []
    for (sampler, dtype, variant), group in grouped(chosen, _section).items():
        peers = [peer for peer in dict.fromkeys(row.peer for row in group) if peer != "copy"]
        wanted = [(phase, "copy") for phase in PHASES[: 3 if long else 2]]
        wanted += [(phase, peer) for peer in peers for phase in PHASES[0 if long else 2 :]]
        titles = [
            f"{phase} / copy" if peer == "copy" else f"{TITLES.get(peer, peer)} / ours" + f", {phase}" * long
            for phase, peer in wanted
        ]
        times = ["forward, ms", "backward, ms", "plan, ms", "copy, ms", "share, forward", "share, backward"]
        times = times if long else []
        lines, columns = [], []
        for case, same in grouped(group, lambda row: row.case).items():
            found = {(row.phase, row.peer): row for row in same}
            ratios = [_ratio(found.get(key)) for key in wanted]
            columns.append(ratios)
            both = [found[phase, "copy"] for phase in PHASES[:2]]
            cells = [_spread(row) for row in both]
            cells += [f"{both[0].plan_median:.3g}", f"{both[0].peer_median:.3g}"]
            cells += [f"{row.share:.0%}" for row in both]
            lines.append([case.size, f"channels-{case.layout}", *cells[: len(times)], *map(_cell, ratios)])
        known = [[ratio for ratio in column if ratio] for column in zip(*columns, strict=True)]
        means = (f"**{_cell(geometric_mean(column) if column else None)}**" for column in known)
        lines.append(["**geometric mean**", "", *[""] * len(times), *means])
        out += [f"## {sampler}, {dtype}, {variant}", ""]
        out += [*markdown(["shape", "layout", *times, *titles], lines, text=2), ""]
    return out[:-1]


def draw(figure: Any, rows: Sequence[Row]) -> None:
    """Draw milliseconds: for each element type, layout and variant the bars of ours, a copy and the peers."""
    both = [row for row in rows if row.phase == "both"]
    panels = grouped(both, lambda row: (row.case.dtype, row.case.layout, row.case.variant))
    widest = max(len({row.case for row in group}) for group in panels.values())
    figure.set_size_inches(max(8, 1.1 * widest), 1 + 3.2 * len(panels))
    plots = figure.subplots(len(panels), squeeze=False)[:, 0]
    for axes, (panel, group) in zip(plots, panels.items(), strict=True):
        cases = list(dict.fromkeys(row.case for row in group))
        times: dict[str, dict[Case, float]] = {}
        for row in group:
            times.setdefault(row.sampler, {})[row.case] = row.ours_median
            if row.sampler == _headline(rows):
                times.setdefault(row.peer, {})[row.case] = row.peer_median
        width = 0.85 / len(times)
        for k, (name, values) in enumerate(times.items()):
            places = [cases.index(case) + (k - (len(times) - 1) / 2) * width for case in values]
            axes.bar(places, list(values.values()), width, label=name)
        axes.set(yscale="log", ylabel="forward + backward, ms", title="{}, channels-{}, {}".format(*panel))
        axes.set_xticks(range(len(cases)), [case.size for case in cases], rotation=30, ha="right", fontsize=7)
        axes.legend(fontsize=7, ncols=min(4, len(times)))


def _section(row: Row) -> tuple[str, str, str]:
    return row.sampler, row.case.dtype, row.case.variant


def _headline(rows: Sequence[Row]) -> str:
    return HEADLINE if HEADLINE in {row.sampler for row in rows} else rows[-1].sampler


def _ratio(row: Row | None) -> float | None:
    """Peer / ours, but ours / copy: a copy is the yardstick, the others are what is to be beaten."""
    if row is None:
        return None
    return 1 / row.peer_over_ours if row.peer == "copy" else row.peer_over_ours


def _cell(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.2f}" if value < 9.95 else f"{value:.1f}"


def _spread(row: Row) -> str:
    return f"{row.ours_median:.3g} ({row.ours_p20:.3g} to {row.ours_p80:.3g})"
