"""What a call of the PyTorch layer costs on small tensors, beside torch.nn.BatchNorm2d's.

Each is checked against the other first. Contenders take turns; a time is the median of the rounds' means
over many calls. "both" is a forward and the backward of its graph.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

import sbncore as sbn
from bench import timing
from bench.cases import WrongResult
from bench.machine import machine, set_threads
from bench.options import integer
from bench.report import installed, markdown

SHAPES = [(2, 4, 2, 2), (16, 64, 7, 7), (16, 64, 14, 14)]
CALLS = 50  # of a contender in a round
TOLERANCE = 1e-4
THEIRS = "nn.BatchNorm2d"


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench overhead", description=__doc__)
    parser.add_argument("--rounds", type=integer, default=60)
    parser.add_argument("--threads", type=integer, default=1)
    options = parser.parse_args(arguments)
    if not installed("torch"):
        sys.exit("overhead needs PyTorch, which is not installed: pip install torch")
    set_threads(options.threads)
    print(machine(), "\n")
    titles = ["shape", "layer", "forward, µs", f"/ {THEIRS}", "both, µs", f"/ {THEIRS}"]
    lines = [line for shape in SHAPES for line in measured(shape, options.rounds)]
    print("\n".join(markdown(titles, lines, text=2)))


def measured(shape: tuple[int, ...], rounds: int) -> list[list[str]]:
    """Return a table's lines for one shape.

    Raises:
        WrongResult: before anything is timed.
    """
    import torch

    from sbncore.adapters.torch import SampledBatchNorm2d

    torch.manual_seed(0)
    x, dy = torch.randn(2, *shape)
    x.requires_grad_()
    fs = sbn.FeatureSampling(1 / 8, at_least=4)
    layers: dict[str, Any] = {
        THEIRS: torch.nn.BatchNorm2d(shape[1]),
        "Full()": SampledBatchNorm2d(shape[1]),
        "FeatureSampling(1/8)": SampledBatchNorm2d(shape[1], sampler=fs),
    }
    outputs = [layers[name](x) for name in (THEIRS, "Full()")]
    gradients = [torch.autograd.grad(y, x, dy)[0] for y in outputs]
    for theirs, ours in (outputs, gradients):
        if not bool((ours - theirs).abs().max() <= TOLERANCE):
            raise WrongResult(f"the layer of {shape} differs from torch's")

    def both(layer: Any) -> Any:
        return torch.autograd.grad(layer(x), (x, layer.weight, layer.bias), dy)

    contenders = {
        name: {"forward": lambda one=layer: one(x), "both": lambda one=layer: both(one)}
        for name, layer in layers.items()
    }
    times = timing.alternate(contenders, rounds, timing.repeatedly(CALLS))
    lines = []
    for name, phases in times.items():
        cells = ["×".join(map(str, shape)), name]
        for phase, seconds in phases.items():
            cells += [f"{1e3 * timing.summary(seconds)[0]:.1f}"]
            cells += [f"{timing.ratio(seconds, times[THEIRS][phase]):.2f}"]
        lines.append(cells)
    return lines
