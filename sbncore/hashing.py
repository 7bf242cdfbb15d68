"""The counter-based hash behind every draw: pure 64-bit integer arithmetic, the same on every backend.

All words are unsigned 64-bit and wrap; ``^`` is exclusive or, ``>>`` a logical shift::

    mix(z):            z ^= z >> 30;  z *= 0xBF58476D1CE4E5B9
                       z ^= z >> 27;  z *= 0x94D049BB133111EB
                       z ^= z >> 31
    absorb(key, word): mix((key ^ word) + 0x9E3779B97F4A7C15)
    key:               absorb over the words seed, layer, step, stream, in this order, from 0
    bounded(h, size):  ((h >> 32) * size) >> 32                        for size <= 2**32
    distinct(key, size, count):
        size <= 4096: the ``count`` values i of 0 .. size-1 with the smallest absorb(key, i)
        otherwise: permute(key, i, size) of i = 0 .. count-1
    permute(key, i, size):
        bits = bit length of size - 1;  low = bits // 2;  high = bits - low
        repeat
            for r in 0 .. 7:
                k = absorb(key, r);  a = i >> low;  b = i & (2**low - 1)
                r even:  b ^= (absorb(k, a) >> 32) & (2**low - 1)
                r odd:   a ^= (absorb(k, b) >> 32) & (2**high - 1)
                i = a << low | b
        until i < size

``mix`` is the finalizer of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014, figure 16; constants of
Stafford's variant 13). ``permute`` is an unbalanced Feistel network with cycle walking (Black and
Rogaway, CT-RSA 2002): a bijection of ``0 .. size-1``, hence a draw without replacement in constant
memory. It is no good on a handful of values, where sorting by hash is cheap and exact. ``stream`` numbers
the parts of one plan, so that they draw independently.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

Word = TypeVar("Word", int, NDArray[Any])

MASK = 0xFFFF_FFFF_FFFF_FFFF
GOLDEN = 0x9E37_79B9_7F4A_7C15
ROUNDS = 8
SORTED = 4096  # up to this size, distinct values are drawn by sorting


def mix(z: Word) -> Word:
    """Scramble 64 bits (a bijection), for a Python int or an array of uint64."""
    z = ((z ^ (z >> 30)) * 0xBF58_476D_1CE4_E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D0_49BB_1331_11EB) & MASK
    return z ^ (z >> 31)


def absorb(key: int, word: Word) -> Word:
    """Return the key that follows from ``key`` and one more word (or one key per word)."""
    return mix(((word ^ key) + GOLDEN) & MASK)


@lru_cache(maxsize=4096)
def layer_key(seed: int, layer: int) -> int:
    """Return the key of all draws of a layer."""
    return absorb(absorb(0, seed & MASK), layer & MASK)


def stream_key(seed: int, layer: int, step: int, stream: int) -> int:
    """Return the key of one stream of draws; integers are taken modulo 2**64."""
    return absorb(absorb(layer_key(seed, layer), step & MASK), stream & MASK)


def bounded(words: Word, size: int) -> Word:
    """Map hashed words to ``0 .. size-1``, for ``size`` up to 2**32."""
    return ((words >> 32) * size) >> 32


def distinct(key: int, size: int, count: int) -> NDArray[np.int64]:
    """Return ``count`` different values of ``0 .. size-1``, every such set with the same chance."""
    if size <= SORTED:
        order = np.argsort(absorb(key, np.arange(size, dtype=np.uint64)), kind="stable")
        return order[:count]
    low = (size - 1).bit_length() // 2
    low_mask, high_mask = (1 << low) - 1, (1 << ((size - 1).bit_length() - low)) - 1
    image = np.arange(count, dtype=np.uint64)
    walking = np.arange(count)
    while walking.size:
        a, b = image[walking] >> low, image[walking] & low_mask
        for r in range(ROUNDS):
            round_key = absorb(key, r)
            if r % 2 == 0:
                b = b ^ ((absorb(round_key, a) >> 32) & low_mask)
            else:
                a = a ^ ((absorb(round_key, b) >> 32) & high_mask)
        image[walking] = (a << low) | b
        walking = walking[image[walking] >= size]
    return image.astype(np.int64)
