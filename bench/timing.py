"""Alternating rounds: every contender runs once a round, so that all of them see the same machine.

Ratios are medians of the ratios within a round, over the rounds in which both took part: what slows the
machine for a second slows both sides of a ratio alike.
"""

from __future__ import annotations

import ctypes
import gc
import math
import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np

Call = Callable[[], object]
Phases = Mapping[str, Call]  # phase -> what to time, in this order
Times = dict[str, np.ndarray]  # phase -> seconds in each round, NaN where it sat out

WARM_UP = 2
FEWEST = 7  # rounds of a slow contender
PATIENCE = 3.0  # seconds for one contender; a slower one sits out rounds
GOLDEN = (math.sqrt(5) - 1) / 2  # spreads any number of rounds, the fewer among the more
PAUSE = 0.002  # seconds, for threads that still spin on the next contender's cores


def keep_pages() -> bool:
    """Make malloc keep what is freed, for the whole process; return whether it could.

    Ours writes into buffers used before. What PyTorch allocates in every call would come as fresh pages,
    which can cost more than the kernel: a matter of the allocator, not of batch normalization.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, TypeError, AttributeError):  # not glibc
        return False
    trim_threshold, mmap_threshold = -1, -3
    return bool(mallopt(mmap_threshold, 1 << 30) and mallopt(trim_threshold, (1 << 31) - 1))


def repeatedly(count: int) -> Callable[[Call], float]:
    """Return a clock of a call's mean seconds over many."""

    def mean(call: Call) -> float:
        begin = time.perf_counter()
        for _ in range(count):
            call()
        return (time.perf_counter() - begin) / count

    return mean


once = repeatedly(1)


def alternate(
    contenders: Mapping[str, Phases],
    rounds: int,
    clock: Callable[[Call], float] = once,
    pause: float | None = None,
) -> dict[str, Times]:
    """Time all contenders in ``rounds`` rounds; those that are slow take part in some, 7 at least."""
    pause = PAUSE if pause is None else pause
    part = {name: _rounds_of(phases, rounds) for name, phases in contenders.items()}
    times: dict[str, Times] = {
        name: {phase: np.full(rounds, np.nan) for phase in phases} for name, phases in contenders.items()
    }
    names = list(contenders)
    collecting = gc.isenabled()
    gc.disable()
    try:
        for r in range(rounds):
            shift = r % len(names)  # nobody always follows the same neighbour through the caches
            for name in names[shift:] + names[:shift]:
                if not part[name][r]:
                    continue
                time.sleep(pause)
                for phase, call in contenders[name].items():
                    times[name][phase][r] = clock(call)
    finally:
        if collecting:
            gc.enable()
    return times


def summary(seconds: np.ndarray) -> tuple[float, float, float]:
    """Return median, 20th and 80th percentile, in milliseconds."""
    p20, median, p80 = 1e3 * np.nanpercentile(seconds, (20, 50, 80))
    return float(median), float(p20), float(p80)


def ratio(numerator: np.ndarray, denominator: np.ndarray) -> float:
    """Return the median of the ratios within a round."""
    return float(np.nanmedian(numerator / denominator))


def shared(a: np.ndarray, b: np.ndarray) -> int:
    """Return in how many rounds both took part."""
    return int(np.isfinite(a + b).sum())


def geometric_mean(values: Sequence[float]) -> float:
    return float(np.exp(np.mean(np.log(values))))


def _rounds_of(phases: Phases, rounds: int) -> np.ndarray:
    for _ in range(WARM_UP):
        seconds = sum(once(call) for call in phases.values())
    count = min(rounds, max(FEWEST, int(PATIENCE / seconds)))
    spread = np.argsort(np.arange(rounds) * GOLDEN % 1)
    return np.isin(np.arange(rounds), spread[:count])
