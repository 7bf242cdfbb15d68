"""What starting costs on the CPU: imports, and first calls, which compile kernels or find them compiled.

Every figure is of new processes over a copy of the package. A call is a forward, its plan drawn, and the
backward; in inference `sbn.batch_norm` alone. The first also imports the engine. A wheel holds the kernels
for this kind of CPU (`make wheel`); a checkout's are compiled by the first process (cold) and kept for the
others (warm). The second call is that of a warm process. All results agreed with the float64 reference.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

from tqdm import tqdm

import sbncore as sbn
from bench import cases, report
from bench.contenders import Contender, Inference, Ours
from bench.machine import machine
from bench.options import parser
from sbncore.cpu import kernels

ROOT = Path(__file__).parents[1]
RUNS = 5  # processes that a figure is the median of; cold, one
IMPORTS = ("numpy", "sbncore", "numba", "sbncore.cpu.call")
IMPORT = """
import sys, time
begin = time.perf_counter()
import {}
print(time.perf_counter() - begin, "numba" in sys.modules)
"""
CALLS = "from bench.start import calls; calls({!r}, {!r})"
MAPS = (16, 64, 28, 28)
OPTIONS = {
    "plain": cases.Case(MAPS),
    "ReLU": cases.Case(MAPS, relu=True),
    "residual + ReLU": cases.Case(MAPS, relu=True, residual=True),
    "float16": cases.Case(MAPS, dtype="float16"),
    "7×7 maps": cases.Case((16, 64, 7, 7)),
    "inference": cases.Case(MAPS),
}
EVERY = [(layout, option) for layout in ("first", "last") for option in OPTIONS]
QUICK = [("last", "inference"), ("first", "7×7 maps")]


def main(arguments: list[str]) -> None:
    options = parser("start", __doc__, "two cases, every figure of one process").parse_args(arguments)
    chosen, runs = (QUICK, 1) if options.quick else (EVERY, RUNS)
    where = machine()
    steps = len(IMPORTS) * runs + len(chosen) * (1 + 2 * runs) + 1
    with TemporaryDirectory() as place, tqdm(total=steps) as bar:
        fresh = Fresh(Path(place), bar)
        tables = [*imports(fresh, runs), "", *first_calls(fresh, chosen, runs)]
    lines = [report.about(where, "start", arguments), "", str(__doc__), *tables]
    report.publish(options.out, "start-cpu", "Starting on the CPU", lines, where)


class Fresh:
    """New processes over two copies of the package, a checkout's and a wheel's."""

    def __init__(self, folder: Path, bar: tqdm) -> None:
        self.folder, self.bar = folder, bar
        self.objects = folder / "wheel" / "sbncore" / "cpu" / "objects"
        for copy in ("checkout", "wheel"):
            ignored = shutil.ignore_patterns("__pycache__", "objects")
            shutil.copytree(Path(sbn.__file__).parent, folder / copy / "sbncore", ignore=ignored)

    def run(self, code: str, copy: str, cache: str, label: str) -> list[str]:
        """Return the words that code printed, its kernels kept in that folder."""
        changed = {"SBNCORE_CACHE_DIR": str(self.folder / cache)}
        changed["PYTHONPATH"] = os.pathsep.join([str(self.folder / copy), str(ROOT)])
        if copy == "checkout":  # compiles what a wheel for this CPU holds
            changed["NUMBA_CPU_NAME"] = kind_of_cpu()
        done = subprocess.run(
            [sys.executable, "-c", code],
            cwd=self.folder,
            env=os.environ | changed,
            capture_output=True,
            text=True,
        )
        if done.returncode:
            sys.exit(f"{label}: failed, nothing is written\n{done.stderr}")
        self.bar.set_description(label, refresh=False)
        self.bar.update()
        return done.stdout.split()

    def compiled(self, cache: str) -> int:
        """Return how many functions have been compiled into a cache."""
        return sum(1 for _ in (self.folder / cache).rglob("*.o"))

    def ship(self, cache: str) -> None:
        """Put what a cache holds into the wheel."""
        shutil.copytree(self.folder / cache, self.objects, dirs_exist_ok=True)


def kind_of_cpu() -> str:
    """Return the best kind that a wheel has kernels for, or this CPU itself."""
    name, features = kernels.cpu()
    return next((level for level, needed in kernels.LEVELS.items() if kernels.has(features, needed)), name)


def imports(fresh: Fresh, runs: int) -> list[str]:
    """Return the table of imports."""
    lines = []
    for name in IMPORTS:
        code, place, label = IMPORT.format(name), f"imports/{name}", f"import {name}"
        told = [fresh.run(code, "wheel", place, label) for _ in range(runs)]
        seconds = median(float(each[0]) for each in told)
        lines.append([f"`import {name}`", told[0][1], f"{seconds:.2f}", str(fresh.compiled(place))])
    return report.markdown(["", "Numba is loaded", "seconds", "functions compiled"], lines, text=2)


def first_calls(fresh: Fresh, chosen: list[tuple[str, str]], runs: int) -> list[str]:
    """Return the table of calls; its last line is one for which there is no place to write a cache."""
    titles = ["layout", "option", "wheel, s", "checkout cold, s", "functions compiled", "checkout warm, s"]
    lines = []
    for layout, option in chosen:
        code, label = CALLS.format(layout, option), f"channels-{layout}, {option}"
        cold, *warm = (fresh.run(code, "checkout", label, label) for _ in range(1 + runs))
        compiled = fresh.compiled(label)
        fresh.ship(label)
        wheel = [fresh.run(code, "wheel", "wheel's cache", label) for _ in range(runs)]
        if fresh.compiled("wheel's cache"):
            sys.exit(f"{label}: failed, the wheel's kernels were compiled anew")
        first, again, second = (
            median(float(each[k]) for each in told) for told, k in ((wheel, 0), (warm, 0), (warm, 1))
        )
        cells = [f"{first:.2f}", f"{float(cold[0]):.2f}", compiled, f"{again:.2f}", f"{1e3 * second:.2f}"]
        warned = max(int(each[2]) for each in (cold, *warm, *wheel))
        lines.append([f"channels-{layout}", option, *cells, warned])
    layout, option = chosen[0]
    (fresh.folder / "file").touch()  # below a plain file nothing can be made, even by root
    told = fresh.run(CALLS.format(layout, option), "checkout", "file/cache", "no cache")
    cells = ["", f"{float(told[0]):.2f}", "", "", f"{1e3 * float(told[1]):.2f}", told[2]]
    lines.append([f"channels-{layout}", f"{option}, no writable cache", *cells])
    return report.markdown([*titles, "second call, ms", "warnings"], lines, text=2)


def calls(layout: str, option: str) -> None:
    """Print, in a new process, two calls' seconds and the number of warnings, and judge.

    Raises:
        WrongResult: if the result differs from the reference.
    """
    data, sampler = cases.Data(replace(OPTIONS[option], layout=layout)), sbn.FeatureSampling(1 / 16)
    one: Contender = Inference(data) if option == "inference" else Ours(data, sampler, option)
    seconds = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            begin = time.perf_counter()
            one.forward()
            one.backward()
            seconds.append(time.perf_counter() - begin)
    print(*seconds, len(caught))
    cases.verify(one)
