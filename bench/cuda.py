"""The GPU as a place to time a layer: rotating buffers, CUDA graphs, events for a clock, the host's costs.

Tensors are PyTorch's; ours sees them through DLPack. The time of a call is that between two CUDA events over
several calls, which rotate through buffers, x and y of which hold more than twice the L2 cache. "graph" is
ours captured in a CUDA graph: what the kernels take where the host is no part of it. The copy is the faster
of the two, called or captured.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np

import sbncore as sbn
from bench import timing
from bench.cases import Case, Data, WrongResult, tensor, verify
from bench.contenders import Contender, Copy, Ours, Torch
from bench.machine import Machine, machine
from bench.tables import PHASES

TINY = Case((16, 64, 7, 7), dtype="float16", relu=True)
SAMPLER = sbn.FeatureSampling(1 / 16)
MOST_BUFFERS = 128
PATIENCE = 4e-3  # seconds of one contender in a round
FEWEST = 3  # rounds of the host's costs
HOST_CALLS = 200  # in each
Captured = dict[tuple[str, str], timing.Phases]


class Gpu:
    """Times on a GPU; works on the CPU's arrays too where its clock and graphs are replaced, as tests do."""

    device, repeated, calls = "cuda", True, ("python", "graph")

    def __init__(self, l2: int, where: Machine, free: Callable[[], None]) -> None:
        self.l2, self.where, self.free = l2, where, free

    def buffers(self, case: Case) -> int:
        """Return how many sets hold twice the L2 cache in x and y alone, which a forward touches."""
        return max(1, min(MOST_BUFFERS, -(-2 * self.l2 // (2 * case.nbytes))))

    def data(self, case: Case) -> Data:
        return Data(case, self.device, self.buffers(case))

    def times(self, ours: Sequence[Ours], others: Sequence[Contender], copy: Copy, rounds: int) -> Any:
        """Return the seconds of each phase in each round, by contender and way of calling."""
        sets, nbytes = len(copy.data.sets), copy.data.case.nbytes
        count = sets * max(1, min(4, (1 << 28) // (sets * nbytes)))
        contenders: Captured = {}
        for one in (*ours, *others):
            for _ in range(sets):  # a backward needs its buffers' forward
                one.forward()
            contenders[one.name, "python"] = {phase: getattr(one, phase) for phase in PHASES}
        for one in ours:
            contenders[one.name, "graph"] = {phase: replayed(one, phase, count) for phase in PHASES}
        contenders["copy", "python"] = {"copy": copy.copy}
        contenders["copy", "graph"] = {"copy": captured(copy.copy, count)}
        times = timing.alternate(contenders, rounds, Clock(), pause=0)
        for (_, call), phases in times.items():
            for seconds in phases.values():
                seconds /= count if call == "graph" else 1
        copies = [times.pop(("copy", call))["copy"] for call in self.calls]
        fastest = min(copies, key=lambda seconds: float(np.median(seconds)))
        times["copy", "python"] = dict.fromkeys(PHASES, fastest)
        return times

    def host_costs(self, rounds: int) -> dict[str, float]:
        """Return microseconds of the host that a call takes, on a tensor too small to keep the device busy.

        Raises:
            WrongResult: before anything is timed.
        """
        import torch

        data, costs = Data(TINY, self.device), {}
        for one in (Ours(data, SAMPLER, "ours", repeated=True), Torch(data, repeated=True)):
            verify(one)
            one.forward()
            for phase in PHASES[:2]:
                call, found = getattr(one, phase), []
                for _ in range(max(FEWEST, rounds)):
                    if self.device == "cuda":
                        torch.cuda.synchronize()
                    begin = time.perf_counter()
                    for _ in range(HOST_CALLS):
                        call()
                    found.append((time.perf_counter() - begin) / HOST_CALLS)
                costs[f"{one.name} {phase}"] = float(np.median(found)) * 1e6
        return costs


@contextmanager
def gpu() -> Iterator[Gpu]:
    """Yield the GPU, on a stream that CuPy and PyTorch share.

    Raises:
        RuntimeError: where there is none.
    """
    from sbncore.cuda.device import cupy

    xp, torch = cupy(), _torch()
    cudnn = torch.backends.cudnn.version()
    versions = f"CuPy {xp.__version__}", f"CUDA {torch.version.cuda}", f"cuDNN {cudnn}"
    where = machine(torch.cuda.get_device_name(), versions)
    l2 = xp.cuda.runtime.getDeviceProperties(xp.cuda.runtime.getDevice())["l2CacheSize"]
    stream = torch.cuda.Stream()

    def free() -> None:
        torch.cuda.empty_cache()
        xp.get_default_memory_pool().free_all_blocks()

    with torch.cuda.stream(stream), _shared(xp, stream):
        yield Gpu(l2, where, free)


class Clock:
    """Seconds of a call on the device, over as many calls as its first ones say there is time for."""

    def __init__(self) -> None:
        self.repeats: dict[timing.Call, int] = {}

    def __call__(self, call: timing.Call) -> float:
        if call not in self.repeats:
            self.repeats[call] = max(2, min(200, int(PATIENCE / max(1e-6, timed(call, 3)))))
        return timed(call, self.repeats[call])


def timed(call: timing.Call, repeats: int) -> float:
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


def replayed(ours: Ours, phase: str, count: int) -> timing.Call:
    """Return what replays a phase from a graph, once it has written what the calls themselves write.

    Raises:
        WrongResult: if any bit of y or dx differs.
    """
    replay = captured(getattr(ours, phase), count)
    y, dx = (tensor(array) for array in ours.data.sets[0][2:4])
    outputs = {"forward": [y], "backward": [dx], "both": [y, dx]}[phase]
    ours.turn = -1
    ours.both()
    wanted = [output.clone() for output in outputs]
    for output in outputs:
        output.fill_(float("nan"))
    replay()
    if not all(bool((a == b).all()) for a, b in zip(outputs, wanted, strict=True)):
        what = f"a graph of {phase} writes other bits than the calls"
        raise WrongResult(f"{ours.name} on {ours.data.case}: {what}")
    return replay


def captured(call: timing.Call, count: int) -> timing.Call:
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
