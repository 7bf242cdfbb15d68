"""One BN layer: every implementation is checked against the float64 reference, and only then timed.

Ours / copy: how many times as long as copying the tensor once takes (N bytes read, N written). The least
traffic is 2N for the forward and 3N for the exact backward: 1 and 1.5 copies. Peer / ours: how many times
as fast ours is, forward and backward together where nothing else is said; the peers compute full batch
normalization. A ratio is the median over the rounds of the ratio within a round, a time the median (20th to
80th percentile). Share: of the bandwidth that a copy of the same tensor reached, for the bytes that must
move.

On the CPU a round runs, for each contender in turn, a forward and the backward after it; NumPy runs on one
thread, the copy on as many as ours. Ours draws its plan in every forward and writes into buffers used
before; malloc keeps freed pages, so that the peers' memory is warm too. PyTorch's OpenMP threads spin at
barriers: on a quiet machine that serves it (by a quarter), on a busy one it can cost ten times the kernel,
steadily. Publish from a quiet machine, and compare with OMP_WAIT_POLICY=passive.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import Any

from tqdm import tqdm

import sbncore as sbn
from bench import cuda, report, tables, timing
from bench.cases import Case, Data, WrongResult, verify
from bench.contenders import Contender, Ours, copier
from bench.goals import gpu_goals
from bench.layer_options import GPU_DTYPES, parsed
from bench.machine import machine, set_threads
from bench.peers import PEERS

# Measured first: on them the goals stand. Of 103, 411, 206, 51, 33.5, 26 and twice 13 MB in half precision.
FOREMOST = {
    (256, 64, 56, 56), (256, 256, 56, 56), (256, 512, 28, 28), (32, 256, 56, 56), (256, 64, 32, 32),
    (256, 256, 14, 14), (256, 512, 7, 7), (32, 64, 56, 56),
}  # fmt: skip
COMPILED = {(256, 64, 56, 56), (256, 512, 7, 7), (32, 256, 14, 14)}  # torch.compile takes seconds for each
FEWEST, SOME, MOST = 3, 5, 9  # rounds on a GPU
HOPELESS = 5  # failures in a row: the device's context may be lost
Samplers = Sequence[tuple[str, sbn.Sampler]]


class Cpu:
    """Times on the CPU: a forward and its backward in turn, a clock around each call."""

    reading = ""

    def __init__(self, threads: int | None = None) -> None:
        set_threads(threads or sbn.get_num_threads())
        self.where = machine()
        if not timing.keep_pages():
            self.reading = "Here malloc could not be told to keep pages: PyTorch's times contain fresh ones."

    def data(self, case: Case) -> Data:
        return Data(case)

    def times(self, data: Data, ours: Sequence[Ours], others: Sequence[Contender], rounds: int) -> Any:
        """Return the seconds of each contender's phases in each round."""
        contenders: dict[str, timing.Phases] = {"copy": {"copy": copier(data)}}
        times = timing.alternate(contenders | {one.name: one.phases for one in (*ours, *others)}, rounds)
        copied = times.pop("copy")["copy"]
        for phases in times.values():
            phases["both"] = phases["forward"] + phases["backward"]
        return times | {"copy": dict.fromkeys(tables.PHASES, copied)}


def main(arguments: list[str]) -> None:
    options = parsed(arguments)
    cpu = options.device == "cpu"
    complaints: list[str] = []
    host: dict[str, float] = {}
    try:
        with nullcontext(Cpu(options.threads)) if cpu else cuda.gpu() as on:
            begin = time.perf_counter()
            print(on.where, file=sys.stderr)
            if isinstance(on, cuda.Gpu):
                try:
                    host = on.host_costs(options.rounds or SOME)
                except Exception as complaint:
                    complaints.append(_told(cuda.TINY, complaint))
            rows = sweep(cases(options), options, on, begin, complaints)
    except WrongResult as wrong:
        sys.exit(f"\nwrong result, nothing is written: {wrong}")
    except RuntimeError as complaint:
        if cpu:
            raise
        print(f"no CUDA device: {complaint}", file=sys.stderr)
        sys.exit(2)
    print("".join(f"{line}\n" for line in complaints), end="", file=sys.stderr)
    if rows:
        write(options, rows, on, report.about(on.where, "layer", arguments), host, complaints)
    if complaints or not rows:
        sys.exit(1)


def cases(options: argparse.Namespace) -> list[Case]:
    """Return what to measure, in the order to do it."""
    found = [
        Case(shape, layout, dtype, *variant)
        for shape in options.shapes
        for dtype in options.dtypes
        for layout in options.layouts
        for variant in options.variants
    ]
    if options.device == "cuda":
        found.sort(key=lambda c: (c.shape not in FOREMOST, GPU_DTYPES.index(c.dtype), -c.nbytes))
    return found


