"""What a call of the PyTorch layer costs on small tensors, beside torch.nn.BatchNorm2d's.

Each is checked against the other first. Contenders take turns; a time is the median of the rounds' means
over many calls. "both" is a forward and the backward of its graph.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any

import sbncore as sbn
from bench import timing
from bench.cases import WrongResult
from bench.report import machine

SHAPES = [(2, 4, 2, 2), (16, 64, 7, 7), (16, 64, 14, 14)]
CALLS = 50  # of a contender in a round
TOLERANCE = 1e-4


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench overhead", description=__doc__)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(arguments)
    if options.rounds < 1 or options.threads < 1:
        parser.error("--rounds, --threads: expected at least 1")
    try:
        import torch
    except ImportError:
        sys.exit("overhead needs PyTorch, which is not installed: pip install torch")
    torch.set_num_threads(options.threads)
    sbn.set_num_threads(options.threads)
    print(machine(options.threads), "\n")
    print("| shape | layer | forward, µs | / nn.BatchNorm2d | both, µs | / nn.BatchNorm2d |")
    print("| --- | --- | ---: | ---: | ---: | ---: |")
    for shape in SHAPES:
        for line in measured(shape, options.rounds):
            print(line)


def measured(shape: tuple[int, ...], rounds: int) -> list[str]:
    """Return a table's lines for one shape.

    Raises:
        WrongResult: before anything is timed.
    """
    import torch

    from sbncore.adapters.torch import SampledBatchNorm2d

    torch.manual_seed(0)
    x, dy = torch.randn(2, *shape)
    x.requires_grad_()
    fs = SampledBatchNorm2d(shape[1], sampler=sbn.FeatureSampling(1 / 8, at_least=4))
    layers: dict[str, torch.nn.Module] = {
        "nn.BatchNorm2d": torch.nn.BatchNorm2d(shape[1]),
        "Full()": SampledBatchNorm2d(shape[1]),
        "FeatureSampling(1/8)": fs,
    }
    outputs = [layers[name](x) for name in ("nn.BatchNorm2d", "Full()")]
    gradients = [torch.autograd.grad(y, x, dy)[0] for y in outputs]
    for mine, true in (outputs[::-1], gradients[::-1]):
        if not bool((mine - true).abs().max() <= TOLERANCE):
            raise WrongResult(f"the layer of {shape} differs from torch's")

    def repeated(call: Callable[[], Any]) -> Callable[[], None]:
        def run() -> None:
            for _ in range(CALLS):
                call()

        return run

    contenders = {
        name: {
            "forward": repeated(lambda layer=layer: layer(x)),  # type: ignore[misc]
            "both": repeated(
                lambda layer=layer: torch.autograd.grad(layer(x), (x, layer.weight, layer.bias), dy)  # type: ignore[misc]
            ),
        }
        for name, layer in layers.items()
    }
    times = timing.alternate(contenders, rounds)
    lines = []
    for name in layers:
        cells = ["×".join(map(str, shape)), name]
        for phase in ("forward", "both"):
            median = timing.summary(times[name][phase])[0]
            share = timing.ratio(times[name][phase], times["nn.BatchNorm2d"][phase])
            cells += [f"{1e3 * median / CALLS:.1f}", f"{share:.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return lines
