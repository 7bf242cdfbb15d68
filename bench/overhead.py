"""What a call costs besides its kernels: small arrays, one thread, caches warm.

A layer of PyTorch beside torch.nn.BatchNorm2d, and beside an autograd.Function of as many arguments that
copies its input: what autograd charges any function that is written in Python. NumPy's calls with
and without their kernels. A GPU's call from the filled-in addresses to the driver, which is stubbed. And the
functions of the package that have x in their hands, from the public one to the kernel.

Layers are checked against torch's first. Contenders take turns; a time is the median of the rounds' means
over many calls. "both" is a forward and the backward of its graph.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from types import FrameType
from typing import Any
from unittest import mock

import numpy as np

import sbncore as sbn
from bench import timing
from bench.cases import WrongResult
from bench.machine import machine, set_threads
from bench.options import integer
from bench.report import installed, markdown
from sbncore.arrays import address
from sbncore.cuda import call as cuda
from sbncore.cuda import driver
from sbncore.cuda.driver import Launch
from sbncore.layout import Layout
from sbncore.signature import Pointers, Scalars, Signature

SHAPES = [(2, 4, 2, 2), (16, 64, 7, 7), (8, 32, 10, 10), (2, 2048, 2, 2)]
NUMPYS = (16, 64, 7, 7)
GPUS = (32, 64, 56, 56)
CALLS = 50  # of a contender in a round
TOLERANCE = 1e-4
SAMPLER = sbn.FeatureSampling(1 / 8, at_least=4)
THEIRS = "nn.BatchNorm2d"


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench overhead", description=__doc__)
    parser.add_argument("--rounds", type=integer, default=60)
    parser.add_argument("--threads", type=integer, default=1)
    options = parser.parse_args(arguments)
    if not installed("torch"):
        sys.exit("overhead needs PyTorch, which is not installed: pip install torch")
    set_threads(options.threads)
    timing.keep_pages()
    print(machine(), "\n")
    titles = ["shape", "layer", "forward, µs", f"/ {THEIRS}", "both, µs", f"/ {THEIRS}"]
    lines = [line for shape in SHAPES for line in of_layers(shape, options.rounds)]
    print("\n".join(markdown(titles, lines, text=2)), "\n")
    titles = ["call", "direction", "µs", "µs without the kernels"]
    lines = of_numpy(options.rounds) + of_gpu(options.rounds)
    print("\n".join(markdown(titles, lines, text=2)), "\n")
    found = stays()
    print(f"x is in the hands of {len(found)} functions in {len({file for file, _ in found})} files:")
    print(", ".join(f"{file} {name}" for file, name in found))


def microseconds(seconds: np.ndarray) -> str:
    return f"{1e3 * timing.summary(seconds)[0]:.1f}"


def of_layers(shape: tuple[int, ...], rounds: int) -> list[list[str]]:
    """Return a table's lines for the layers at one shape.

    Raises:
        WrongResult: before anything is timed.
    """
    import torch

    from sbncore.adapters.torch import SampledBatchNorm2d

    torch.manual_seed(0)
    x, dy = torch.randn(2, *shape)
    x.requires_grad_()
    layers: dict[str, Any] = {
        THEIRS: torch.nn.BatchNorm2d(shape[1]),
        "Full()": SampledBatchNorm2d(shape[1]),
        "FeatureSampling(1/8)": SampledBatchNorm2d(shape[1], sampler=SAMPLER),
    }
    outputs = [layers[name](x) for name in (THEIRS, "Full()")]
    gradients = [torch.autograd.grad(y, x, dy)[0] for y in outputs]
    for theirs, ours in (outputs, gradients):
        if not bool((ours - theirs).abs().max() <= TOLERANCE):
            raise WrongResult(f"the layer of {shape} differs from torch's")

    def both(layer: Any) -> Any:
        return torch.autograd.grad(layer(x), (x, layer.weight, layer.bias), dy)

    layers["a function that copies"] = copying(shape[1])
    contenders = {
        name: {"forward": lambda one=layer: one(x), "both": lambda one=layer: both(one)}
        for name, layer in layers.items()
    }
    times = timing.alternate(contenders, rounds, timing.repeatedly(CALLS))
    lines = []
    for name, phases in times.items():
        cells = ["×".join(map(str, shape)), name]
        for phase, seconds in phases.items():
            cells += [microseconds(seconds), f"{timing.ratio(seconds, times[THEIRS][phase]):.2f}"]
        lines.append(cells)
    return lines


def copying(channels: int) -> Any:
    """Return a layer that does nothing, by as many arguments as ours: autograd's own cost."""
    import torch

    class Copy(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Any, weight: Any, bias: Any, *_: Any) -> Any:
            ctx.save_for_backward(x, weight, bias)
            return x.clone()

        @staticmethod
        def backward(ctx: Any, dy: Any) -> Any:
            _, weight, bias = ctx.saved_tensors
            return dy, weight, bias, *[None] * 6

    class Layer(torch.nn.BatchNorm2d):
        def forward(self, x: Any) -> Any:
            return Copy.apply(x, self.weight, self.bias, *[None] * 6)

    return Layer(channels)


