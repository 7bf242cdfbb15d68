"""The CPU engine against what it is meant to reach: every goal's figure on every shape, and what bounds it.

Sampled is 1/16 of the data: places of every map (FS) where maps are of 256 positions or more, whole samples
(BS) where they are smaller, since a few positions of a small map are scattered over all cache lines.
"""

from __future__ import annotations

import argparse
import sys
import time
from typing import Any

import numpy as np
from threadpoolctl import ThreadpoolController
from tqdm import tqdm

import sbncore as sbn
from bench import report, timing
from bench.cases import Case, Data, WrongResult, verify
from bench.contenders import Compiled, Contender, Copy, Inference, Ours, Torch, TorchInference, installed
from bench.goals import Goal
from bench.machine import machine
from bench.options import folder, integer

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
READING = """\
Every figure is the median over alternating rounds of the ratio within a round, forward and backward together
where nothing else is said; the geometric mean is over all shapes and both layouts, and the worst is of one.
Outputs are reused; all results agreed with the float64 reference before anything was timed. A copy is
PyTorch's `out.copy_(x)` of the same bytes, on as many threads. Inference over a copy, one pass that reads and
writes what a forward does at least, is what bounds the goal of that."""
PROFILE = """\
GB/s is the least traffic, two passes over the tensor for the forward and three for the backward, over the
time; of the copy its two passes. Where ours is near the copy's, the memory bounds it: the copy itself reads
what it overwrites, which streamed stores spare, so that ours can exceed it. The rest, over that limit, is the
sample read twice, what a repair writes again, the draw and the call. The machine offers no hardware counters
(`perf stat` says: not supported)."""

Ratios = dict[str, float]
Found = dict[tuple[str, str], Ratios]  # (shape, layout) -> figures


def main(arguments: list[str]) -> None:
    options = _options(arguments)
    if not installed("torch"):
        sys.exit("targets needs PyTorch, which is not installed")
    timing.keep_pages()
    where = machine()
    print(where, file=sys.stderr)
    found: Found = {}
    limits: list[list[str]] = []
    shapes = QUICK if options.quick else TUNED + OTHERS
    try:
        for case in tqdm([Case(shape, layout) for shape in shapes for layout in ("first", "last")]):
            ratios, lines = measure(case, options.rounds, options.compile)
            found[case.size, f"channels-{case.layout}"] = ratios
            limits += lines
    except WrongResult as wrong:
        sys.exit(f"wrong result, nothing is written: {wrong}")
    titles = ["shape", "layout", "phase", "tensor, MB", "ours, ms", "ours, GB/s", "copy, GB/s"]
    small_call = f"A call of `sbn.forward` on {SMALL}, NumPy, FS 1/16: {small():.0f} µs (goal: 15)."
    text = [f"{where} {report.command('targets', arguments)}.", "", READING, "", *_goals(found)]
    text += ["", small_call, "", "## Every shape", "", *_shapes(found), ""]
    text += ["## Where the time goes", "", PROFILE, ""]
    text += report.markdown(titles, limits, text=3)
    print("\n".join(["# The CPU engine's goals", "", *text]))
    report.write(options.out, "targets-cpu", "The CPU engine's goals", text)


def sampler_for(shape: tuple[int, ...]) -> sbn.Sampler:
    """Return the sampler that suits a shape, of 1/16 of the data."""
    small_map = np.prod(shape[2:]) < SMALL_MAP
    return sbn.BatchSampling(1 / 16) if small_map and shape[0] >= 16 else sbn.FeatureSampling(1 / 16)


