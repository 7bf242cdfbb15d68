"""Tasks that threads share out by counting, and how a thread waits until the others have done theirs."""

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
    """Count counter ``k`` up by one and return what it was: to each thread another number.

    What a thread wrote before, streamed or not, is seen by those that later find the count.
    """

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        place = pointer(context, builder, counters, *args)
        return builder.atomic_rmw("add", place, ir.Constant(I64, 1), "acq_rel")

    return types.int64(counters, types.intp), codegen


@intrinsic
def read_counter(typingctx: Any, counters: Any, k: Any) -> tuple[Any, Callable[..., Any]]:
    """What counter ``k`` is now."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.load_atomic(pointer(context, builder, counters, *args), "acquire", 8)

    return types.int64(counters, types.intp), codegen


@loop()
def thread_scratch(r, counters):
    """Where a thread's own scratch memory begins."""
    return r.scratch + increment(counters, THREAD) * r.scratch_size


@loop()
def no_yield():
    return 0


# there may be more threads than cores
yield_core = types.ExternalFunction("sched_yield", types.int32()) if os.name == "posix" else no_yield


@loop()
def wait(counters, k, count):
    """Wait until counter ``k``, which threads that run count up, has come to ``count``."""
    spins = 0
    while read_counter(counters, k) < count:
        spins += 1
        if spins > SPINS:
            yield_core()


@loop()
def sweep_task(t, N, C, sweep, spread):
    """The t-th task of a sweep: of which group of samples, these, and the channels."""
    across = (C + sweep - 1) // sweep
    g, c0 = t // across, t % across * sweep
    return g, g * spread, min(N, (g + 1) * spread), c0, min(C, c0 + sweep)
