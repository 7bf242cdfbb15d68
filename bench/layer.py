"""One BN layer on the CPU: every implementation is checked against the reference, and only then timed.

A round runs, for each contender in turn, a forward and the backward after it. Ours draws its plan in every
forward and writes into buffers used before; malloc keeps freed pages, so that PyTorch's outputs are warm
memory too. The copy is np.copyto of x's bytes into a reused buffer, on as many threads as ours.

PyTorch's OpenMP threads spin at barriers: on a quiet machine that serves it (by a quarter), on a busy one it
can cost ten times the kernel, steadily. Publish from a quiet machine, and compare with
OMP_WAIT_POLICY=passive.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import sbncore as sbn
from bench import bars, peers, report, timing
from bench.cases import TOLERANCE, Case, Data, WrongResult, verify
from bench.problems import folder_option

# Of ResNet-18 and ResNet-50 at batch 32, and a layer in 1-D and one in 3-D.
SHAPES = [
    "32x64x112x112", "32x64x56x56", "32x256x56x56", "32x128x28x28", "32x512x28x28", "32x256x14x14",
    "32x1024x14x14", "32x2048x7x7", "64x256x1024", "4x32x16x56x56",
]  # fmt: skip
QUICK = ["8x64x28x28", "8x256x7x7"]
SAMPLERS = ["full", "bs/16", "fs/16"]
ROUNDS, QUICK_ROUNDS = 31, 5
SLACK = 50  # peers may be this much less exact: NumPy adds rows in float32, one by one
BUSY = 0.25  # of the cores
SPINNING = "PyTorch's times may be far too long; compare with OMP_WAIT_POLICY=passive, or wait"
RESULTS = Path(__file__).parent / "results"

READING = """\
Ours / copy: how many times as long as copying the tensor once takes (N bytes read, N written). The least
traffic is 2N for the forward and 3N for the exact backward: 1 and 1.5 copies. Peer / ours: how many times as
fast ours is, forward and backward together where nothing else is said; the peers compute full batch
normalization, NumPy on one thread. Ours draws a new plan in every forward and writes into buffers used
before; malloc keeps freed pages, so the peers' memory is warm too. A ratio is the median over the rounds of
the ratio within a round, a time the median (20th to 80th percentile). All agreed with the float64 reference
first."""


def main(arguments: list[str]) -> None:
    options = _options(arguments)
    if options.device == "cuda":
        from bench import cuda

        sys.exit(cuda.main(options))
    if options.threads:
        sbn.set_num_threads(options.threads)
    warm = timing.keep_pages()
    where = report.machine(sbn.get_num_threads())
    print(where, file=sys.stderr)
    if float(where.load or 0) > BUSY * where.cores:
        print(f"the machine is busy (load {where.load}): {SPINNING}", file=sys.stderr)
    rows: list[report.Row] = []
    cases = [
        Case(shape, layout, options.dtype, options.activation == "relu", options.residual)
        for shape in options.shapes
        for layout in options.layouts
    ]
    try:
        for number, case in enumerate(cases, 1):
            print(f"[{number}/{len(cases)}] {case} ", end="", file=sys.stderr, flush=True)
            new = list(measure(case, options.samplers, options.rounds, options.against))
            print(_progress(new), file=sys.stderr)
            rows += new
    except WrongResult as wrong:
        sys.exit(f"\nwrong result, nothing is written: {wrong}")
    _write(options, rows, where, shlex.join(["python", "-m", "bench", "layer", *arguments]), warm)


def measure(
    case: Case, samplers: list[tuple[str, sbn.Sampler]], rounds: int, against: list[str]
) -> Iterator[report.Row]:
    """Check and time one case.

    Raises:
        WrongResult: before anything is timed.
    """
    data, threads = Data(case), sbn.get_num_threads()
    tolerance = TOLERANCE[case.dtype]
    ours = [peers.Ours(data, sampler, name) for name, sampler in samplers]
    for one in ours:
        verify(one, data, tolerance)
    others = [peers.PEERS[name](data, threads) for name in against]
    for other in others:
        verify(other, data, SLACK * tolerance)
    copy = peers.Copy(data, threads)
    contenders: dict[str, timing.Contender] = {"copy": {"copy": copy.copy}}
    for one in ours:
        contenders[one.name] = {"plan": one.plan, "forward": one.forward, "backward": one.backward}
    for other in others:
        contenders[other.name] = {"forward": other.forward, "backward": other.backward}
    times = timing.alternate(contenders, rounds)
    copy.close()
    for name, phases in times.items():
        if name == "copy":
            phases |= dict.fromkeys(report.PHASES, phases["copy"])
        else:
            phases["both"] = phases["forward"] + phases["backward"]
    for one in ours:
        mine = times[one.name]
        for peer in ("copy", *(other.name for other in others)):
            for phase in report.PHASES:
                a, b = mine[phase], times[peer][phase]
                yield report.Row(
                    "×".join(map(str, case.shape)), f"channels-{case.layout}", case.dtype,
                    "relu" if case.relu else "", "residual" if case.residual else "",
                    one.name, phase, peer, *timing.summary(a), *timing.summary(b),
                    timing.ratio(b, a), timing.shared(a, b), timing.summary(mine["plan"])[0],
                )  # fmt: skip


def _write(
    options: argparse.Namespace, rows: list[report.Row], where: report.Machine, command: str, warm: bool
) -> None:
    extras = [options.dtype] * (options.dtype != "float32") + [options.activation or ""]
    extras += ["residual"] * options.residual
    stem = "-".join(["layer-cpu", *filter(None, extras)])
    pages = "" if warm else " malloc could not be told to keep pages: PyTorch's times contain fresh ones."
    about = ", ".join(filter(None, [options.dtype, options.residual and "residual", options.activation]))
    head = [f"# One BN layer on the CPU ({about})", "", f"{where} `{command}`.{pages}", "", READING, ""]
    options.out.mkdir(parents=True, exist_ok=True)
    report.write_csv(options.out / f"{stem}.csv", rows, where)
    for name, table in ((stem, report.headline_table(rows)), (f"{stem}-long", report.long_table(rows))):
        text = "\n".join([*head, *table]) + "\n"
        (options.out / f"{name}.md").write_text(text, encoding="utf-8")
    if importlib.util.find_spec("matplotlib") is not None:
        bars.draw(options.out / f"{stem}.png", rows, str(where))
    print("\n".join(report.headline_table(rows)))
    print(f"written: {options.out / stem}.csv, .md, -long.md and, with matplotlib, .png", file=sys.stderr)


def _progress(rows: list[report.Row]) -> str:
    last = [row for row in rows if row.sampler == rows[-1].sampler and row.phase == "both"]
    found = [f"{row.peer} {row.peer_median:.1f} ms" for row in last]
    return f"ours {last[0].ours_median:.1f} ms, {', '.join(found)}"


def _options(arguments: list[str]) -> argparse.Namespace:
    about = "One BN layer: checked, then timed."
    parser = argparse.ArgumentParser(prog="python -m bench layer", description=about)
    parser.add_argument("--shapes", nargs="+", type=_shape, metavar="32x64x56x56")
    parser.add_argument("--layouts", nargs="+", choices=("first", "last"), default=["first", "last"])
    parser.add_argument(
        "--against", type=_against, metavar="numpy,torch,compile,jax,copy",
        help="peers; copy is always one; default: numpy, and torch if it is installed",
    )  # fmt: skip
    parser.add_argument(
        "--samplers", nargs="+", type=_sampler, metavar="fs/16",
        help="full, bs/K (whole samples) or fs/K (feature maps), of which 1/K is drawn",
    )  # fmt: skip
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=tuple(TOLERANCE), help="default: float32")
    parser.add_argument(
        "--dtypes", nargs="+", choices=("float16", "bfloat16", "float32"), help="on a GPU"
    )
    parser.add_argument("--activation", choices=("relu",))
    parser.add_argument("--residual", action="store_true")
    parser.add_argument("--rounds", type=_positive)
    parser.add_argument("--threads", type=_positive, help="default: all cores")
    parser.add_argument("--out", type=folder_option, default=RESULTS)
    parser.add_argument(
        "--budget", type=float, help="seconds, on a GPU: what is not begun by then is left out; default: 300"
    )
    parser.add_argument("--quick", action="store_true", help="few shapes, few rounds")
    options = parser.parse_args(arguments)
    if options.device == "cuda":
        return _on_a_gpu(parser, options)
    for name in ("dtypes", "budget"):
        if getattr(options, name) is not None:
            parser.error(f"--{name} needs --device cuda")
    options.dtype = options.dtype or "float32"
    options.samplers = options.samplers or [*map(_sampler, SAMPLERS)]
    if options.dtype == "bfloat16" and importlib.util.find_spec("ml_dtypes") is None:
        parser.error("bfloat16 needs the package ml_dtypes: NumPy has no such type")
    options.shapes = options.shapes or [*map(_shape, QUICK if options.quick else SHAPES)]
    options.rounds = options.rounds or (QUICK_ROUNDS if options.quick else ROUNDS)
    if options.against is None:
        options.against = ["numpy", "torch"]
        if peers.torch_version() is None:
            options.against.remove("torch")
            print("PyTorch is not installed: no column of its", file=sys.stderr)
    for name in options.against:
        if importlib.util.find_spec(peers.NEEDS.get(name, "numpy")) is None:
            parser.error(f"--against {name} needs the package {peers.NEEDS[name]}, which is not installed")
    return options


def _on_a_gpu(parser: argparse.ArgumentParser, options: argparse.Namespace) -> argparse.Namespace:
    for name in ("samplers", "activation", "residual", "threads", "against"):
        if getattr(options, name):
            parser.error(f"--{name} is not for --device cuda, which times every variant of one sampler")
    if options.dtype == "float64":
        parser.error("expected --dtypes of float16, bfloat16 and float32, got float64")
    if any(len(shape) != 4 for shape in options.shapes or ()):
        parser.error("expected shapes NxCxHxW for --device cuda")
    options.dtypes = options.dtypes or ([options.dtype] if options.dtype else None)
    return options


def _against(text: str) -> list[str]:
    names = text.split(",")
    wrong = [name for name in names if name not in (*peers.PEERS, "copy")]
    if wrong:
        raise argparse.ArgumentTypeError(f"expected some of {', '.join(peers.PEERS)}, copy, got {wrong[0]!r}")
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
    kinds = {"bs": sbn.BatchSampling, "fs": sbn.FeatureSampling}
    if kind not in kinds or not divisor.isdigit() or int(divisor) < 1:
        raise argparse.ArgumentTypeError(f"expected full, bs/K or fs/K, got {text!r}")
    return f"{kinds[kind].__name__}(1/{divisor})", kinds[kind](1 / int(divisor))


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a positive integer, got {text!r}")
    return int(text)
