"""One BN layer on a GPU: checked against the reference, then timed against PyTorch and a copy.

Tensors are PyTorch's; ours sees them through DLPack. A round times each contender in turn, by CUDA events
over several calls that rotate through buffers, x and y of which hold more than twice the L2 cache; a time is
the median over the rounds. "graph" is ours captured in a CUDA graph: what the kernels take where the host is
no part of it. The copy is the faster of the two, called or captured.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from bench import goals
from bench.cases import WrongResult
from bench.contenders import Contender, Data, Ours, Torch, judge
from bench.goals import ITEMSIZE, Case, Row
from bench.progress import Progress

MAPS = [
    (64, 112), (64, 56), (256, 56), (128, 56), (128, 28), (512, 28), (256, 28), (256, 14), (1024, 14),
    (512, 14), (512, 7), (2048, 7),
]  # fmt: skip
SHAPES = [(N, C, side, side) for N in (256, 32) for C, side in MAPS] + [(256, 64, 32, 32)]
QUICK = [(256, 64, 56, 56), (256, 64, 32, 32), (32, 64, 56, 56)]
QUICK_DTYPES = ["float16"]
COMPILED = {(256, 64, 56, 56), (256, 512, 7, 7), (32, 256, 14, 14)}  # torch.compile takes seconds for each
TINY = Case((16, 64, 7, 7), "float16", False, True, False)
VARIANTS = [(False, False), (True, False), (True, True)]  # ReLU, residual
PHASES = ("forward", "backward", "both")
FEWEST, SOME, MOST = 3, 5, 9  # rounds
PATIENCE = 4e-3  # seconds of one contender in a round
BUDGET, QUICK_BUDGET = 300.0, 40.0  # seconds
HOPELESS = 5  # failures in a row: the device's context may be lost
# Measured first: on them the goals stand. Of 103, 411, 206, 51, 33.5, 26 and twice 13 MB in half precision.
FOREMOST = {
    (256, 64, 56, 56), (256, 256, 56, 56), (256, 512, 28, 28), (32, 256, 56, 56), (256, 64, 32, 32),
    (256, 256, 14, 14), (256, 512, 7, 7), (32, 64, 56, 56),
}  # fmt: skip


def main(options: Any) -> int:
    """Run the benchmark for the options of `python -m bench layer`; return the exit code."""
    try:
        from sbncore.cuda.device import cupy

        xp, torch = cupy(), _torch()
    except RuntimeError as complaint:
        print(f"no CUDA device: {complaint}", file=sys.stderr)
        return 2
    budget = options.budget or (QUICK_BUDGET if options.quick else BUDGET)
    where = goals.machine(xp, torch)
    l2 = xp.cuda.runtime.getDeviceProperties(xp.cuda.runtime.getDevice())["l2CacheSize"]
    stream = torch.cuda.Stream()
    begin = time.perf_counter()
    host: dict[str, float] = {}
    with torch.cuda.stream(stream), _shared(xp, stream):
        complaints: list[str] = []
        try:
            host = host_costs(options.rounds or SOME)
        except Exception as complaint:
            complaints.append(_told(TINY, complaint))

        def one(case: Case, rounds: int) -> list[Row]:
            try:
                return list(measure(case, rounds, l2, complaints, not options.quick))
            finally:
                torch.cuda.empty_cache()
                xp.get_default_memory_pool().free_all_blocks()

        rows = sweep(cases(options), one, budget, options.rounds, begin, complaints)
    for line in complaints:
        print(line, file=sys.stderr)
    if rows:
        goals.write(Path(options.out), rows, host, where, complaints)
    return 1 if complaints or not rows else 0


def cases(options: Any) -> list[Case]:
    """Return what to measure, in the order to do it."""
    shapes = options.shapes or (QUICK if options.quick else SHAPES)
    dtypes = options.dtypes or (QUICK_DTYPES if options.quick else list(ITEMSIZE))
    found = [
        Case(shape, dtype, layout == "last", *variant)
        for shape in shapes
        for dtype in dtypes
        for layout in options.layouts
        for variant in VARIANTS
    ]
    found.sort(key=lambda case: (case.shape not in FOREMOST, list(ITEMSIZE).index(case.dtype), -case.nbytes))
    return found


def sweep(
    cases: list[Case],
    one: Callable[[Case, int], list[Row]],
    budget: float,
    rounds: int | None,
    begin: float,
    complaints: list[str],
) -> list[Row]:
    """Time the cases within the budget; a wrong or failing one is told of, and the next one goes on."""
    rows: list[Row] = []
    progress = Progress(len(cases))
    failed = 0
    for done, case in enumerate(cases):
        elapsed = time.perf_counter() - begin
        if elapsed > budget or failed == HOPELESS:
            why = f"{budget:g} s are over, --budget allows more" if elapsed > budget else "nothing works"
            print(f"\n{len(cases) - done} of {len(cases)} cases left out: {why}", file=sys.stderr)
            break
        try:
            rows += one(case, rounds or rounds_for(case, done, len(cases), elapsed, budget))
            failed = 0
        except Exception as complaint:
            complaints.append(_told(case, complaint))
            failed += not isinstance(complaint, WrongResult)
        progress.step(str(case))
    return rows


def rounds_for(case: Case, done: int, total: int, elapsed: float, budget: float) -> int:
    """Return how many rounds the time left allows; what the goals stand on gets them in any case."""
    if case.shape in FOREMOST or not done:
        return MOST
    pace = (budget - elapsed) / (total - done) / (elapsed / done)
    return MOST if pace > 2 else SOME if pace > 1 else FEWEST


def measure(
    case: Case, rounds: int, l2: int, complaints: list[str], compiles: bool = True, device: str = "cuda"
) -> Iterator[Row]:
    """Check and time one case; torch.compile, where it fails, is told of and left out.

    Raises:
        WrongResult: before anything is timed.
    """
    data = Data(case, l2, device)
    ours, eager = Ours(data), Torch(data)
    judge(data, ours, eager)
    peers: list[Contender] = [eager]
    if compiles and case.shape in COMPILED and case.dtype == "float16":
        try:
            compiled = Torch(data, compiled=True)
            judge(data, compiled)
            peers.append(compiled)
        except Exception as complaint:  # no Triton, no C compiler, ...
            complaints.append(f"torch.compile left out: {_told(case, complaint)}")
    turn = 0

    def copy() -> None:
        nonlocal turn
        turn = (turn + 1) % len(data.tensors)
        data.tensors[turn][2].copy_(data.tensors[turn][0])

    count = len(data.sets) * max(1, min(4, (1 << 28) // (len(data.sets) * case.nbytes)))
    calls: dict[tuple[str, str], Callable[[], Any]] = {}
    for phase in PHASES:
        calls["ours", phase] = getattr(ours, phase)
        calls["graph", phase] = replayed(ours, phase, count)
        calls |= {(peer.name, phase): getattr(peer, phase) for peer in peers}
    calls |= {("copy", "called"): copy, ("copy", "graph"): captured(copy, count)}
    per_call = {key: count if "graph" in key else 1 for key in calls}
    times = {key: found / per_call[key] for key, found in alternate(calls, rounds).items()}
    copies = [times.pop(("copy", how)) for how in ("called", "graph")]
    times["copy", "copy"] = min(copies, key=lambda found: float(np.median(found)))
    copied = float(np.median(times["copy", "copy"]))
    for (name, phase), seconds in times.items():
        p20, median, p80 = np.percentile(seconds, (20, 50, 80)) * 1e6
        moved = case.moved(phase) if name in ("ours", "graph") else 2 * case.nbytes if name == "copy" else 0
        share = moved / (median * 1e-6) / (2 * case.nbytes / copied) if moved else 0.0
        yield Row(case, name, phase, float(median), float(p20), float(p80), moved, float(share))


def replayed(ours: Ours, phase: str, count: int) -> Callable[[], Any]:
    """Return what replays a phase from a graph, once it has written what the calls themselves write.

    Raises:
        WrongResult: if any bit of y or dx differs.
    """
    replay = captured(getattr(ours, phase), count)
    y, dx = ours.data.tensors[0][2:4]
    outputs = {"forward": [y], "backward": [dx], "both": [y, dx]}[phase]
    ours.turn = -1
    ours.both()
    wanted = [output.clone() for output in outputs]
    for output in outputs:
        output.fill_(float("nan"))
    replay()
    if not all(bool((a == b).all()) for a, b in zip(outputs, wanted, strict=True)):
        raise WrongResult(f"ours on {ours.data.case}: a graph of {phase} writes other bits than the calls")
    return replay


def captured(call: Callable[[], Any], count: int) -> Callable[[], Any]:
    """Capture so many calls in a CUDA graph; return what replays it and keeps what they returned."""
    import cupy

    stream = cupy.cuda.get_current_stream()
    warm = [call() for _ in range(count)]  # compiles, and fills the pool with what the graph will need
    stream.synchronize()
    del warm
    stream.begin_capture()
    try:
        kept = [call() for _ in range(count)]
    except BaseException:
        with suppress(Exception):  # the stream is needed for what comes next
            stream.end_capture()
        raise
    graph = stream.end_capture()

    def replay() -> None:
        assert kept
        graph.launch(stream)

    return replay


def alternate(
    calls: dict[tuple[str, str], Callable[[], Any]], rounds: int
) -> dict[tuple[str, str], np.ndarray]:
    """Return seconds a call takes on the device, in each round, the contenders taking turns."""
    repeats = {
        key: max(2, min(200, int(PATIENCE / max(1e-6, timed(call, 3))))) for key, call in calls.items()
    }
    found: dict[tuple[str, str], list[float]] = {key: [] for key in calls}
    for _ in range(rounds):
        for key, call in calls.items():
            found[key].append(timed(call, repeats[key]))
    return {key: np.array(seconds) for key, seconds in found.items()}


def timed(call: Callable[[], Any], repeats: int) -> float:
    """Return seconds a call, between two events; a call before them lets the host get ahead."""
    import torch

    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    call()
    begin.record()
    for _ in range(repeats):
        call()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3 / repeats


def host_costs(rounds: int, repeats: int = 200, device: str = "cuda") -> dict[str, float]:
    """Return microseconds of the host that a call takes, on a tensor too small to keep the device busy.

    Raises:
        WrongResult: before anything is timed.
    """
    import torch

    data, costs = Data(TINY, 0, device), {}
    contenders: list[Contender] = [Ours(data), Torch(data)]
    judge(data, *contenders)
    for one in contenders:
        for phase in PHASES[:2]:
            call, found = getattr(one, phase), []
            for _ in range(max(FEWEST, rounds)):
                if device == "cuda":
                    torch.cuda.synchronize()
                begin = time.perf_counter()
                for _ in range(repeats):
                    call()
                found.append((time.perf_counter() - begin) / repeats)
            costs[f"{one.name} {phase}"] = float(np.median(found)) * 1e6
    return costs


def _torch() -> Any:
    try:
        import torch
    except ImportError as complaint:
        raise RuntimeError(f"the benchmark's tensors are PyTorch's ({complaint})") from None
    if not torch.cuda.is_available():
        raise RuntimeError(f"PyTorch {torch.__version__} sees none")
    return torch


def _shared(cupy: Any, stream: Any) -> Any:
    from sbncore.adapters.torch.exchange import Stream

    return cupy.cuda.Stream.from_external(Stream(stream.cuda_stream))


def _told(case: Case, complaint: Exception) -> str:
    if isinstance(complaint, WrongResult):
        return f"wrong result, not timed: {complaint}"
    first = next(iter(str(complaint).splitlines()), "")
    return f"failed, not timed: {case}: {type(complaint).__name__}: {first}"
