"""`sbncore.hashing` and the places of the commonest parts, compiled: the same words, the same runs."""

from __future__ import annotations

import numpy as np

from sbncore.cpu.compiled import jit
from sbncore.plans import MapPlaces, Part, Plan, Runs, WholeSamples

FEW = 4  # runs of a map, that are drawn here
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
def map_places(key, first, rows, positions, run, stride, align, common, S, weight):
    """`sbncore.plans.MapPlaces`, in the order of memory."""
    runs = -(-positions // run)
    begin, length = np.empty((runs + 1) * rows, np.int64), np.empty((runs + 1) * rows, np.int64)
    count = 0
    for n in range(first, first + rows):
        start = align * bounded(absorb(key, 0 if common else n), S // align)
        wrapped = 0  # the first run that begins behind the map's end, and so at its front
        while wrapped < runs and start + wrapped * stride < S:
            wrapped += 1
        last = start + (wrapped - 1) * stride
        tail = last + min(run, positions - (wrapped - 1) * run) - S
        if tail > 0:
            begin[count], length[count] = n * S, tail
            count += 1
        for k in range(runs):
            i = (wrapped + k) % runs
            place = start + i * stride
            size = min(run, positions - i * run)
            begin[count] = n * S + place % S
            length[count] = min(size, S - place % S)
            count += 1
    return begin[:count].copy(), length[:count].copy(), np.full(count, weight)


@jit()
def whole_samples(key, first, rows, samples, stride, S, weight):
    """`sbncore.plans.WholeSamples` at a stride."""
    start = bounded(absorb(key, 0), rows)
    chosen = np.empty(samples, np.int64)
    for i in range(samples):
        chosen[i] = (start + stride * i) % rows
    chosen.sort()
    return (first + chosen) * S, np.full(samples, S), np.full(samples, weight)


def takes(part: Part) -> bool:
    """Whether a part's places are drawn here."""
    if isinstance(part, WholeSamples):
        return part.stride > 0
    return isinstance(part, MapPlaces) and part.positions <= FEW * part.length


def places(part: Part, key: int, S: int) -> Runs:
    """Return the runs of such a part, drawn with a key."""
    weight, word = part.weight / part.count, np.uint64(key)
    if isinstance(part, WholeSamples):
        return Runs(*whole_samples(word, part.first, part.rows, part.samples, part.stride, S, weight))
    assert isinstance(part, MapPlaces)
    shape = part.positions, min(part.length, part.positions), part.stride, part.align
    return Runs(*map_places(word, part.first, part.rows, *shape, part.common, S, weight))


def runs_of(plan: Plan) -> Runs:
    """Return `Plan.runs`."""
    if len(plan.parts) == 1 and takes(plan.parts[0]) and plan.total:
        return places(plan.parts[0], plan.parts[0].key, plan.S)
    return plan.runs
