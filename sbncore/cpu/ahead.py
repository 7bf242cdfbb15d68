"""Kernels compiled in processes of their own: several at a time, and a cache is filled once for all ranks."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from sbncore.cpu.tuning import COMPILE_SECONDS

PATIENCE = 1.0  # seconds of silence
ROOT = Path(__file__).parents[2]


def fill(folder: Path, names: list[str], cpu: tuple[str, str]) -> None:
    """Compile the functions that a folder lacks, while no other process does.

    Raises:
        RuntimeError: if that fails.
    """
    tell = _teller(folder, names, cpu[0])
    with _alone(folder, tell):
        missing = [name for name in names if not (folder / f"{name}.o").exists()]
        if missing:
            _compile(folder, missing, cpu, tell)


def _compile(folder: Path, names: list[str], cpu: tuple[str, str], tell: Callable[[], None]) -> None:
    """Have a process for each core compile its share: neighbours, which have much in common."""
    count = min(_cores(), len(names))
    shares = [names[len(names) * k // count : len(names) * (k + 1) // count] for k in range(count)]
    paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    chosen = {"NUMBA_CPU_NAME": cpu[0], "NUMBA_CPU_FEATURES": cpu[1], "NUMBA_DISABLE_JIT": "0"}
    chosen["PYTHONPATH"] = paths
    with tempfile.TemporaryFile("w+") as complaints, contextlib.ExitStack() as running:
        processes = []
        for share in shares:
            command = [sys.executable, "-m", "sbncore.cpu.build", str(folder), *share]
            process = subprocess.Popen(command, env=os.environ | chosen, stderr=complaints)
            processes.append(running.enter_context(process))
            running.callback(process.kill)  # where this is interrupted
        while any(process.poll() is None for process in processes):
            time.sleep(0.02)
            tell()
        if any(process.returncode for process in processes):
            complaints.seek(0)
            raise RuntimeError(f"sbncore: compiling the CPU's kernels failed\n{complaints.read()}")


def _teller(folder: Path, names: list[str], cpu: str) -> Callable[[], None]:
    """Return what tells the user, once, why nothing seems to happen."""
    begin, seconds = time.monotonic(), COMPILE_SECONDS * -(-len(names) // _cores())
    told = False

    def tell() -> None:
        nonlocal told
        if not told and time.monotonic() - begin > PATIENCE:
            told = True
            print(
                f"sbncore: compiling {len(names)} functions for the CPU {cpu!r}, about {seconds} s. "
                f"It happens once, they are kept in {folder}. To do it ahead: python -m sbncore warmup",
                file=sys.stderr,
                flush=True,
            )

    return tell


def _cores() -> int:
    """Not the number of threads: a launcher of ranks sets that to 1."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextlib.contextmanager
def _alone(folder: Path, tell: Callable[[], None]) -> Iterator[None]:
    """Wait for a lock that a process holds until it ends; without fcntl two may do the same work."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    with open(folder / "lock", "w", encoding="ascii") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(0.05)
                tell()
            except OSError:  # a file system without locks
                break
        yield
