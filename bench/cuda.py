"""On a GPU the time of a call is that between two CUDA events over several calls.

The calls rotate through buffers, x and y of which hold more than twice the L2 cache. "graph" is ours
captured in a CUDA graph, what the kernels take where the host is no part of it; all else is called from
Python. The copy is the faster of the two, called or captured. Tensors are PyTorch's, ours take them as they
are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np

import sbncore as sbn
from bench import timing
from bench.cases import Case, Data, WrongResult, tensor, verify
from bench.contenders import Contender, Ours, Torch, copier
from bench.machine import Machine, machine
from bench.tables import GRAPH, PHASES

TINY = Case((16, 64, 7, 7), dtype="float16", relu=True)  # too small to keep the device busy
SAMPLER = sbn.FeatureSampling(1 / 16)
MOST_BUFFERS = 128
PATIENCE = 4e-3  # seconds of one contender in a round
HOST_CALLS = 200  # in a round of the host's costs


class Gpu:
    """Times on a GPU; on the CPU's tensors too where its clock and graphs are replaced, as tests do."""

    device, reading = "cuda", str(__doc__)

    def __init__(self, l2: int, where: Machine, free: Callable[[], None]) -> None:
        self.l2, self.where, self.free = l2, where, free

    def buffers(self, case: Case) -> int:
        """Return how many sets hold twice the L2 cache in x and y alone, which a forward touches."""
        return max(1, min(MOST_BUFFERS, -(-2 * self.l2 // (2 * case.nbytes))))

    def data(self, case: Case) -> Data:
        self.free()  # what the last case left in the pools
        return Data(case, self.device, self.buffers(case))

    def times(self, data: Data, ours: Sequence[Ours], others: Sequence[Contender], rounds: int) -> Any:
        """Return the seconds of each contender's phases in each round, and of ours' graphs."""
        sets, nbytes = len(data.sets), data.case.nbytes
        count = sets * max(1, min(4, (1 << 28) // (sets * nbytes)))
        copy = copier(data)
        contenders: dict[str, timing.Phases] = {"copy": {"copy": copy}}
        contenders["copy" + GRAPH] = {"copy": captured(copy, count)}
        for one in (*ours, *others):
            for _ in range(sets):  # a backward needs its buffers' forward
                one.forward()
            contenders[one.name] = {phase: getattr(one, phase) for phase in PHASES}
        for one in ours:
            contenders[one.name + GRAPH] = {phase: replayed(one, phase, count) for phase in PHASES}
        times = timing.alternate(contenders, rounds, clock(), pause=0)
        for name, phases in times.items():
            for seconds in phases.values():
                seconds /= count if name.endswith(GRAPH) else 1
        copies = (times.pop(name)["copy"] for name in ("copy", "copy" + GRAPH))
        return times | {"copy": dict.fromkeys(PHASES, min(copies, key=np.median))}

    def host_costs(self, rounds: int) -> dict[str, float]:
        """Return microseconds of the host that a call takes.

        Raises:
            WrongResult: before anything is timed.
        """
        data = Data(TINY, self.device)
        contenders: dict[str, timing.Phases] = {}
        for one in (Ours(data, SAMPLER, "ours", repeated=True), Torch(data, repeated=True)):
            verify(one)
            one.forward()
            contenders |= {f"{one.name} {phase}": {"": call} for phase, call in one.phases.items()}
        times = timing.alternate(contenders, rounds, timing.repeatedly(HOST_CALLS))
        return {name: float(np.median(phases[""])) * 1e6 for name, phases in times.items()}


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


def clock() -> Callable[[timing.Call], float]:
    """Return a clock of a call's seconds on the device, over as many calls as PATIENCE allows."""
    repeats: dict[timing.Call, int] = {}

    def seconds(call: timing.Call) -> float:
        if call not in repeats:
            repeats[call] = max(2, min(200, int(PATIENCE / max(1e-6, timed(call, 3)))))
        return timed(call, repeats[call])

    return seconds


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
    from sbncore.cuda.views import Stream

    return cupy.cuda.Stream.from_external(Stream(stream.cuda_stream))