def measure(case: Case, rounds: int, compiles: bool) -> tuple[Ratios, list[list[str]]]:
    """Check and time all that the goals are about, on one shape and layout.

    Raises:
        WrongResult: before anything is timed.
    """
    shape, layout = case.shape, case.layout
    relu, added = (Data(Case(shape, layout, "float32", True, residual)) for residual in (False, True))
    plain, bf16 = (Data(Case(shape, layout, dtype)) for dtype in ("float32", "bfloat16"))
    sampled = {"BN": plain, "BN+ReLU": relu, "BN+add+ReLU": added, "bfloat16": bf16}
    theirs: dict[str, Contender] = {f"{name}, eager": Torch(data) for name, data in sampled.items()}
    if compiles:
        theirs["torch.compile"] = Compiled(plain)
    ours = {name: Ours(data, sampler_for(shape), name) for name, data in sampled.items()}
    ours["Full()"] = Ours(plain, sbn.Full(), "Full()")
    inference = {"inference, eager": TorchInference(plain), "inference": Inference(plain)}
    for one in (*ours.values(), *theirs.values(), *inference.values()):
        verify(one)
    copy = Copy(plain)
    contenders: dict[str, timing.Phases] = {"copy": {"copy": copy.copy}}
    contenders |= {name: _phases(one) for name, one in theirs.items()}
    if (threads := sbn.get_num_threads()) > 1:
        for name, phases in (("BN", _phases(ours["BN"])), ("copy", contenders["copy"])):
            alone = {phase: _alone(call, threads) for phase, call in phases.items()}
            contenders[f"{name}, one thread"] = alone
    contenders |= {name: {"forward": one.forward} for name, one in inference.items()}
    # last, since a copy after a copy would find its tensors in the cache
    contenders |= {name: _phases(one) for name, one in ours.items()}
    times = timing.alternate(contenders, rounds)
    both = {name: np.sum(list(phases.values()), axis=0) for name, phases in times.items()}

    def over(a: str, b: str) -> float:
        return timing.ratio(both[a], both[b])

    ratios = {f"{phase} / copy": timing.ratio(times["BN"][phase], both["copy"]) for phase in LEAST}
    ratios[f"eager / ours, channels-{layout}"] = over("BN, eager", "BN")
    if compiles:
        ratios["torch.compile / ours"] = over("torch.compile", "BN")
    for name in ("BN+ReLU", "BN+add+ReLU", "bfloat16", "inference"):
        ratios[f"{name}, eager / ours"] = over(f"{name}, eager", name)
    ratios["Full(), eager / ours"] = over("BN, eager", "Full()")
    ratios["inference / copy"] = over("inference", "copy")
    if threads > 1:
        ratios[THREADS] = over("BN, one thread", "BN")
        ratios[COPYS_THREADS] = over("copy, one thread", "copy")
    return ratios, _limits(case, times)


def _phases(one: Contender) -> timing.Phases:
    return {"forward": one.forward, "backward": one.backward}


def _alone(call: timing.Call, threads: int) -> timing.Call:
    """Return the call on one thread of ours and of PyTorch's."""
    pools = ThreadpoolController()

    def run() -> None:
        sbn.set_num_threads(1)
        try:
            with pools.limit(limits=1, user_api="openmp"):
                call()
        finally:
            sbn.set_num_threads(threads)

    return run


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


def _limits(case: Case, times: dict[str, timing.Times]) -> list[list[str]]:
    copied = float(np.nanmedian(times["copy"]["copy"]))
    lines = []
    for phase, passes in LEAST.items():
        took = float(np.nanmedian(times["BN"][phase]))
        rates = (n * case.nbytes / seconds / 1e9 for n, seconds in ((passes, took), (2, copied)))
        about = [case.size, f"channels-{case.layout}", phase, f"{case.nbytes / 1e6:.1f}"]
        lines.append([*about, f"{1e3 * took:.2f}", *(f"{rate:.1f}" for rate in rates)])
    return lines


def _goals(found: Found) -> list[str]:
    lines: list[list[Any]] = []
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


def _shapes(found: Found) -> list[str]:
    names = list(dict.fromkeys(name for ratios in found.values() for name in ratios))
    lines = [
        [*case, *(f"{ratios[name]:.2f}" if name in ratios else "" for name in names)]
        for case, ratios in found.items()
    ]
    return report.markdown(["shape", "layout", *names], lines, text=2)


def _options(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench targets", description=__doc__)
    parser.add_argument("--rounds", type=integer)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--out", type=folder, metavar="FOLDER", help="for targets-cpu.md")
    parser.add_argument("--quick", action="store_true", help="two small shapes, few rounds")
    options = parser.parse_args(arguments)
    options.rounds = options.rounds or (QUICK_ROUNDS if options.quick else ROUNDS)
    return options
