"""A layer for training code written in CuPy; the functions of `sbncore` take CuPy arrays as they are."""

from __future__ import annotations

from typing import Any

from sbncore.adapters import numpy
from sbncore.cuda.device import cupy


class SampledBatchNorm(numpy.SampledBatchNorm):
    """`sbncore.adapters.numpy.SampledBatchNorm`, its parameters and statistics on the current device.

    Args:
        capturable: keep the step, ``num_batches_tracked``, in device memory, where the kernels read it: a
            captured CUDA graph then draws anew at every replay. Not with momentum None, nor with samplers
            whose parts overlap.

    Raises:
        RuntimeError: if CuPy, a driver or a GPU is missing.
    """

    def __init__(self, *args: Any, capturable: bool = False, **options: Any) -> None:
        self._xp = cupy()
        super().__init__(*args, **options)
        if capturable:
            self.num_batches_tracked = self._xp.zeros((), "int64")
