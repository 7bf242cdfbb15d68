"""What a training step holds in memory: what autograd keeps for backward, and on a GPU the peak."""

from __future__ import annotations

from collections.abc import Callable

import torch


def kept(network: torch.nn.Module, x: torch.Tensor) -> int:
    """Return the bytes that autograd keeps between a forward and its backward, parameters and x left out."""
    given = {tensor.untyped_storage().data_ptr() for tensor in (x, *network.parameters())}
    found: dict[int, tuple[int, torch.Tensor]] = {}

    def pack(tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in given:
            # held, lest another takes its place, but not its graph, which holds this function
            found[storage.data_ptr()] = storage.nbytes(), tensor.detach()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda nothing: nothing):
        network(x)
    return sum(nbytes for nbytes, _ in found.values())


def peak(step: Callable[[], object]) -> int:
    """Return the most bytes that PyTorch had in use on the GPU during a step."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()
