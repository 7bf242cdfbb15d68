"""Threads for kernels: a pool made at first use, made anew in a forked child.

Plain threads rather than Numba's parallel layers: those abort the process when two Python threads enter one
of them, or a forked child another; and one compilation serves the serial and the parallel call. Beside
PyTorch, whose OpenMP threads spin between its calls on the cores that ours would want, those do the work:
``GOMP_parallel(function, data, threads, flags)``, GNU's entry point, calls the kernel on each of them. LLVM's
and Intel's OpenMP have it too.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from typing import Any


def _available() -> int:
    for name in ("SBNCORE_NUM_THREADS", "OMP_NUM_THREADS"):
        value = os.environ.get(name, "")
        if value.isdigit() and int(value) > 0:
            return int(value)
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


_threads = _available()
_pool: ThreadPoolExecutor | None = None
_pool_size = 0
_entry: int | None = None  # not looked for yet


def get_num_threads() -> int:
    """Return how many threads a large call uses; at first SBNCORE_NUM_THREADS, or all there are."""
    return _threads


def set_num_threads(count: int) -> None:
    """Use ``count`` threads from now on; results do not depend on it, bit for bit.

    Raises:
        TypeError, ValueError: if count is not a positive integer.
    """
    global _threads, _pool, _pool_size
    if not isinstance(count, int) or isinstance(count, bool):
        raise TypeError(f"count: expected an integer, got {count!r}")
    if count < 1:
        raise ValueError(f"count: expected at least 1 thread, got {count}")
    _threads = count
    if count > _pool_size:
        _pool, _pool_size = None, 0  # calls under way keep the pool they have


def count(tasks: int) -> int:
    """Return how many threads share so many tasks."""
    return max(1, min(_threads, tasks))


def run(kernel: Callable[[int], None], record: int, threads: int) -> None:
    """Call a C function with a record's address on so many threads; each takes tasks by counting."""
    global _pool, _pool_size
    if threads <= 1:
        kernel(record)
        return
    entry = openmp()
    if entry:
        _team(entry)(kernel, record, threads, 0)
        return
    pool = _pool
    if pool is None:
        pool, _pool_size = ThreadPoolExecutor(_threads, thread_name_prefix="sbncore"), _threads
        _pool = pool
    others: list[Future[None]] = []
    with contextlib.suppress(RuntimeError):  # while Python exits: this thread does all the tasks
        others += (pool.submit(kernel, record) for _ in range(threads - 1))
    try:
        kernel(record)
    finally:
        for other in others:  # one that has not begun by now finds no task
            if not other.cancel():
                other.result()


@lru_cache(maxsize=1)
def _team(entry: int) -> Any:
    arguments = ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint
    return ctypes.CFUNCTYPE(None, *arguments)(entry)


def openmp() -> int:
    """Return where the OpenMP that PyTorch runs on begins a team, or 0 without it."""
    global _entry
    if _entry is None and "torch" in sys.modules:
        _entry = 0
        with contextlib.suppress(OSError, AttributeError, ValueError):
            with open("/proc/self/maps", encoding="utf-8") as maps:
                paths = {line.split()[-1] for line in maps if "libgomp" in line or "libiomp5" in line}
            (path,) = paths  # of two there is no telling which one PyTorch's threads are
            function = ctypes.CDLL(path).GOMP_parallel
            _entry = ctypes.cast(function, ctypes.c_void_p).value or 0
    return _entry or 0


def _forget() -> None:
    """In a forked child neither pool has its threads: GNU's OpenMP would wait for them for ever."""
    global _pool, _pool_size, _entry
    _pool, _pool_size, _entry = None, 0, 0


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
