"""`sbncore.hashing` and the places of the commonest parts, compiled: the same words, the same runs."""

from __future__ import annotations

import numpy as np

from sbncore.cpu.compiled import jit

GOLDEN, FIRST, SECOND = (
    np.uint64(word) for word in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
)


@jit()
def absorb(key, word):
    z = (np.uint64(word) ^ key) + GOLDEN
    z = (z ^ (z >> np.uint64(30))) * FIRST
    z = (z ^ (z >> np.uint64(27))) * SECOND
    return z ^ (z >> np.uint64(31))


@jit()
def stream_key(seed, layer, step, stream):
    """The key of one stream of draws, of signed words."""
    key = np.uint64(0)
    for word in (seed, layer, step, stream):
        key = absorb(key, word)
    return key


@jit()
def bounded(word, size):
    return np.int64(((word >> np.uint64(32)) * np.uint64(size)) >> np.uint64(32))


@jit()
def run_places(seed, layer, step, first, rows, positions, align, common, S, weight):
    """`sbncore.plans.MapPlaces` of one run a sample, as a plan's first part."""
    key = stream_key(seed, layer, step, 0)
    begin, length = np.empty(2 * rows, np.int64), np.empty(2 * rows, np.int64)
    count = 0
    for n in range(first, first + rows):
        start = align * bounded(absorb(key, 0 if common else n), S // align)
        tail = max(0, start + positions - S)
        if tail > 0:
            begin[count], length[count] = n * S, tail
            count += 1
        begin[count], length[count] = n * S + start, positions - tail
        count += 1
    return begin[:count].copy(), length[:count].copy(), np.full(count, weight)


@jit()
def whole_samples(seed, layer, step, first, rows, samples, stride, S, weight):
    """`sbncore.plans.WholeSamples` at a stride, as a plan's first part."""
    key = stream_key(seed, layer, step, 0)
    start = bounded(absorb(key, 0), rows)
    chosen = np.empty(samples, np.int64)
    for i in range(samples):
        chosen[i] = (start + stride * i) % rows
    chosen.sort()
    return (first + chosen) * S, np.full(samples, S), np.full(samples, weight)
