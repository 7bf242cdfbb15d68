"""The only door to an engine: a Call is prepared once, and found again by its Signature."""

from __future__ import annotations

from functools import lru_cache

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
