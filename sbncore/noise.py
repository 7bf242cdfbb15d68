"""White noise for virtual samples, from the counter-based hash: the same bits on every backend.

The words of one batch of noise, beside what `sbncore.hashing` writes down::

    key:        absorb over the words seed, 0, step, 2**64 - 1; then over the sample's number n
    word:       absorb(key, i) for element i of the sample, flattened in C order
    noise:      (sum of the word's four 16-bit quarters - 131070) * sqrt(3 / (2**32 - 1))

The sum is a small exact integer and the product is rounded once, in float32 or float64: no function whose
last bit depends on a library is involved.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from sbncore.drawing import integer
from sbncore.hashing import absorb, stream_key

STREAM = -1  # no plan has as many parts
PAIRS = 0x0000_FFFF_0000_FFFF  # every other quarter of a word
CENTRE = 2 * 0xFFFF
SCALE = math.sqrt(3 / (2**32 - 1))


def white_noise(
    shape: Sequence[int], *, seed: int = 0, step: int = 0, dtype: DTypeLike = np.float32
) -> NDArray[Any]:
    """Return synthetic samples of mean 0 and deviation 1, a pure function of (seed, step, sample, element).

    ``(u_1 + u_2 + u_3 + u_4 - mean) / deviation`` of uniform u: symmetric, nearly Gaussian (kurtosis 2.7
    beside 3), within 3.46 deviations, and white: no element tells of another.

    Args:
        shape: (samples, *sample).
        seed, step: integers (modulo 2**64) that name the noise.
        dtype: float32 or float64.

    Returns:
        An array of the shape and the dtype.

    Raises:
        ValueError: for a shape without axes or with a negative size, and for another dtype.
        TypeError: if seed, step or a size is not an integer.
    """
    sizes = tuple(integer("shape", size) for size in shape)
    if not sizes or min(sizes) < 0:
        raise ValueError(f"shape: expected (samples, *sample) of sizes of 0 or more, got {sizes}")
    kind = np.dtype(dtype)
    if kind not in (np.float32, np.float64):
        raise ValueError(f"dtype: expected float32 or float64, got {kind}")
    key = stream_key(integer("seed", seed), 0, integer("step", step), STREAM)
    elements = np.arange(math.prod(sizes[1:]), dtype=np.uint64)
    noise = np.empty((sizes[0], elements.size), kind)
    for n, row in enumerate(noise):
        words = absorb(absorb(key, n), elements)
        pairs = (words & PAIRS) + ((words >> 16) & PAIRS)
        total = ((pairs >> 32) + (pairs & 0xFFFF_FFFF)).astype(np.int64)
        np.multiply((total - CENTRE).astype(kind), SCALE, out=row)
    return noise.reshape(sizes)
