"""One BN layer: every implementation is checked against the reference, and only then timed.

On the CPU a round runs, for each contender in turn, a forward and the backward after it. Ours draws its plan
in every forward and writes into buffers used before; malloc keeps freed pages, so that PyTorch's outputs are
warm memory too. The copy has as many threads as ours. On a GPU, bench.cuda says how time is taken.

PyTorch's OpenMP threads spin at barriers: on a quiet machine that serves it (by a quarter), on a busy one it
can cost ten times the kernel, steadily. Publish from a quiet machine, and compare with
OMP_WAIT_POLICY=passive.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from tqdm import tqdm

import sbncore as sbn
from bench import cuda, report, tables, timing
from bench.cases import Case, Data, WrongResult, verify
from bench.contenders import PEERS, Contender, Copy, Ours
from bench.layer_options import GPU_DTYPES, parsed
from bench.layer_report import write, write_gpu
from bench.machine import machine, set_threads

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

    repeated, calls = False, ("python",)

    def __init__(self) -> None:
        self.where = machine()

    def data(self, case: Case) -> Data:
        return Data(case)

    def free(self) -> None:
        pass

    def host_costs(self, rounds: int) -> dict[str, float]:
        return {}

    def times(self, ours: Sequence[Ours], others: Sequence[Contender], copy: Copy, rounds: int) -> Any:
        """Return the seconds of each phase in each round, by contender and way of calling."""
        contenders: dict[tuple[str, str], timing.Phases] = {("copy", "python"): {"copy": copy.copy}}
        for one in (*ours, *others):
            drawn: dict[str, timing.Call] = {"plan": one.plan} if isinstance(one, Ours) else {}
            contenders[one.name, "python"] = drawn | {"forward": one.forward, "backward": one.backward}
        times = timing.alternate(contenders, rounds)
        for phases in times.values():
            if "copy" in phases:
                phases |= dict.fromkeys(tables.PHASES, phases["copy"])
            else:
                phases["both"] = phases["forward"] + phases["backward"]
        return times


def main(arguments: list[str]) -> None:
    options = parsed(arguments)
    cpu = options.device == "cpu"
    if cpu and options.threads:
        set_threads(options.threads)
    warm = timing.keep_pages() if cpu else True
    place: AbstractContextManager[Any] = nullcontext() if cpu else cuda.gpu()
    complaints: list[str] = []
    try:
        with place as gpu:
            begin, on = time.perf_counter(), gpu or Cpu()
            print(on.where, file=sys.stderr)
            host = _host_costs(on, options.rounds or SOME, complaints)
            rows = sweep(cases(options), options, on, begin, complaints)
    except WrongResult as wrong:
        sys.exit(f"\nwrong result, nothing is written: {wrong}")
    except RuntimeError as complaint:
        if cpu:
            raise
        print(f"no CUDA device: {complaint}", file=sys.stderr)
        sys.exit(2)
    print("".join(f"{line}\n" for line in complaints), end="", file=sys.stderr)
    command = report.command("layer", arguments)
    if cpu:
        pages = "" if warm else " malloc could not be told to keep pages: PyTorch's times contain fresh ones."
        write(options, rows, on.where, f"{on.where} {command}.{pages}")
    elif rows:
        write_gpu(options.out, rows, host, on.where, f"{on.where} {command}.", complaints)
    if complaints or not rows:
        sys.exit(1)


def cases(options: argparse.Namespace) -> list[Case]:
    """Return what to measure, in the order to do it."""
    found = [
        Case(shape, layout, dtype, *variant)
        for shape in options.shapes for dtype in options.dtypes for layout in options.layouts
        for variant in options.variants
    ]  # fmt: skip
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
    cpu, failed = options.device == "cpu", 0
    bar = tqdm(total=len(cases))
    for done, case in enumerate(cases):
        elapsed = time.perf_counter() - begin
        if not cpu and (elapsed > options.budget or failed == HOPELESS):
            over = f"{options.budget:g} s are over, --budget allows more"
            why = over if failed < HOPELESS else "nothing works"
            print(f"\n{len(cases) - done} of {len(cases)} cases left out: {why}", file=sys.stderr)
            break
        bar.set_description(str(case))
        against = options.against
        if not cpu and not options.quick and case.shape in COMPILED and case.dtype == "float16":
            against = [*against, "compile"]
        rounds = options.rounds or rounds_for(case, done, len(cases), elapsed, options.budget)
        try:
            rows += measure(case, options.samplers, rounds, against, on, None if cpu else complaints)
            failed = 0
        except Exception as complaint:
            if cpu:
                raise
            complaints.append(_told(case, complaint))
            failed += not isinstance(complaint, WrongResult)
        finally:
            on.free()
        bar.update()
    bar.close()
    return rows


def rounds_for(case: Case, done: int, total: int, elapsed: float, budget: float) -> int:
    """Return how many rounds the time left allows; what the goals stand on gets them in any case."""
    if case.shape in FOREMOST or not done:
        return MOST
    pace = (budget - elapsed) / (total - done) / (elapsed / done)
    return MOST if pace > 2 else SOME if pace > 1 else FEWEST


def measure(
    case: Case, samplers: Samplers, rounds: int, against: Sequence[str], on: Any, complaints: list[str] | None
) -> Iterator[tables.Row]:
    """Check and time one case.

    Args:
        against: Names of PEERS.
        on: Where, a `Cpu` or a `bench.cuda.Gpu`.
        complaints: Where to report that torch.compile failed, which is then left out; None lets it raise.

    Raises:
        WrongResult: before anything is timed.
    """
    data = on.data(case)
    ours = [Ours(data, sampler, name, on.repeated) for name, sampler in samplers]
    for one in ours:
        verify(one)
    others: list[Contender] = []
    for name in against:
        try:
            others.append(PEERS[name](data, on.repeated))
            verify(others[-1])
        except Exception as complaint:  # no Triton, no C compiler, ...
            if complaints is None or name != "compile":
                raise
            others = others[: list(against).index(name)]
            complaints.append(f"torch.compile left out: {_told(case, complaint)}")
    copy = Copy(data)
    times = on.times(ours, others, copy, rounds)
    copy.close()
    for name, sampler in samplers:
        sampled = getattr(sampler, "amount", 1.0)
        for call in on.calls:
            mine = times[name, call]
            plan = timing.summary(mine["plan"])[0] if "plan" in mine else 0.0
            for peer in ("copy", *(other.name for other in others)):
                for phase in tables.PHASES:
                    a, b = mine[phase], times[peer, "python"][phase]
                    yield tables.Row(
                        case, name, call, phase, peer, *timing.summary(a), *timing.summary(b),
                        timing.ratio(b, a), timing.shared(a, b), plan, case.moved(phase, sampled),
                    )  # fmt: skip


def _host_costs(on: Any, rounds: int, complaints: list[str]) -> dict[str, float]:
    try:
        return on.host_costs(rounds)  # type: ignore[no-any-return]
    except Exception as complaint:
        complaints.append(_told(cuda.TINY, complaint))
        return {}


def _told(case: Case, complaint: Exception) -> str:
    if isinstance(complaint, WrongResult):
        return f"wrong result, not timed: {complaint}"
    first = next(iter(str(complaint).splitlines()), "")
    return f"failed, not timed: {case}: {type(complaint).__name__}: {first}"


