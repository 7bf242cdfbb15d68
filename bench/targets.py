"""The CPU engine against what it is meant to reach: every goal's figure on every shape, and what bounds it.

Sampled is 1/16 of the data: places of every map (FS) where maps are of 256 positions or more, whole samples
(BS) where they are smaller, since a few positions of a small map are scattered over all cache lines.

Every figure is the median over alternating rounds of the ratio within a round, forward and backward together
where nothing else is said; the geometric mean is over all shapes and both layouts, and the worst is of one.
Outputs are reused; all results agreed with the float64 reference before anything was timed. A copy is
PyTorch's `out.copy_(x)` of the same bytes, on as many threads. Inference over a copy, one pass that reads and
writes what a forward does at least, is what bounds the goal of that.
"""

from __future__ import annotations

import argparse
import sys
import time
from functools import partial

import numpy as np
from threadpoolctl import ThreadpoolController
from tqdm import tqdm

import sbncore as sbn
from bench import report, timing
from bench.cases import Case, Data, WrongResult, verify
from bench.contenders import Inference, Ours, copier
from bench.goals import Goal
from bench.layer import Cpu, measure
from bench.options import integer, parser
from bench.tables import Row

TUNED = [
    (32, 64, 56, 56), (32, 256, 28, 28), (32, 1024, 14, 14), (64, 512, 7, 7), (128, 64, 32, 32),
    (8, 64, 112, 112),
]  # fmt: skip
OTHERS = [(24, 96, 40, 40), (16, 320, 20, 20), (4, 48, 150, 150)]  # nothing was tuned to these
QUICK = [(8, 64, 28, 28), (8, 128, 7, 7)]
SMALL = (16, 64, 7, 7)
ROUNDS, QUICK_ROUNDS = 21, 5
SMALL_MAP = 256
LEAST = {"forward": 2, "backward": 3}  # passes over the tensor's bytes
THREADS, COPYS_THREADS = "one thread / two", "the same of a copy"
GOALS = {  # name: (goal, whether less is better)
    "forward / copy": (0.72, True),
    "backward / copy": (1.2, True),
    "eager / ours, channels-first": (5.0, False),
    "eager / ours, channels-last": (3.0, False),
    "torch.compile / ours": (3.5, False),
    "BN+ReLU, eager / ours": (7.0, False),
    "BN+add+ReLU, eager / ours": (7.0, False),
    "Full(), eager / ours": (3.5, False),
    "bfloat16, eager / ours": (4.0, False),
    "inference, eager / ours": (1.0, False),
    THREADS: (0.0, False),  # what a copy gains
}
PROFILE = """\
GB/s is the least traffic, two passes over the tensor for the forward and three for the backward, over the
time; of the copy its two passes. Where ours is near the copy's, the memory bounds it: the copy itself reads
what it overwrites, which streamed stores spare, so that ours can exceed it. The rest, over that limit, is the
sample read twice, what a repair writes again, the draw and the call. The machine offers no hardware counters
(`perf stat` says: not supported)."""

Ratios = dict[str, float]


def main(arguments: list[str]) -> None:
    one = parser("targets", __doc__, "two small shapes, few rounds")
    one.add_argument("--rounds", type=integer)
    one.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    options = one.parse_args(arguments)
    if not report.installed("torch"):
        sys.exit("targets needs PyTorch, which is not installed")
    on, rounds = Cpu(), options.rounds or (QUICK_ROUNDS if options.quick else ROUNDS)
    found: dict[Case, Ratios] = {}
    limits: list[list[str]] = []
    shapes = QUICK if options.quick else TUNED + OTHERS
    try:
        for case in tqdm([Case(shape, layout) for shape in shapes for layout in ("first", "last")]):
            found[case], rows = measured(case, rounds, options.compile, on)
            limits += map(_limit, rows)
    except WrongResult as wrong:
        sys.exit(f"wrong result, nothing is written: {wrong}")
    titles = ["shape", "layout", "phase", "tensor, MB", "ours, ms", "ours, GB/s", "copy, GB/s"]
    call = f"A call of `sbn.forward` on {SMALL}, NumPy, FS 1/16: {small():.0f} µs (goal: 15)."
    lines = [report.about(on.where, "targets", arguments), "", str(__doc__), *_goals(found), "", call, ""]
    lines += ["## Every shape", "", *_shapes(found), "", "## Where the time goes", "", PROFILE, ""]
    lines += report.markdown(titles, limits, text=3)
    report.publish(options.out, "targets-cpu", "The CPU engine's goals", lines, on.where)


def sampler_for(shape: tuple[int, ...]) -> sbn.Sampler:
    """Return the sampler that suits a shape, of 1/16 of the data."""
    small_map = np.prod(shape[2:]) < SMALL_MAP
    return sbn.BatchSampling(1 / 16) if small_map and shape[0] >= 16 else sbn.FeatureSampling(1 / 16)


