"""Where a benchmark ran: what a time depends on besides the code."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from threadpoolctl import threadpool_limits

import sbncore as sbn

BUSY = 0.25  # of the cores
PACKAGES = {"NumPy": "numpy", "Numba": "numba", "PyTorch": "torch"}


@dataclass(frozen=True)
class Machine:
    cpu: str
    cores: int
    threads: int
    openmp: str  # how its threads wait, OMP_WAIT_POLICY: it decides how PyTorch fares on a busy machine
    load: str  # of the last minute, before the run
    date: str
    versions: str
    commit: str
    gpu: str = ""
    driver: str = ""

    def __str__(self) -> str:
        gpu = f"{self.gpu}, driver {self.driver}; " if self.gpu else ""
        busy = f", load {self.load} before the run" if self.load else ""
        used = f"{self.cores} cores, {self.threads} threads used, OpenMP waits {self.openmp}{busy}"
        return f"{gpu}{self.cpu}, {used}. {self.versions}. Commit {self.commit}, {self.date}."


def machine(gpu: str = "", more_versions: Sequence[str] = ()) -> Machine:
    """Return this machine, with a GPU of that name; say so on standard error if it is busy."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    if load is not None and load > BUSY * cores:
        advice = "PyTorch's times may be far too long; compare with OMP_WAIT_POLICY=passive, or wait"
        print(f"the machine is busy (load {load:.1f}): {advice}", file=sys.stderr)
    versions = [f"Python {platform.python_version()}", f"sbncore {sbn.__version__}"]
    versions += [f"{name} {_version(package)}" for name, package in PACKAGES.items()]
    return Machine(
        _cpu(),
        cores,
        sbn.get_num_threads(),
        os.environ.get("OMP_WAIT_POLICY", "by default"),
        "" if load is None else f"{load:.1f}",
        datetime.date.today().isoformat(),
        ", ".join([*versions, *more_versions]),
        _printed("git", "describe", "--always", "--dirty", "--exclude=*"),
        gpu,
        _printed("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if gpu else "",
    )


def set_threads(count: int) -> None:
    """Have sbncore, PyTorch and every other OpenMP and BLAS library that is loaded use so many."""
    with suppress(ImportError):
        import torch  # noqa: F401  (only the threads of what is loaded can be set)
    sbn.set_num_threads(count)
    threadpool_limits(count)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _printed(*command: str) -> str:
    """Return the first line that a command prints."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent)
    except OSError:
        return "unknown"
    return next(iter(done.stdout.splitlines()), "unknown")


def _cpu() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
