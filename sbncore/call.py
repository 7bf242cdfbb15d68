"""The only door to an engine: a Call is prepared once, and found again by its Signature."""

from __future__ import annotations

from functools import lru_cache

from sbncore.layout import Layout
from sbncore.signature import Call, Signature


@lru_cache(maxsize=4096)
def call_for(signature: Signature) -> Call:
    """Return the Call of a signature.

    Raises:
        ValueError: for a recipe that the engine does not take.
    """
    if signature.device is None:
        from sbncore.cpu.call import Call as CPUs

        return CPUs(signature)
    from sbncore.cuda.call import Call as GPUs

    return GPUs(signature)


def mask_size(layout: Layout, on_gpu: bool, itemsize: int) -> int:
    """Return the bytes of a call's mask, `Call.mask`; of a compiler's stand-ins too."""
    if on_gpu:
        from sbncore.cuda.call import mask_bytes

        return mask_bytes(*layout.sizes, layout.last, itemsize)
    from sbncore.cpu.engine import mask_size

    return mask_size(layout)
