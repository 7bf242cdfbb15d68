"""Large new arrays in large pages: Linux takes longer to hand out small ones than a pass takes to fill them.

NumPy asks for them itself, PyTorch does not.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from functools import cache
from typing import Any

# Size from which on PyTorch's new arrays are asked for in huge pages: NumPy's own bound. Measured: fresh
# memory in small pages took three times the kernels' time (2026-11-23); the machine and the command are not
# on record. Compare: `TARGETS` of `sbncore.cpu.tuning`.
HUGE_PAGES_FROM = 4 << 20  # bytes
_ADVICE = 14  # Linux's MADV_HUGEPAGE


def advise(address: int, size: int) -> None:
    """Ask that memory not yet touched comes in large pages; without a right to it, nothing happens."""
    madvise = _madvise()
    if madvise is not None:
        first = -(-address // mmap.PAGESIZE) * mmap.PAGESIZE
        madvise(first, (address + size - first) // mmap.PAGESIZE * mmap.PAGESIZE, _ADVICE)


@cache
def _madvise() -> Any:
    if not sys.platform.startswith("linux"):
        return None
    function = getattr(ctypes.CDLL(None), "madvise", None)
    if function is not None:
        function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return function
