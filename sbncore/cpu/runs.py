"""The runs of a sample: drawn by hash, read from the record, split into pieces.

A run is ``length`` consecutive positions of one sample's map, or places of channels-last memory, from
``begin`` on, with one weight. The draws repeat `sbncore.hashing` and the commonest parts of
`sbncore.plans`, compiled: the same words, the same runs (tests/test_samplers.py). They write int64 and
float64 arrays at the addresses of a `sbncore.cpu.record.Draw`, one thread each.
"""

from __future__ import annotations

import numpy as np

from sbncore.cpu.elements import array_at, draw_at, loop
from sbncore.cpu.record import LANES

GOLDEN, MULTIPLIER_1, MULTIPLIER_2 = (
    np.uint64(word) for word in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
)


@loop()
def absorb(key, word):
    """Return the key that one more word makes: `sbncore.hashing.absorb`."""
    z = (np.uint64(word) ^ key) + GOLDEN
    z = (z ^ (z >> np.uint64(30))) * MULTIPLIER_1
    z = (z ^ (z >> np.uint64(27))) * MULTIPLIER_2
    return z ^ (z >> np.uint64(31))


@loop()
def stream_key(d):
    """Return the key of one stream of draws, of signed words."""
    key = np.uint64(0)
    for word in (d.seed, d.layer, d.step, d.stream):
        key = absorb(key, word)
    return key


@loop()
def bounded(word, size):
    """Return a number below size: `sbncore.hashing.bounded`."""
    return np.int64(((word >> np.uint64(32)) * np.uint64(size)) >> np.uint64(32))


@loop(forceinline=True)
def run_arrays(r, size):
    """Return the arrays (size,) at a record's begin, length and share."""
    shape = (size,)
    return array_at(r.begin, shape, 0), array_at(r.length, shape, 0), array_at(r.share, shape, 0.0)


def map_places(address):
    """`sbncore.plans.MapPlaces`, in the order of memory."""
    d = draw_at(address)
    key, S, positions, run, stride, align = stream_key(d), d.S, d.positions, d.run, d.stride, d.align
    runs = -(-positions // run)
    begin, length, share = run_arrays(d, (runs + 1) * d.rows)
    count = 0
    for n in range(d.first, d.first + d.rows):
        start = align * bounded(absorb(key, 0 if d.common else n), S // align)
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
    for k in range(count):
        share[k] = d.weight
    d.count = count


def whole_samples(address):
    """`sbncore.plans.WholeSamples` at a stride, in the order of memory."""
    d = draw_at(address)
    begin, length, share = run_arrays(d, d.samples)
    start = bounded(absorb(stream_key(d), 0), d.rows)
    wrapped = min(d.samples, -(-(d.rows - start) // d.stride))  # the first that lies behind the last row
    for k in range(d.samples):
        sample = (start + (wrapped + k) % d.samples * d.stride) % d.rows
        begin[k], length[k], share[k] = (d.first + sample) * d.S, d.S, d.weight
    d.count = d.samples


@loop(forceinline=True)
def runs_in(r):
    """Return begin, length and weight of a record's runs."""
    return run_arrays(r, r.runs)


@loop()
def split_runs(r, scratch, begin, length, weight, longest):
    """Return the runs, joined where one follows the other, then split, in pieces of ``longest`` at most."""
    size = r.capacity
    out_begin, out_length = array_at(scratch, (size,), 0), array_at(scratch + 8 * size, (size,), 0)
    out_weight = array_at(scratch + 16 * size, (size,), 0.0)
    pieces, k = 0, 0
    while k < len(begin):
        first, end, p = begin[k], begin[k] + length[k], weight[k]
        k += 1
        while k < len(begin) and begin[k] == end and weight[k] == p:
            end += length[k]
            k += 1
        while first < end:
            out_begin[pieces], out_length[pieces] = first, min(longest, end - first)
            out_weight[pieces] = p
            first += longest
            pieces += 1
    shape = (pieces,)
    return (
        array_at(scratch, shape, 0), array_at(scratch + 8 * size, shape, 0),
        array_at(scratch + 16 * size, shape, 0.0),
    )  # fmt: skip


@loop()
def touched_elements(length):
    """Return about how many elements the cache lines of runs have."""
    elements = 0
    for k in range(len(length)):
        elements += length[k] + LANES
    return elements
