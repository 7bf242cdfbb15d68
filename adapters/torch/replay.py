"""The same draw in a recomputed forward: activation checkpointing calls a layer twice for one step.

What a forward reads of a layer's state and then moves is a value of that forward: a recomputation must not
read the state again. Under torch.compile and in selective checkpoints the operator ``sbncore::read`` copies
it, and what that returns is always saved, whatever the partitioner or the policy recomputes. In other
checkpoints it is kept beside the checkpoint's frame. A reentrant checkpoint has none: there the layer's last
forward is taken.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch._dynamo.decorators import skip
from torch.fx import traceback
from torch.fx.experimental.proxy_tensor import ProxyTorchDispatchMode
from torch.utils import checkpoint
from torch.utils.weak import WeakIdKeyDictionary

from sbncore.adapters.torch.frames import frames

SAVE, RECOMPUTE = checkpoint.CheckpointPolicy.MUST_SAVE, checkpoint.CheckpointPolicy.PREFER_RECOMPUTE

_library = torch.library.Library("sbncore", "FRAGMENT")
_library.define("read(Tensor[] state, bool keeps, bool counted) -> Tensor[]")
_operator = torch.ops.sbncore.read.default


def _traced(mode: Any, operator: Any, types: Any, args: Any, kwargs: Any = None) -> Any:
    """Record the operator as one whose result the partitioner must save."""
    before = traceback.current_meta
    traceback.current_meta = before | {"recompute": SAVE}
    try:
        return mode.__torch_dispatch__(operator, types, args, kwargs or {})
    finally:
        traceback.current_meta = before


def _selected(mode: Any, operator: Any, types: Any, args: Any, kwargs: Any = None) -> Any:
    """Save the operator's result in a selective checkpoint, which torch.compile makes of every other."""
    policy, mode.policy_fn = mode.policy_fn, lambda *_, **__: SAVE
    try:
        return mode.__torch_dispatch__(operator, types, args, kwargs or {})
    finally:
        mode.policy_fn = policy


for _mode, _rule in (
    (ProxyTorchDispatchMode, _traced), (checkpoint._CachingTorchDispatchMode, _selected),
):  # fmt: skip
    torch.library.register_torch_dispatch("sbncore::read", _mode, _rule, lib=_library)


# by a checkpoint's frame, what its forward read, in the order of each counter's reads
_reads: WeakKeyDictionary[Any, dict[int, list[list[Tensor]]]] = WeakKeyDictionary()
# by a recomputation, how many of them it has asked for
_again: WeakKeyDictionary[Any, dict[int, int]] = WeakKeyDictionary()
# by the counter, what the last forward read beside it, where it read more
_last: WeakIdKeyDictionary = WeakIdKeyDictionary()


def checkpoint_contexts() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """Return contexts for `torch.utils.checkpoint`'s ``context_fn`` that do nothing.

    Every checkpoint with ``use_reentrant=False`` replays every draw, in any order of backwards, without them.
    """
    if torch.compiler.is_compiling():  # there a checkpoint recomputes by its contexts
        return checkpoint.create_selective_checkpoint_contexts(lambda *_, **__: RECOMPUTE)
    return nullcontext(), nullcontext()


def read(state: Sequence[Tensor], keeps: bool = False) -> tuple[Sequence[Tensor], bool | Tensor]:
    """Return what a call reads of a layer's state, and whether the call counts.

    A recomputed call does not count, and reads what the forward that it repeats has read.

    Args:
        state: the counter, the running statistics.
        keeps: whether what the call computes depends on more than the counter.

    Returns:
        The tensors, the state's own where nothing can ask for them again, and a bool, or while compiling
        an int64 tensor of 0 or 1.
    """
    if torch.compiler.is_compiling():
        counts, *values = _operator(state, keeps, True)
        return values, counts
    if torch._C._len_torch_dispatch_stack() > 0:
        return _operator(state, keeps, True)[1:], not recomputed()
    return _read(state, keeps)


@skip
def recomputed() -> bool:
    """Return whether a call now repeats a forward: it comes inside a backward or a recomputation."""
    inside_a_backward = torch._C._current_graph_task_id() != -1
    return inside_a_backward or any(one.recomputation is not None for one in frames())


def constants(mean: Tensor, var: Tensor, *others: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return running statistics as an evaluation's graph keeps them, which a later training may move.

    Copies where one of the others is differentiated; an exported graph has the buffers themselves.
    """
    if not torch.is_grad_enabled() or torch.compiler.is_exporting() or torch.jit.is_tracing():
        return mean, var
    if not any(other is not None and other.requires_grad for other in others):
        return mean, var
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0:
        _, mean, var = _operator((mean, var), True, False)
    else:
        (mean, var), _ = _read((mean, var), True, counted=False)
    return mean, var


@skip
def _read(state: Sequence[Tensor], keeps: bool, counted: bool = True) -> tuple[Sequence[Tensor], bool]:
    """`read`, and for a state without a counter its copies."""
    counter, values, within = state[0], None, []
    counts = torch._C._current_graph_task_id() == -1
    for frame, recomputation in frames():
        if recomputation is not None:
            counts, values = False, _replayed(frame, recomputation, id(counter))
            break
        within.append(frame)
    if values is None:
        if counted and not counts:
            values = [counter - 1, *_last.get(counter, state[1:])]
        elif not (keeps or within):
            return state, True
        else:
            values = [value.clone() for value in state]
            if keeps and counted:
                _last[counter] = values[1:]
    for frame in within:
        _reads.setdefault(frame, defaultdict(list))[id(counter)].append(values)
    return values, counts


def _replayed(frame: Any, recomputation: Any, counter: int) -> list[Tensor] | None:
    """Return what the frame's forward read, the first time and later, of a counter; None if it did not."""
    again = _again.setdefault(recomputation, defaultdict(int))
    again[counter] += 1
    reads = _reads.get(frame, {}).get(counter, [])
    return reads[again[counter] - 1] if again[counter] <= len(reads) else None


def _copied(state: Sequence[Tensor], keeps: bool, counted: bool) -> list[Tensor]:
    """Run the operator, whose results are tensors of their own; compiled, this runs at every call."""
    values, counts = _read(state, keeps, counted)
    return [state[0].new_full((), counts), *(value.clone() for value in values)]


_library.impl("read", _copied, "CompositeExplicitAutograd")
torch.library.register_fake(
    "sbncore::read", lambda state, *_: [torch.empty_like(one) for one in (state[0], *state)], lib=_library
)
