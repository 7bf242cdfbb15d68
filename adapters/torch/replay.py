"""The same draw in a recomputed forward: torch.utils.checkpoint calls a layer twice for one step."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor

_now = threading.local()


class _Tape:
    """The steps that layers drew at in one checkpointed forward, in the order of each layer's calls."""

    def __init__(self) -> None:
        self.steps: dict[Any, list[Tensor]] = defaultdict(list)
        self.next: dict[Any, int] | None = None  # of each layer, while replaying

    @contextmanager
    def running(self, replaying: bool) -> Iterator[None]:
        before = getattr(_now, "tape", None)
        _now.tape, self.next = self, defaultdict(int) if replaying else None
        try:
            yield
        finally:
            _now.tape = before


def checkpoint_contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Return the contexts by which `torch.utils.checkpoint` replays every draw, in any order of backwards.

    ``checkpoint(block, x, use_reentrant=False, context_fn=checkpoint_contexts)``. Without them a layer that
    is called inside a backward takes the draw of its last forward: the same, where a backward follows each
    forward and the block calls the layer once; needed with several forwards before a backward.
    """
    tape = _Tape()
    return tape.running(replaying=False), tape.running(replaying=True)


def step_of(layer: Any, counter: Tensor) -> tuple[Tensor, bool]:
    """Return the step a layer's call draws at, and whether it counts: a recomputed one does not."""
    if torch.compiler.is_compiling():  # recomputes what it recorded, step included
        return counter, True
    tape = getattr(_now, "tape", None)
    if tape is not None:
        if tape.next is not None:
            tape.next[layer] += 1
            return tape.steps[layer][tape.next[layer] - 1], False
        tape.steps[layer].append(counter.clone())
    elif torch._C._current_graph_task_id() != -1:  # inside a backward
        return counter - 1, False
    return counter, True
