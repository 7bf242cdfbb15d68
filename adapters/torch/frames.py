"""The frames of `torch.utils.checkpoint` that a call lies in: which forward a recomputation repeats.

Torch has no public way to ask. A frame is what the hooks of a non-reentrant checkpoint close over, the
forward's and the recomputation's alike; the hooks themselves stand on a stack of which the top can be seen.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch._dynamo.decorators import skip
from torch.utils import checkpoint

_top = torch._C._autograd._top_saved_tensors_default_hooks
_pop = torch._C._autograd._pop_saved_tensors_default_hooks
_push = torch._C._autograd._push_saved_tensors_default_hooks


class Frame(NamedTuple):
    """A checkpoint's frame, and the hook of the recomputation that runs, or None in the forward."""

    frame: Any
    recomputation: Callable[..., Any] | None


@skip  # Dynamo looks into what runs where it broke a graph
def frames() -> list[Frame]:
    """Return the frames that are active, the innermost first."""
    if _top(True) is None:  # most often
        return []
    stack = []
    while (hooks := _top(True)) is not None:
        stack.append(hooks)
        _pop()
    for hooks in reversed(stack):
        _push(*hooks)
    return [frame for pack, _ in stack if (frame := _frame_of(pack)) is not None]


def _frame_of(pack: Callable[..., Any]) -> Frame | None:
    if getattr(pack, "__module__", None) != checkpoint.__name__:
        return None
    function: Any = getattr(pack, "_torchdynamo_orig_callable", pack)
    for cell in function.__closure__ or ():
        value = cell.cell_contents
        recomputes = isinstance(value, weakref.ref)
        frame = value() if recomputes else value
        if isinstance(frame, checkpoint._CheckpointFrame):
            return Frame(frame, pack if recomputes else None)
    raise RuntimeError("this version of torch.utils.checkpoint is not known: its hooks have no frame")
