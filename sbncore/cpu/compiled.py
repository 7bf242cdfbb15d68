"""How every kernel is compiled: lazily, without the GIL, cached where the cache can be written."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

from numba import njit

_warned = False


def jit(**options: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Compile at the first call, and for all time if Numba finds a place to keep it."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        global _warned
        try:
            return njit(cache=True, nogil=True, **options)(function)
        except RuntimeError:  # numba found no writable place
            if not _warned:
                warnings.warn("sbncore: no writable Numba cache, kernels compile anew", stacklevel=2)
            _warned = True
            return njit(nogil=True, **options)(function)

    return decorate