def measured(case: Case, rounds: int, compiles: bool, on: Cpu) -> tuple[Ratios, list[Row]]:
    """Check and time all that the goals are about, on one shape and layout.

    Raises:
        WrongResult: before anything of it is timed.
    """
    sampled, full = ("sampled", sampler_for(case.shape)), ("Full()", sbn.Full())
    others = {
        "BN+ReLU": Case(case.shape, case.layout, relu=True),
        "BN+add+ReLU": Case(case.shape, case.layout, relu=True, residual=True),
        "bfloat16": Case(case.shape, case.layout, "bfloat16"),
    }
    rows = list(measure(case, [full, sampled], rounds, ["torch", "compile"][: 1 + compiles], on))
    plain = {(row.sampler, row.phase, row.peer): row for row in rows}
    ratios = {f"{phase} / copy": 1 / plain["sampled", phase, "copy"].peer_over_ours for phase in LEAST}
    ratios[f"eager / ours, channels-{case.layout}"] = plain["sampled", "both", "PyTorch"].peer_over_ours
    if compiles:
        ratios["torch.compile / ours"] = plain["sampled", "both", "torch.compile"].peer_over_ours
    for name, other in others.items():
        both = [row for row in measure(other, [sampled], rounds, ["torch"], on) if row.phase == "both"]
        (ratios[f"{name}, eager / ours"],) = (row.peer_over_ours for row in both if row.peer == "PyTorch")
    ratios["Full(), eager / ours"] = plain["Full()", "both", "PyTorch"].peer_over_ours
    ratios |= _inference(on.data(case), rounds) | _threads(on.data(case), sampled[1], rounds)
    return ratios, [plain["sampled", phase, "copy"] for phase in LEAST]


def _inference(data: Data, rounds: int) -> Ratios:
    ours, eager = Inference(data), Inference(data, eager=True)
    for one in (ours, eager):
        verify(one)
    calls = {"copy": copier(data), "eager": eager.forward, "ours": ours.forward}
    times = timing.alternate({name: {"": call} for name, call in calls.items()}, rounds)
    ratios = {"inference, eager / ours": timing.ratio(times["eager"][""], times["ours"][""])}
    return ratios | {"inference / copy": timing.ratio(times["ours"][""], times["copy"][""])}


def _threads(data: Data, sampler: sbn.Sampler, rounds: int) -> Ratios:
    """Return how many times as long one thread takes, of ours and of PyTorch's copy."""
    threads, pools = sbn.get_num_threads(), ThreadpoolController()
    if threads == 1:
        return {}
    ours = Ours(data, sampler, "ours")
    verify(ours)
    calls: dict[str, timing.Call] = {THREADS: ours.both, COPYS_THREADS: copier(data)}

    def alone(call: timing.Call) -> None:
        sbn.set_num_threads(1)
        try:
            with pools.limit(limits=1, user_api="openmp"):
                call()
        finally:
            sbn.set_num_threads(threads)

    contenders = {name: {"": call} for name, call in calls.items()}
    contenders |= {f"{name}, alone": {"": partial(alone, call)} for name, call in calls.items()}
    times = timing.alternate(contenders, rounds)
    return {name: timing.ratio(times[f"{name}, alone"][""], times[name][""]) for name in calls}


def small(calls: int = 2000) -> float:
    """Return the microseconds of one small forward, its plan drawn outside."""
    rng = np.random.default_rng(0)
    x, weight = rng.standard_normal(SMALL, dtype=np.float32), np.ones(SMALL[1], np.float32)
    out, times = np.empty_like(x), []
    for step in range(calls):
        plan = sbn.FeatureSampling(1 / 16).plan(SMALL, step=step)
        begin = time.perf_counter()
        sbn.forward(x, weight, weight, plan=plan, out=out)
        times.append(time.perf_counter() - begin)
    return 1e6 * float(np.median(times))


def _limit(row: Row) -> list[str]:
    case, passes = row.case, LEAST[row.phase]
    rates = (n * case.nbytes / ms / 1e6 for n, ms in ((passes, row.ours_median), (2, row.peer_median)))
    about = [case.size, f"channels-{case.layout}", row.phase, f"{case.nbytes / 1e6:.1f}"]
    return [*about, f"{row.ours_median:.2f}", *(f"{rate:.1f}" for rate in rates)]


def _goals(found: dict[Case, Ratios]) -> list[str]:
    lines = []
    for name, (wanted, less) in GOALS.items():
        values = [ratios[name] for ratios in found.values() if name in ratios]
        if not values:
            continue
        said = f"{wanted:g}"
        if name == THREADS:
            wanted = timing.geometric_mean([ratios[COPYS_THREADS] for ratios in found.values()])
            said = f"a copy's, {wanted:.2f}"
        mean, worst = timing.geometric_mean(values), (max if less else min)(values)
        reached = "yes" if Goal(name, wanted, mean, less).reached else "no"
        lines.append([name, said, f"{mean:.2f}", f"{worst:.2f}", reached])
    return report.markdown(["figure", "goal", "geometric mean", "worst", "reached"], lines)


def _shapes(found: dict[Case, Ratios]) -> list[str]:
    names = list(dict.fromkeys(name for ratios in found.values() for name in ratios))
    lines = []
    for case, ratios in found.items():
        figures = (f"{ratios[name]:.2f}" if name in ratios else "" for name in names)
        lines.append([case.size, f"channels-{case.layout}", *figures])
    return report.markdown(["shape", "layout", *names], lines, text=2)