def sweep(
    cases: Sequence[Case], options: argparse.Namespace, on: Any, begin: float, complaints: list[str]
) -> list[tables.Row]:
    """Check and time the cases; on a GPU within the budget, and what is wrong or fails is left out.

    Raises:
        WrongResult: on the CPU, before anything of that case is timed.
    """
    rows: list[tables.Row] = []
    gpu, failed = options.device == "cuda", 0
    for done, case in enumerate(bar := tqdm(cases)):
        elapsed = time.perf_counter() - begin
        if elapsed > options.budget or failed == HOPELESS:
            over = f"{options.budget:g} s are over, --budget allows more"
            why = over if failed < HOPELESS else "nothing works"
            print(f"\n{len(cases) - done} of {len(cases)} cases left out: {why}", file=sys.stderr)
            break
        bar.set_description(str(case))
        compiles = gpu and not options.quick and case.shape in COMPILED and case.dtype == "float16"
        against = [*options.against, "compile"] if compiles else options.against
        rounds = options.rounds or rounds_for(case, done, len(cases), elapsed, options.budget)
        try:
            rows += list(measure(case, options.samplers, rounds, against, on, complaints if gpu else None))
            failed = 0
        except Exception as complaint:
            if not gpu:
                raise
            complaints.append(_told(case, complaint))
            failed += not isinstance(complaint, WrongResult)
    return rows


def rounds_for(case: Case, done: int, total: int, elapsed: float, budget: float) -> int:
    """Return how many rounds the time left allows; what the goals stand on gets them in any case."""
    if case.shape in FOREMOST or not done:
        return MOST
    pace = (budget - elapsed) / (total - done) / (elapsed / done)
    return MOST if pace > 2 else SOME if pace > 1 else FEWEST


def measure(
    case: Case, samplers: Samplers, rounds: int, against: Sequence[str], on: Any,
    complaints: list[str] | None = None,
) -> Iterator[tables.Row]:  # fmt: skip
    """Check and time one case.

    Args:
        against: Names of PEERS.
        on: Where, a `Cpu` or a `bench.cuda.Gpu`.
        complaints: Where to report that torch.compile failed, which is then left out; None lets it raise.

    Raises:
        WrongResult: before anything is timed.
    """
    data, repeated = on.data(case), isinstance(on, cuda.Gpu)
    ours = [Ours(data, sampler, name, repeated) for name, sampler in samplers]
    for one in ours:
        verify(one)
    others: list[Contender] = []
    for name in against:
        try:
            other = PEERS[name](data, repeated)
            verify(other)
        except Exception as complaint:  # no Triton, no C compiler, ...
            if complaints is None or name != "compile":
                raise
            complaints.append(f"torch.compile left out: {_told(case, complaint)}")
        else:
            others.append(other)
    times = on.times(data, ours, others, rounds)
    sampled = {name: getattr(sampler, "amount", 1.0) for name, sampler in samplers}
    for name, mine in times.items():
        sampler = name.removesuffix(tables.GRAPH)
        if sampler not in sampled:
            continue
        plan = timing.summary(mine["plan"])[0] if "plan" in mine else 0.0
        for peer in ("copy", *(other.name for other in others)):
            for phase in tables.PHASES:
                a, b = mine[phase], times[peer][phase]
                yield tables.Row(
                    case,
                    name,
                    phase,
                    peer,
                    *timing.summary(a),
                    *timing.summary(b),
                    timing.ratio(b, a),
                    timing.shared(a, b),
                    plan,
                    case.moved(phase, sampled[sampler]),
                )


def write(
    options: argparse.Namespace, rows: Sequence[tables.Row], on: Any, about: str, host: dict[str, float],
    complaints: Sequence[str],
) -> None:  # fmt: skip
    """Write a short and a long table, CSV and PNG, of a GPU also its goals, and print the short one."""
    gpu, what = on.where.gpu, [*options.dtypes, options.activation, options.residual and "residual"]
    what = [word for word in what if word]
    stem = "-".join(["layer-cpu", *(word for word in what if word != "float32")])
    title = f"One BN layer on the CPU ({', '.join(what)})"
    after: list[str] = []
    if gpu:
        stem = "layer-" + re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")
        title = "One BN layer on a GPU"
        costs = ", ".join(f"{name} {cost:.1f}" for name, cost in host.items()) or "not measured"
        if complaints:
            after = ["", "## Not measured", "", *(f"- {complaint}" for complaint in complaints)]
        after += ["", "## Goals", "", *(f"- {goal}" for goal in gpu_goals(rows, host))]
        after += ["", f"Host, microseconds a call: {costs}."]
    head = [about, "", str(__doc__), *([on.reading, ""] if on.reading else [])]
    report.write(options.out, f"{stem}-long", title, [*head, *tables.table(rows, long=True)])
    report.publish(
        options.out,
        stem,
        title,
        [*head, *tables.table(rows), *after],
        on.where,
        [row.flat() for row in rows],
        lambda figure: tables.draw(figure, rows),
    )
    print(f"written: {options.out / stem}.csv, .md, -long.md and, with matplotlib, .png", file=sys.stderr)


def _told(case: Case, complaint: Exception) -> str:
    if isinstance(complaint, WrongResult):
        return f"wrong result, not timed: {complaint}"
    first = next(iter(str(complaint).splitlines()), "")
    return f"failed, not timed: {case}: {type(complaint).__name__}: {first}"
