"""How every kernel is compiled: lazily, without the GIL, cached where the cache can be written."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from numba import config, njit

if getattr(config, "DISABLE_JIT", 0):  # what intrinsics say of it nobody understands
    raise RuntimeError("sbncore's CPU engine is compiled, and NUMBA_DISABLE_JIT is set: unset it")

_FILES = sorted(Path(__file__).parent.glob("*.py"))
_SOURCES = tuple((path.name, path.stat().st_mtime, path.stat().st_size) for path in _FILES)
_warned = False


def jit(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """Compile at the first call, and for all time if Numba finds a place to keep it."""

    def decorate(function: Callable[..., Any]) -> Any:
        global _warned
        try:
            return _stamped(njit(cache=True, nogil=True, error_model="numpy", **options)(function))
        except RuntimeError:  # numba found no writable place
            if not _warned:
                warnings.warn("sbncore: no writable Numba cache, kernels compile anew", stacklevel=2)
            _warned = True
            return njit(nogil=True, error_model="numpy", **options)(function)

    return decorate


def inner(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """Compile as a part of the kernels that call it: without an entry from Python, and kept with them.

    For what makes arrays or returns them.
    """

    def decorate(function: Callable[..., Any]) -> Any:
        compiler: Any = njit  # its types lack what leaves out the entries
        without = {"no_cpython_wrapper": True, "no_cfunc_wrapper": True}
        return compiler(nogil=True, error_model="numpy", **without, **options)(function)

    return decorate


def loop(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """As `inner`, for what neither makes arrays nor returns them: no references are counted there.

    Numba leaves some of the counts in loops, where each is an atomic operation: a call took 15 times as long.
    """
    return inner(_nrt=False, **options)


def _stamped(dispatcher: Any) -> Any:
    """Numba's cache looks at the date of a function's own file: what it inlines lies in the others."""
    file: Any = getattr(getattr(dispatcher, "_cache", None), "_cache_file", None)
    if hasattr(file, "_source_stamp"):
        file._source_stamp = _SOURCES
    return dispatcher