def of_numpy(rounds: int) -> list[list[str]]:
    """Return the lines of NumPy's calls: with their kernels, and without."""
    from sbncore.cpu import threads

    x = np.random.default_rng(0).normal(size=NUMPYS).astype(np.float32)
    plan, run = SAMPLER.plan(x.shape), threads.run
    _, saved = sbn.forward(x, plan=plan)
    calls: dict[str, timing.Call] = {
        "forward": lambda: sbn.forward(x, plan=plan),
        "backward": lambda: sbn.backward(x, saved),
    }

    def without_kernel(call: timing.Call) -> timing.Call:
        def called() -> None:
            threads.run = lambda *_: None
            call()
            threads.run = run

        return called

    contenders: dict[str, timing.Phases] = {
        name: {"with": call, "without": without_kernel(call)} for name, call in calls.items()
    }
    times = timing.alternate(contenders, rounds, timing.repeatedly(CALLS))
    call = f"NumPy, {'×'.join(map(str, NUMPYS))}"
    return [[call, name, *(microseconds(each) for each in phases.values())] for name, phases in times.items()]


class Device:
    """A GPU whose driver launches nothing."""

    multiprocessors = 132

    def launch(self, launches: list[Launch], record: bytes, stream: int | None = None) -> None:
        launch = driver.launcher(record, 0, overlap=True)
        for _, grid, threads in launches:
            launch(1, grid, threads)


def of_gpu(rounds: int) -> list[list[str]]:
    """Return the lines of a GPU's calls, with launches stubbed."""
    plan, lines = SAMPLER.plan(GPUS, step=1), []
    signature = Signature(Layout(GPUS, 1, False), "float16", 0, plan.recipe, relu=True, residual=False)
    library = mock.Mock(cuLaunchKernelEx=lambda *_: 0)
    with (
        mock.patch.object(cuda, "device_at", lambda index: Device()),
        mock.patch.object(driver, "_library", lambda: library),
    ):
        call, scalars = cuda.Call(signature), Scalars(1e-5)
        at = Pointers(y=1 << 20, dx=1 << 21, x=1 << 22, dy=1 << 23, state=1 << 24, memory=1 << 25)
        contenders: dict[str, timing.Phases] = {
            "forward": {"": lambda: call.forward(at, plan.draw, scalars)},
            "backward": {"": lambda: call.backward(at, plan.draw, "exact")},
        }
        times = timing.alternate(contenders, rounds, timing.repeatedly(CALLS))
    for name, phases in times.items():
        lines.append(["a GPU's, addresses to launch", name, "", microseconds(phases[""])])
    return lines


def stays() -> list[tuple[str, str]]:
    """Return the functions, by file and name, that have x in their hands in a forward that was made before.

    x itself, a view of its memory, or its address; methods of a NamedTuple's and comprehensions count.
    """
    x = np.ones((16, 64, 7, 7), np.float32)
    found: list[tuple[str, str]]
    plan, begin, found = SAMPLER.plan(x.shape), address(x), []

    def holds(value: Any) -> bool:
        if isinstance(value, np.ndarray):
            return bool(value.size) and address(value) == begin
        if isinstance(value, tuple):
            return any(map(holds, value))
        return isinstance(value, int) and value == begin

    def entered(frame: FrameType, event: str, _: Any) -> None:
        file = Path(frame.f_code.co_filename)
        if event == "call" and "sbncore" in file.parts[-3:] and any(map(holds, frame.f_locals.values())):
            found.append((file.name, frame.f_code.co_name))

    sbn.forward(x, plan=plan)
    sys.setprofile(entered)
    try:
        sbn.forward(x, plan=plan)
    finally:
        sys.setprofile(None)
    return found
