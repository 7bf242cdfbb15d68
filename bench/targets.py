"""The CPU engine against what it is meant to reach: every goal's figure on every shape, and what bounds it.

Sampled is 1/16 of the data: places of every map (FS) where maps are of 256 positions or more, whole samples
(BS) where they are smaller, since a few positions of a small map are scattered over all cache lines.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

import sbncore as sbn
from bench import peers, report, timing
from bench.cases import EPS, TOLERANCE, Case, Data, WrongResult, verify
from bench.problems import folder_option

TUNED = [
    (32, 64, 56, 56), (32, 256, 28, 28), (32, 1024, 14, 14), (64, 512, 7, 7), (128, 64, 32, 32),
    (8, 64, 112, 112),
]  # fmt: skip
OTHERS = [(24, 96, 40, 40), (16, 320, 20, 20), (4, 48, 150, 150)]  # nothing was tuned to these
QUICK = [(8, 64, 28, 28), (8, 128, 7, 7)]
SMALL = (16, 64, 7, 7)
ROUNDS, QUICK_ROUNDS = 21, 5
SMALL_MAP = 256
SLACK = 50  # see bench.layer
LEAST = {"forward": 2, "backward": 3}  # passes over the tensor's bytes
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
    "one thread / two": (0.0, False),  # what a copy gains
}
READING = """\
Every figure is the median over alternating rounds of the ratio within a round, forward and backward together
where nothing else is said; the geometric mean is over all shapes and both layouts, and the worst is of one.
Outputs are reused; all results agreed with the float64 reference before anything was timed. A copy is
PyTorch's `out.copy_(x)` of the same bytes, on as many threads. Inference over a copy, one pass that reads and
writes what a forward does at least, is what bounds the goal of that."""

Ratios = dict[str, float]


def main(arguments: list[str]) -> None:
    options = _options(arguments)
    if peers.torch_version() is None:
        sys.exit("targets needs PyTorch, which is not installed")
    timing.keep_pages()
    where = report.machine(sbn.get_num_threads())
    print(where, file=sys.stderr)
    shapes = QUICK if options.quick else TUNED + OTHERS
    found: dict[tuple[str, str], Ratios] = {}
    limits: list[list[str]] = []
    try:
        for shape in shapes:
            for layout in ("first", "last"):
                begin = time.perf_counter()
                ratios, lines = measure(shape, layout, options.rounds, options.compile)
                found["×".join(map(str, shape)), f"channels-{layout}"] = ratios
                limits += lines
                print(f"{shape} {layout}: {time.perf_counter() - begin:.0f} s", file=sys.stderr, flush=True)
    except WrongResult as wrong:
        sys.exit(f"wrong result, nothing is written: {wrong}")
    command = " ".join(["python -m bench targets", *arguments])
    lines = ["# The CPU engine's goals", "", f"{where} `{command}`.", "", READING, "", *_goals(found)]
    lines += ["", f"A call of `sbn.forward` on {SMALL}, NumPy, FS 1/16: {small():.0f} µs (goal: 15).", ""]
    lines += ["## Every shape", "", *_shapes(found), "", "## Where the time goes", "", PROFILE, ""]
    lines += _profile(limits)
    print("\n".join(lines))
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "targets-cpu.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


PROFILE = """\
GB/s is the least traffic, two passes over the tensor for the forward and three for the backward, over the
time; of the copy its two passes. Where ours is near the copy's, the memory bounds it: the copy itself reads
what it overwrites, which streamed stores spare, so that ours can exceed it. The rest, over that limit, is the
sample read twice, what a repair writes again, the draw and the call. The machine offers no hardware counters
(`perf stat` says: not supported)."""


def sampler_for(shape: tuple[int, ...]) -> sbn.Sampler:
    """Return the sampler that suits a shape, of 1/16 of the data."""
    small = np.prod(shape[2:]) < SMALL_MAP
    return sbn.BatchSampling(1 / 16) if small and shape[0] >= 16 else sbn.FeatureSampling(1 / 16)


def measure(
    shape: tuple[int, ...], layout: str, rounds: int, compiles: bool
) -> tuple[Ratios, list[list[str]]]:
    """Check and time all that the goals are about, on one shape.

    Raises:
        WrongResult: before anything is timed.
    """
    threads, sampler = sbn.get_num_threads(), sampler_for(shape)
    plain, relu, added, bf16 = (
        Data(Case(shape, layout, *rest))
        for rest in (
            ("float32", False, False), ("float32", True, False), ("float32", True, True),
            ("bfloat16", False, False),
        )
    )  # fmt: skip
    ours = {
        "ours": peers.Ours(plain, sampler, "ours"), "full": peers.Ours(plain, sbn.Full(), "full"),
        "relu": peers.Ours(relu, sampler, "relu"), "added": peers.Ours(added, sampler, "added"),
        "bf16": peers.Ours(bf16, sampler, "bf16"),
    }  # fmt: skip
    theirs = {name: peers.Torch(one.data, threads) for name, one in ours.items() if name != "full"}
    if compiles:
        theirs["compile"] = peers.Compiled(plain, threads)
    for one in ours.values():
        verify(one, one.data, TOLERANCE[one.data.case.dtype])
    for other in theirs.values():
        verify(other, other.data, SLACK * TOLERANCE[other.data.case.dtype])
    copy, infer = peers.Copy(plain, threads), Inference(plain)
    contenders: dict[str, timing.Contender] = {"copy": {"copy": copy.copy}}
    contenders |= {
        f"{name}, eager": {"forward": one.forward, "backward": one.backward} for name, one in theirs.items()
    }
    if threads > 1:
        contenders |= _on_one_thread(ours["ours"], copy, threads)
    contenders |= {"infer": {"forward": infer.ours}, "infer, eager": {"forward": infer.theirs}}
    # last, since a copy after a copy would find its tensors in the cache
    contenders |= {name: {"forward": one.forward, "backward": one.backward} for name, one in ours.items()}
    times = timing.alternate(contenders, rounds)
    both = {name: sum(phases.values()) for name, phases in times.items()}

    def over(a: str, b: str) -> float:
        return timing.ratio(both[a], both[b])

    copied = times["copy"]["copy"]
    ratios = {f"{phase} / copy": timing.ratio(times["ours"][phase], copied) for phase in LEAST}
    ratios[f"eager / ours, channels-{layout}"] = over("ours, eager", "ours")
    if compiles:
        ratios["torch.compile / ours"] = over("compile, eager", "ours")
    ratios["BN+ReLU, eager / ours"] = over("relu, eager", "relu")
    ratios["BN+add+ReLU, eager / ours"] = over("added, eager", "added")
    ratios["Full(), eager / ours"] = over("ours, eager", "full")
    ratios["bfloat16, eager / ours"] = over("bf16, eager", "bf16")
    ratios["inference, eager / ours"] = over("infer, eager", "infer")
    ratios["inference / copy"] = timing.ratio(times["infer"]["forward"], copied)
    if threads > 1:
        ratios["one thread / two"] = over("ours, one thread", "ours")
        ratios["the same of a copy"] = over("copy, one thread", "copy")
    return ratios, _limits(plain, times)


class Inference:
    """Normalization by given statistics, ours into a reused output."""

    def __init__(self, data: Data) -> None:
        import torch

        self.data, C = data, data.case.shape[1]
        mean, var = np.linspace(-1, 1, C, dtype=np.float32), np.linspace(0.5, 2, C, dtype=np.float32)
        self.statistics = sbn.Statistics(mean, var, 1.0)
        arrays = (data.x, mean, var, data.weight, data.bias)
        self.tensors = [torch.from_numpy(array) for array in arrays]
        self.torch = torch
        scale = data.weight.astype(np.float64) / np.sqrt(var.astype(np.float64) + EPS)
        along = (slice(None), *[None] * (data.x.ndim - 2))
        few = data.x[:1]
        truth = (few - mean.astype(np.float64)[along]) * scale[along] + data.bias[along]
        for name, got in (("sbn.normalize", self.ours()), ("PyTorch's inference", self.theirs().numpy())):
            error = np.abs(got[:1] - truth).max() / max(1.0, np.abs(truth).max())
            if not error <= TOLERANCE["float32"]:
                raise WrongResult(f"{name} on {data.case} is off by {error:.1e}")

    def ours(self) -> np.ndarray:
        data = self.data
        return sbn.normalize(data.x, self.statistics, data.weight, data.bias, eps=EPS, out=data.y)  # type: ignore[no-any-return]

    def theirs(self) -> Any:
        with self.torch.inference_mode():
            return self.torch.nn.functional.batch_norm(*self.tensors, training=False, eps=EPS)


def _on_one_thread(ours: peers.Ours, copy: peers.Copy, threads: int) -> dict[str, timing.Contender]:
    import torch

    def alone(call: Callable[[], object]) -> Callable[[], None]:
        def run() -> None:
            sbn.set_num_threads(1)
            torch.set_num_threads(1)
            try:
                call()
            finally:
                sbn.set_num_threads(threads)
                torch.set_num_threads(threads)

        return run

    return {
        "ours, one thread": {"forward": alone(ours.forward), "backward": alone(ours.backward)},
        "copy, one thread": {"copy": alone(copy.copy)},
    }


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


def _limits(data: Data, times: dict[str, timing.Times]) -> list[list[str]]:
    case, nbytes = data.case, data.x.nbytes
    copied = float(np.nanmedian(times["copy"]["copy"]))
    lines = []
    for phase, passes in LEAST.items():
        took = float(np.nanmedian(times["ours"][phase]))
        lines.append([
            "×".join(map(str, case.shape)), f"channels-{case.layout}", phase, f"{nbytes / 1e6:.1f}",
            f"{1e3 * took:.2f}", f"{passes * nbytes / took / 1e9:.1f}", f"{2 * nbytes / copied / 1e9:.1f}",
        ])  # fmt: skip
    return lines


def _goals(found: dict[tuple[str, str], Ratios]) -> list[str]:
    lines = []
    for name, (goal, less) in GOALS.items():
        values = [ratios[name] for ratios in found.values() if name in ratios]
        if not values:
            continue
        mean, worst = timing.geometric_mean(values), (max if less else min)(values)
        wanted = f"{goal:g}"
        if not goal:
            goal = timing.geometric_mean([ratios["the same of a copy"] for ratios in found.values()])
            wanted = f"a copy's, {goal:.2f}"
        met = mean <= goal if less else mean >= goal
        lines.append([name, wanted, f"{mean:.2f}", f"{worst:.2f}", "yes" if met else "no"])
    return report.markdown(["figure", "goal", "geometric mean", "worst", "reached"], lines, text=1)


def _shapes(found: dict[tuple[str, str], Ratios]) -> list[str]:
    names = list(dict.fromkeys(name for ratios in found.values() for name in ratios))
    lines = [
        [*case, *(f"{ratios[name]:.2f}" if name in ratios else "" for name in names)]
        for case, ratios in found.items()
    ]
    return report.markdown(["shape", "layout", *names], lines, text=2)


def _profile(limits: list[list[str]]) -> list[str]:
    titles = ["shape", "layout", "phase", "tensor, MB", "ours, ms", "ours, GB/s", "copy, GB/s"]
    return report.markdown(titles, limits, text=3)


def _options(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench targets", description=__doc__)
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--out", type=folder_option, metavar="FOLDER", help="for targets-cpu.md")
    parser.add_argument("--quick", action="store_true", help="two small shapes, few rounds")
    options = parser.parse_args(arguments)
    options.rounds = options.rounds or (QUICK_ROUNDS if options.quick else ROUNDS)
    if options.rounds < 1:
        parser.error(f"--rounds: expected a positive integer, got {options.rounds}")
    return options
