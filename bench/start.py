"""What starting costs on the CPU: imports, and first calls, which compile kernels or find them compiled.

Every figure is of new processes over a copy of the package. A call is a forward, its plan drawn, and the
backward; in inference `sbn.batch_norm` alone. The first also imports Numba and the engine. It is cold where
the kernels' cache is empty, and warm where another process filled it; the second is that of a warm process.
All results agreed with the float64 reference.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
import warnings
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import numpy as np

import sbncore as sbn
from bench import cases, peers, report
from bench.problems import folder_option
from bench.progress import Progress

ROOT = Path(__file__).parents[1]
RUNS = 5  # processes that a figure is the median of; cold, one
IMPORTS = ("numpy", "sbncore", "numba", "sbncore.cpu.phases")
IMPORT = """
import sys, time
begin = time.perf_counter()
import {}
print(time.perf_counter() - begin, "numba" in sys.modules)
"""
CALLS = "from bench.start import calls; calls({!r}, {!r})"
OPTIONS = {  # name: (shape, dtype, ReLU, residual)
    "plain": ((16, 64, 28, 28), "float32", False, False),
    "ReLU": ((16, 64, 28, 28), "float32", True, False),
    "residual + ReLU": ((16, 64, 28, 28), "float32", True, True),
    "float16": ((16, 64, 28, 28), "float16", False, False),
    "7×7 maps": ((16, 64, 7, 7), "float32", False, False),
    "inference": ((16, 64, 28, 28), "float32", False, False),
}
EVERY = [(layout, option) for layout in ("first", "last") for option in OPTIONS]
QUICK = [("last", "inference"), ("first", "7×7 maps")]


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench start", description=__doc__)
    parser.add_argument("--out", type=folder_option, metavar="FOLDER", help="for start-cpu.md")
    parser.add_argument("--quick", action="store_true", help="two cases, every figure of one process")
    options = parser.parse_args(arguments)
    chosen, runs = (QUICK, 1) if options.quick else (EVERY, RUNS)
    where, command = report.machine(sbn.get_num_threads()), " ".join(["python -m bench start", *arguments])
    with TemporaryDirectory() as folder:
        fresh = Fresh(Path(folder), Progress((len(IMPORTS) + len(chosen)) * runs + len(chosen) + 1))
        tables = [*imports(fresh, runs), "", *first_calls(fresh, chosen, runs)]
    lines = ["# Starting on the CPU", "", f"{where} `{command}`.", "", str(__doc__).strip(), "", *tables]
    print("\n".join(lines))
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "start-cpu.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


class Fresh:
    """New processes over a copy of the package, which nobody changes between them."""

    def __init__(self, folder: Path, progress: Progress) -> None:
        self.folder, self.progress, self.package = folder, progress, folder / "sbncore"
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(Path(sbn.__file__).parent, self.package, ignore=ignored)

    def run(self, code: str, cache: str, label: str) -> list[str]:
        """Return the words that code printed, its kernels cached in that folder."""
        place = str(self.folder / cache)
        changed = {"SBNCORE_CACHE_DIR": place}
        changed["PYTHONPATH"] = os.pathsep.join([str(self.folder), str(ROOT)])
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=self.folder, env=os.environ | changed, capture_output=True,
            text=True,
        )  # fmt: skip
        if done.returncode:
            sys.exit(f"{label}: failed, nothing is written\n{done.stderr}")
        self.progress.step(label)
        return done.stdout.split()

    def block(self) -> str:
        """Return a place for a cache that cannot be made: below a plain file, even by root."""
        (self.folder / "file").touch()
        return "file/cache"


def imports(fresh: Fresh, runs: int) -> list[str]:
    """Return the table of imports."""
    lines = []
    for name in IMPORTS:
        told = [fresh.run(IMPORT.format(name), f"imports/{name}", f"import {name}") for _ in range(runs)]
        cached = sum(1 for _ in (fresh.folder / "imports" / name).rglob("*.o"))
        seconds = median(float(each[0]) for each in told)
        lines.append([f"`import {name}`", told[0][1], f"{seconds:.2f}", str(cached)])
    return report.markdown(["", "Numba is loaded", "seconds", "kernels compiled"], lines, text=2)


def first_calls(fresh: Fresh, chosen: list[tuple[str, str]], runs: int) -> list[str]:
    """Return the table of calls; its last line is one for which there is no place to write a cache."""
    titles = ["layout", "option", "cold, s", "kernels compiled", "warm, s", "kernels compiled"]
    lines = []
    for layout, option in chosen:
        code, label = CALLS.format(layout, option), f"channels-{layout}, {option}"
        cold, *warm = (fresh.run(code, label, label) for _ in range(1 + runs))
        again, second = (median(float(each[k]) for each in warm) for k in (0, 1))
        cells = [f"{float(cold[0]):.2f}", cold[2], f"{again:.2f}", warm[0][2], f"{1e3 * second:.2f}"]
        lines.append([f"channels-{layout}", option, *cells, str(max(int(each[3]) for each in (cold, *warm)))])
    layout, option = chosen[0]
    told = fresh.run(CALLS.format(layout, option), fresh.block(), "no cache")
    cells = [f"{float(told[0]):.2f}", told[2], "", "", f"{1e3 * float(told[1]):.2f}", told[3]]
    lines.append([f"channels-{layout}", f"{option}, no writable cache", *cells])
    return report.markdown([*titles, "second call, ms", "warnings"], lines, text=2)


def calls(layout: str, option: str) -> None:
    """Print, in a new process, two calls' seconds, the kernels compiled and the warnings, and judge.

    Raises:
        WrongResult: if the result differs from the reference.
    """
    data = cases.Data(cases.Case(OPTIONS[option][0], layout, *OPTIONS[option][1:]))
    one = (Inference if option == "inference" else peers.Ours)(data, sbn.FeatureSampling(1 / 16), option)
    seconds = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            begin = time.perf_counter()
            one.forward()
            one.backward()
            seconds.append(time.perf_counter() - begin)
    print(*seconds, compiled(), len(caught))
    cases.verify(one, data, cases.TOLERANCE[data.case.dtype])


class Inference(peers.Ours):
    """Normalization by given statistics: the batch's own, so that the reference can judge y."""

    grads = sbn.Grads(None, None, None, None)

    def __init__(self, data: cases.Data, sampler: sbn.Sampler, name: str) -> None:
        super().__init__(data, sampler, name)
        self.mean, self.var = data.x.mean((0, 2, 3)), data.x.var((0, 2, 3))

    def forward(self) -> None:
        data, given = self.data, (self.mean, self.var, self.data.weight, self.data.bias)
        self.y, _ = sbn.batch_norm(data.x, *given, training=False, eps=cases.EPS, out=data.y)

    def backward(self) -> None:
        pass

    def weights(self) -> np.ndarray:
        return sbn.Full().plan(self.data.case.shape).weights()


def compiled() -> int:
    """Return how many kernels this process compiled."""
    from sbncore.cpu import kernels

    return len(kernels.compiled)
