"""One BN layer on a GPU: checked against the reference, then timed against PyTorch and a copy.

Tensors are PyTorch's; ours sees them through DLPack. A round times each contender in turn, by CUDA events
over several calls that rotate through buffers of more than twice the L2 cache; a time is the median over the
rounds. "graph" is ours captured in a CUDA graph: what the kernels take where the host is no part of it.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

import sbncore as sbn
from bench import goals
from bench.goals import Case, Row
from sbncore import reference

MAPS = [
    (64, 112), (64, 56), (256, 56), (128, 56), (128, 28), (512, 28), (256, 28), (256, 14), (1024, 14),
    (512, 14), (512, 7), (2048, 7),
]  # fmt: skip
SHAPES = [(N, C, side, side) for N in (256, 32) for C, side in MAPS] + [(256, 64, 32, 32)]
QUICK = [(256, 64, 56, 56), (256, 512, 7, 7), (32, 64, 56, 56)]
COMPILED = {(256, 64, 56, 56), (256, 512, 7, 7), (32, 256, 14, 14)}  # torch.compile takes seconds for each
TINY = (16, 64, 7, 7)
VARIANTS = [(False, False), (True, False), (True, True)]  # ReLU, residual
SAMPLER = sbn.FeatureSampling(1 / 16)
TOLERANCE = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 6e-2}
EPS = 1e-5
ROUNDS = 5
PATIENCE = 4e-3  # seconds of one contender in a round
# Measured first: on them the goals stand. Of 103, 411, 206, 51, 26 and 13 MB in half precision.
FOREMOST = {
    (256, 64, 56, 56), (256, 256, 56, 56), (256, 512, 28, 28), (32, 256, 56, 56), (256, 256, 14, 14),
    (256, 512, 7, 7), (32, 64, 56, 56),
}  # fmt: skip


class Ours:
    """sbncore over rotating buffers, which its outputs reuse."""

    def __init__(self, data: Data) -> None:
        self.data, self.turn = data, 0
        self.activation = "relu" if data.case.relu else None
        self.plan = SAMPLER.plan(data.case.shape, step=1)
        self.saved: list[Any] = [None] * len(data.sets)
        for _ in data.sets:
            self.forward()

    def forward(self) -> Any:
        k = self.turn = (self.turn + 1) % len(self.data.sets)
        x, _, y, _, residual = self.data.sets[k]
        _, self.saved[k] = sbn.forward(
            x, *self.data.parameters, plan=self.plan, activation=self.activation, residual=residual, out=y,
            eps=EPS,
        )  # fmt: skip

    def backward(self) -> Any:
        k = self.turn = (self.turn + 1) % len(self.data.sets)
        self.grads = sbn.backward(self.data.sets[k][1], self.saved[k], out=self.data.sets[k][3])

    def both(self) -> Any:
        self.forward()
        self.turn -= 1
        self.backward()


class Torch:
    """PyTorch's functional batch norm (cuDNN's), add and ReLU, with autograd; eager or compiled."""

    def __init__(self, data: Data, compiled: bool = False) -> None:
        import torch

        self.torch, self.data, self.turn = torch, data, 0
        self.inputs = [
            [t.detach().requires_grad_() for t in (x, *data.torch_parameters, r) if t is not None]
            for x, _, _, _, r in data.tensors
        ]
        relu = data.case.relu

        def layer(x: Any, weight: Any, bias: Any, residual: Any = None) -> Any:
            y = torch.nn.functional.batch_norm(x, None, None, weight, bias, training=True, eps=EPS)
            y = y if residual is None else y + residual
            return torch.relu(y) if relu else y

        self.layer = torch.compile(layer) if compiled else layer
        self.y: list[Any] = [self.layer(*inputs) for inputs in self.inputs]

    def forward(self) -> Any:
        k = self.turn = (self.turn + 1) % len(self.inputs)
        self.y[k] = self.layer(*self.inputs[k])

    def backward(self) -> Any:
        k = self.turn = (self.turn + 1) % len(self.inputs)
        dy = self.data.tensors[k][1]
        self.grads = self.torch.autograd.grad(self.y[k], self.inputs[k], dy, retain_graph=True)

    def both(self) -> Any:
        self.forward()
        self.turn -= 1
        self.backward()


class Data:
    """Buffers (x, dy, y, dx, residual), too many for the L2 cache, as tensors and as ours takes them."""

    def __init__(self, case: Case, l2: int) -> None:
        import cupy
        import torch

        self.case = case
        kind = getattr(torch, case.dtype)
        layout = torch.channels_last if case.last else torch.contiguous_format
        count = max(1, min(32, -(-2 * l2 // (3 * case.nbytes))))
        torch.manual_seed(1)

        def normal() -> Any:
            return torch.randn(case.shape, device="cuda", dtype=kind).contiguous(memory_format=layout)

        self.tensors = [
            (*(normal() for _ in range(4)), normal() if case.residual else None) for _ in range(count)
        ]
        self.torch_parameters = [torch.randn(case.C, device="cuda") for _ in range(2)]

        def view(tensor: Any) -> Any:
            if tensor is None or case.dtype == "bfloat16":
                return tensor
            return cupy.from_dlpack(tensor)

        self.sets = [tuple(map(view, each)) for each in self.tensors]
        self.parameters = [cupy.from_dlpack(p) for p in self.torch_parameters]

    def verify(self, name: str, y: Any, dx: Any, k: int, p: np.ndarray) -> None:
        """Hold two channels, or a large one, against the reference.

        Raises:
            SystemExit: if they are wrong.
        """
        few = self.case.elements // self.case.C < 1_000_000
        for c in (0, self.case.C - 1) if few else (self.case.C - 1,):
            x, dy, _, _, residual = (
                None if t is None else t[:, c : c + 1].double().cpu().numpy() for t in self.tensors[k]
            )
            weight, bias = (t[c : c + 1].double().cpu().numpy() for t in self.torch_parameters)
            activation = "relu" if self.case.relu else None
            y_true, saved = reference.forward(
                x, weight, bias, p=p, eps=EPS, activation=activation, residual=residual
            )
            sure = np.abs(saved.z) > 3e-2 if self.case.relu else np.ones(y_true.shape, bool)
            true = reference.backward(dy, saved)["x"]
            for what, got, want in (("y", y, y_true), ("dx", dx, true)):
                got = got[:, c : c + 1].double().cpu().numpy()
                wrong = np.abs(got - want)[sure].max() / max(1, np.abs(want).max())
                if not wrong <= TOLERANCE[self.case.dtype]:
                    sys.exit(f"wrong result, nothing is written: {name}, {what}, {self.case}: {wrong:.1e}")


def main(options: Any) -> int:
    """Run the benchmark for the options of `python -m bench layer`."""
    try:
        from sbncore.cuda.device import cupy

        xp = cupy()
        import torch
    except (ImportError, RuntimeError) as complaint:
        print(f"no CUDA device: {complaint}", file=sys.stderr)
        return 2
    shapes = options.shapes or (QUICK if options.quick else SHAPES)
    dtypes = [options.dtype] if options.dtype else ["float16", "bfloat16", "float32"]
    cases = [
        Case(shape, dtype, last, *variant)
        for shape in shapes
        for dtype in dtypes
        for last in (False, True)
        for variant in VARIANTS
    ]
    rows: list[Row] = []
    begin = time.perf_counter()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream), _shared(xp, stream):
        host = host_costs(options.rounds or ROUNDS)
        cases.sort(key=lambda case: (case.shape not in FOREMOST, case.dtype != "float16", -case.nbytes))
        for number, case in enumerate(cases, 1):
            if time.perf_counter() - begin > options.budget:
                left = f"{len(cases) - number + 1} of {len(cases)} cases left out"
                print(f"\n{left}: {options.budget:g} s are over, --budget allows more", file=sys.stderr)
                break
            new = list(measure(case, options.rounds or ROUNDS))
            rows += new
            line = f"\r[{number}/{len(cases)}] {case}: {_progress(new)}\033[K"
            print(line, end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    goals.write(Path(options.out), rows, host, goals.machine(xp, torch))
    return 0


def measure(case: Case, rounds: int) -> Iterator[Row]:
    """Check and time one case."""
    import torch

    properties = torch.cuda.get_device_properties(0)
    data = Data(case, properties.L2_cache_size)
    ours, eager = Ours(data), Torch(data)
    peers = {"PyTorch": eager}
    if case.shape in COMPILED:
        peers["torch.compile"] = Torch(data, compiled=True)
    ours.both()
    k = ours.turn
    data.verify("ours", data.tensors[k][2], data.tensors[k][3], k, ours.plan.weights())
    everything = np.full((case.shape[0], *case.shape[2:]), 1 / (case.elements // case.C))
    for name, peer in peers.items():
        peer.both()
        data.verify(name, peer.y[peer.turn].detach(), peer.grads[0], peer.turn, everything)

    def copy() -> None:
        nonlocal k
        k = (k + 1) % len(data.tensors)
        data.tensors[k][2].copy_(data.tensors[k][0])

    phases = ("forward", "backward", "both")
    calls: dict[tuple[str, str], Callable[[], Any]] = {("copy", "copy"): copy}
    for phase in phases:
        calls["ours", phase] = getattr(ours, phase)
        calls["graph", phase] = captured(ours, phase)
        calls |= {(name, phase): getattr(peer, phase) for name, peer in peers.items()}
    per_call = {key: len(data.sets) if key[0] == "graph" else 1 for key in calls}
    times = alternate(calls, rounds)
    copied = float(np.median(times["copy", "copy"]))
    for (name, phase), seconds in times.items():
        p20, median, p80 = np.percentile(seconds / per_call[name, phase], (20, 50, 80)) * 1e6
        moved = case.moved(phase) if name in ("ours", "graph") else 2 * case.nbytes if name == "copy" else 0
        share = moved / (median * 1e-6) / (2 * case.nbytes / copied) if moved else 0.0
        yield Row(case, name, phase, float(median), float(p20), float(p80), moved, float(share))


def captured(ours: Ours, phase: str) -> Callable[[], Any]:
    """Capture a phase over all buffers in a CUDA graph; return what replays it."""
    import cupy

    stream = cupy.cuda.get_current_stream()
    call, times = getattr(ours, phase), len(ours.saved)
    for _ in range(times):
        call()
    stream.synchronize()
    stream.begin_capture()
    for _ in range(times):
        call()
    graph = stream.end_capture()
    kept = list(ours.saved)  # the graph uses their memory

    def replay() -> None:
        assert kept
        graph.launch(stream)

    return replay


def alternate(
    calls: dict[tuple[str, str], Callable[[], Any]], rounds: int
) -> dict[tuple[str, str], np.ndarray]:
    """Return seconds a call takes on the device, in each round, the contenders taking turns."""
    repeats = {}
    for key, call in calls.items():
        call()
        repeats[key] = max(2, min(200, int(PATIENCE / max(1e-6, _timed(call, 3)))))
    found: dict[tuple[str, str], list[float]] = {key: [] for key in calls}
    for _ in range(rounds):
        for key, call in calls.items():
            found[key].append(_timed(call, repeats[key]))
    return {key: np.array(seconds) for key, seconds in found.items()}


def _shared(cupy: Any, stream: Any) -> Any:
    try:
        return cupy.cuda.Stream.from_external(stream)
    except (AttributeError, TypeError):  # an older CuPy, or a PyTorch whose streams do not speak its protocol
        return cupy.cuda.ExternalStream(stream.cuda_stream)


def _timed(call: Callable[[], Any], repeats: int) -> float:
    import torch

    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(repeats):
        call()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3 / repeats


def host_costs(rounds: int, repeats: int = 200) -> dict[str, float]:
    """Return microseconds of the host that a call takes, on a tensor too small to keep the device busy."""
    import torch

    data = Data(Case(TINY, "float16", False, True, False), 0)
    costs = {}
    for name, contender in (("ours", Ours(data)), ("PyTorch", Torch(data))):
        for phase in ("forward", "backward"):
            call, found = getattr(contender, phase), []
            for _ in range(max(3, rounds)):
                torch.cuda.synchronize()
                begin = time.perf_counter()
                for _ in range(repeats):
                    call()
                found.append((time.perf_counter() - begin) / repeats)
            costs[f"{name} {phase}"] = float(np.median(found)) * 1e6
    return costs


def _progress(rows: list[Row]) -> str:
    both = {row.name: row.median for row in rows if row.phase == "both"}
    return ", ".join(f"{name} {median:.0f} us" for name, median in both.items())
