"""`sbncore.hashing` and the places of the commonest parts, compiled: the same words, the same runs."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from sbncore.cpu.compiled import jit
from sbncore.plans import MapPlaces, Plan, Runs, WholeSamples

FEW = 4  # runs of a map, that are drawn here
LARGEST = 2**63 - 1  # of Numba's int64
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
def map_places(seed, layer, step, stream, first, rows, positions, run, stride, align, common, S, weight):
    """`sbncore.plans.MapPlaces`, in the order of memory."""
    key = stream_key(seed, layer, step, stream)
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
def whole_samples(seed, layer, step, stream, first, rows, samples, stride, S, weight):
    """`sbncore.plans.WholeSamples` at a stride."""
    start = bounded(absorb(stream_key(seed, layer, step, stream), 0), rows)
    chosen = np.empty(samples, np.int64)
    for i in range(samples):
        chosen[i] = (start + stride * i) % rows
    chosen.sort()
    return (first + chosen) * S, np.full(samples, S), np.full(samples, weight)


def takes(plan: Plan) -> bool:
    """Whether the places of such plans, drawn at a fixed step, are found here."""
    if len(plan.parts) != 1:
        return False
    part = plan.parts[0]
    if type(part) is WholeSamples:
        return part.stride > 0
    return type(part) is MapPlaces and part.positions <= FEW * part.length


def drawing(recipe: Plan) -> Callable[[int, int, int], Runs]:
    """Return what finds the runs of a recipe that is taken here, of (seed, layer, step), signed words."""
    part, S = recipe.parts[0], recipe.S
    which: tuple[int, ...]
    if isinstance(part, WholeSamples):
        kernel, which = whole_samples, (part.samples, part.stride)
        if recipe.full:
            everything = recipe.runs
            return lambda *_: everything
    else:
        assert isinstance(part, MapPlaces)
        length = min(part.length, part.positions)
        kernel, which = map_places, (part.positions, length, part.stride, part.align, part.common)
    static = part.key, part.first, part.rows, *which, S, part.weight / part.count
    return lambda *words: Runs(*kernel(*words, *static))


def runs_of(plan: Plan) -> Runs:
    """Return `Plan.runs`."""
    words = plan.words
    if words is None or min(words) < -LARGEST - 1 or max(words) > LARGEST:
        return plan.runs
    draw = plan.known.get(drawing)
    if draw is None:
        draw = plan.known[drawing] = drawing(plan.recipe) if takes(plan.recipe) else _nothing
    return draw(*words) or plan.runs


def _nothing(*words: int) -> None:
    return None
