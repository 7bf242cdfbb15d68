"""How threads share a call's tasks: they increment counters, and wait for those of others.

A counter counts the tasks of a phase that are claimed, another those that are done. The counters are in the
record (`sbncore.cpu.record`), each in a cache line of its own.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from sbncore.cpu.elements import loop, pointer
from sbncore.cpu.record import THREAD
from sbncore.cpu.tuning import SPINS

I64 = ir.IntType(64)


@intrinsic
def increment(typingctx: Any, counters: Any, k: Any) -> tuple[Any, Callable[..., Any]]:
    """Add 1 to counter ``k`` and return what it was: a different number for each thread.

    What a thread wrote before, non-temporal or not, is seen by those that later read the count.
    """

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        place = pointer(context, builder, counters, *args)
        return builder.atomic_rmw("add", place, ir.Constant(I64, 1), "acq_rel")

    return types.int64(counters, types.intp), codegen


@intrinsic
def read_counter(typingctx: Any, counters: Any, k: Any) -> tuple[Any, Callable[..., Any]]:
    """Return counter ``k``."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.load_atomic(pointer(context, builder, counters, *args), "acquire", 8)

    return types.int64(counters, types.intp), codegen


@loop()
def thread_scratch(r, counters):
    """Return the address of a thread's own scratch memory."""
    return r.scratch + increment(counters, THREAD) * r.scratch_size


@loop()
def no_yield():
    """Keep the core, where the system has no `sched_yield`."""
    return 0


# there may be more threads than cores
yield_core = types.ExternalFunction("sched_yield", types.int32()) if os.name == "posix" else no_yield


@loop()
def wait(counters, k, count):
    """Wait until other threads have brought counter ``k`` to ``count``."""
    spins = 0
    while read_counter(counters, k) < count:
        spins += 1
        if spins > SPINS:
            yield_core()


@loop()
def sweep_task(t, N, C, sweep, spread):
    """Return the t-th task of a sweep: the group of samples, samples n0 .. n1-1, channels c0 .. c1-1."""
    across = (C + sweep - 1) // sweep
    g, c0 = t // across, t % across * sweep
    return g, g * spread, min(N, (g + 1) * spread), c0, min(C, c0 + sweep)
