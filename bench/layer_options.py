"""What `python -m bench layer` takes: shapes, samplers, peers; the defaults of each device."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable
from pathlib import Path

import sbncore as sbn
from bench.cases import ITEMSIZE, SAMPLED
from bench.options import integer, parser
from bench.peers import PEERS
from bench.report import installed

# Of ResNet-18 and ResNet-50 at batch 32, and a layer in 1-D and one in 3-D.
SHAPES = [
    "32x64x112x112", "32x64x56x56", "32x256x56x56", "32x128x28x28", "32x512x28x28", "32x256x14x14",
    "32x1024x14x14", "32x2048x7x7", "64x256x1024", "4x32x16x56x56",
]  # fmt: skip
QUICK = ["8x64x28x28", "8x256x7x7"]
ROUNDS, QUICK_ROUNDS = 31, 5
MAPS = [
    (64, 112), (64, 56), (256, 56), (128, 56), (128, 28), (512, 28), (256, 28), (256, 14), (1024, 14),
    (512, 14), (512, 7), (2048, 7),
]  # fmt: skip
GPU_SHAPES = [f"{N}x{C}x{side}x{side}" for N in (256, 32) for C, side in MAPS] + ["256x64x32x32"]
GPU_QUICK = ["256x64x56x56", "256x64x32x32", "32x64x56x56"]
GPU_DTYPES = ("float16", "bfloat16", "float32")
VARIANTS = [(False, False), (True, False), (True, True)]  # ReLU, residual
BUDGET, QUICK_BUDGET = 300.0, 40.0  # seconds
RESULTS = Path(__file__).parent / "results"


def parsed(arguments: list[str]) -> argparse.Namespace:
    one = parser("layer", "One BN layer: checked, then timed.", "few shapes, few rounds", RESULTS)
    add = one.add_argument
    add("--shapes", nargs="+", type=_shape, metavar="32x64x56x56")
    add("--layouts", nargs="+", choices=("first", "last"), default=["first", "last"])
    add(
        "--against",
        type=_against,
        metavar="numpy,torch,compile,jax,jax-sampled,copy",
        help="peers; copy is always one; default: numpy, and torch if it is installed",
    )
    add(
        "--samplers",
        nargs="+",
        type=_sampler,
        metavar="fs/16",
        help="full, bs/K (whole samples) or fs/K (feature maps), of which 1/K is drawn",
    )
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--dtype", choices=tuple(ITEMSIZE), help="default: float32")
    add("--dtypes", nargs="+", choices=GPU_DTYPES, help="on a GPU")
    add("--activation", choices=("relu",))
    add("--residual", action="store_true")
    add("--rounds", type=integer)
    add("--threads", type=integer, help="default: all cores")
    add("--budget", type=float, help="seconds, on a GPU: what is not begun by then is left out; default: 300")
    options = one.parse_args(arguments)
    (_on_the_cpu if options.device == "cpu" else _on_a_gpu)(one, options)
    return options


def _on_the_cpu(one: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    for name in ("dtypes", "budget"):
        if getattr(options, name) is not None:
            one.error(f"--{name} needs --device cuda")
    options.budget = math.inf
    options.dtypes = [options.dtype or "float32"]
    if options.dtype == "bfloat16" and not installed("ml_dtypes"):
        one.error("bfloat16 needs the package ml_dtypes: NumPy has no such type")
    options.variants = [(options.activation == "relu", options.residual)]
    options.samplers = options.samplers or [_sampler(name) for name in ("full", "bs/16", "fs/16")]
    options.shapes = options.shapes or [_shape(text) for text in (QUICK if options.quick else SHAPES)]
    options.rounds = options.rounds or (QUICK_ROUNDS if options.quick else ROUNDS)
    if options.against is None:
        options.against = ["numpy", "torch"] if installed("torch") else ["numpy"]
        if not installed("torch"):
            print("PyTorch is not installed: no column of its", file=sys.stderr)
    for name in options.against:
        if not installed(PEERS[name].needs):
            one.error(f"--against {name} needs the package {PEERS[name].needs}, which is not installed")


def _on_a_gpu(one: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    for name in ("samplers", "activation", "residual", "threads", "against"):
        if getattr(options, name):
            one.error(f"--{name} is not for --device cuda, which times every variant of one sampler")
    if options.dtype == "float64":
        one.error("expected --dtypes of float16, bfloat16 and float32, got float64")
    if any(len(shape) != 4 for shape in options.shapes or ()):
        one.error("expected shapes NxCxHxW for --device cuda")
    chosen = [options.dtype] if options.dtype else ["float16"] if options.quick else list(GPU_DTYPES)
    options.dtypes = options.dtypes or chosen
    options.variants, options.against = VARIANTS, ["torch"]
    options.samplers = [_sampler(f"fs/{round(1 / SAMPLED)}")]
    options.shapes = options.shapes or [_shape(text) for text in (GPU_QUICK if options.quick else GPU_SHAPES)]
    options.budget = options.budget or (QUICK_BUDGET if options.quick else BUDGET)


def _against(text: str) -> list[str]:
    names = text.split(",")
    wrong = [name for name in names if name not in (*PEERS, "copy")]
    if wrong:
        raise argparse.ArgumentTypeError(f"expected some of {', '.join(PEERS)}, copy, got {wrong[0]!r}")
    return [name for name in dict.fromkeys(names) if name != "copy"]


def _shape(text: str) -> tuple[int, ...]:
    shape = tuple(int(size) for size in text.split("x"))
    if len(shape) < 3 or min(shape) < 1 or math.prod(shape[2:]) < 2:
        raise argparse.ArgumentTypeError(f"expected NxCx and spatial sizes, as in 32x64x56x56, got {text!r}")
    return shape


def _sampler(text: str) -> tuple[str, sbn.Sampler]:
    kind, _, divisor = text.partition("/")
    if kind == "full" and not divisor:
        return "Full()", sbn.Full()
    kinds: dict[str, Callable[[float], sbn.Sampler]] = {"bs": sbn.BatchSampling, "fs": sbn.FeatureSampling}
    if kind not in kinds or not divisor.isdigit() or int(divisor) < 1:
        raise argparse.ArgumentTypeError(f"expected full, bs/K or fs/K, got {text!r}")
    return f"{kinds[kind].__name__}(1/{divisor})", kinds[kind](1 / int(divisor))
