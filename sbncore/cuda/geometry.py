"""How the kernels cut their work: pure functions of sizes, which the launch and the emulator share.

Constants bear the names they have in the kernels.
"""

from __future__ import annotations

import math
import struct
from functools import lru_cache
from typing import NamedTuple

THREADS = 256  # of a block, at most
UNROLL = 4  # rows that a thread takes at a time
CHANNELS = 264  # of a tile, at most
GROUP = 32  # channels of a cluster, at most
CLUSTER = 8  # blocks
WIDE = 8  # columns of a channels-last tile: 128 bytes
PLACES = 64  # blocks that share a tile's places, at most: their sums are added up by every block behind them


class Sizes(NamedTuple):
    """An array's sizes, its memory's layout and the bytes of an element; whether 16-byte accesses may be."""

    N: int
    C: int
    S: int
    last: bool
    itemsize: int
    aligned: bool

    @property
    def vector(self) -> int:
        """Elements of an access."""
        return 16 // self.itemsize if self.aligned else 1


class Sweep(NamedTuple):
    """The pass over everything; fields as in places.cu's Call."""

    layout: str
    rows: int
    row: int
    vector: int
    fold: int
    columns: int
    tiles: int
    span: int
    tile: int
    passes: int
    blocks: int
    slots: int
    threads: int

    @property
    def grid(self) -> int:
        return self.tiles * self.blocks


class Places(NamedTuple):
    """The pass over the places drawn."""

    layout: str
    vector: int
    tile: int
    tiles: int
    blocks: int
    threads: int

    @property
    def grid(self) -> int:
        return self.tiles * self.blocks


@lru_cache(maxsize=4096)
def sweep(sizes: Sizes, multiprocessors: int) -> Sweep:
    """Return the geometry of the pass over everything."""
    N, C, S, last = sizes[:4]
    samples, element = (N * S, C) if last else (N, C * S)
    vector, fold = sizes.vector, 1
    if vector > 1:
        fold = vector // math.gcd(element, vector)
        if samples % fold or (not last and S < vector):
            vector, fold = 1, 1
    while fold * element // vector < WIDE and samples % (2 * fold) == 0:
        fold *= 2
    row, rows = fold * element, samples // fold
    columns = row // vector
    if last:
        layout, tile = "LAST", min(columns, WIDE if vector > 1 else 4 * WIDE)
    else:
        layout = "SEAMED" if vector > 1 and S % vector else "FIRST"
        whole = S // math.gcd(S, vector)  # columns that end where a channel ends
        tile = THREADS // whole * whole if whole <= THREADS else -(-whole // -(-whole // THREADS))
        tile = min(columns, tile)
    tiles = -(-columns // tile)
    quads = -(-rows // UNROLL)
    height = max(1, min(THREADS // tile, quads))
    blocks = max(1, min(-(-4 * multiprocessors // tiles), -(-quads // height)))
    slots = row if last else tiles + fold * C
    return Sweep(layout, rows, row, vector, fold, columns, tiles, tile, tile, 1, blocks, slots, tile * height)


@lru_cache(maxsize=4096)
def cluster(sizes: Sizes, multiprocessors: int) -> Sweep | None:
    """Return the geometry of the fused kernels, or None where the array does not suit them."""
    N, C, S, last = sizes[:4]
    vector, rows = sizes.vector, N
    quads = -(-rows // UNROLL)
    group = vector // math.gcd(S, vector)
    if last or vector == 1 or vector > S or C % group or quads < CLUSTER:
        return None
    if sweep(sizes, multiprocessors).fold > 1:  # the mask's rows are the same, whichever kernels run
        return None
    while 2 * group <= GROUP and C % (2 * group) == 0 and 2 * group * S // vector <= THREADS // 4:
        group *= 2
    span, tiles = group * S // vector, C // group
    if tiles * CLUSTER < multiprocessors or (span > THREADS and group > 1):
        return None
    passes = -(-span // THREADS)
    tile = -(-span // passes)
    share = -(-quads // CLUSTER)
    height = max(1, min(THREADS // tile, share))
    height = -(-share // -(-share // height))
    layout = "SEAMED" if S % vector else "FIRST"
    row = C * S
    columns, slots = row // vector, tiles + C
    return Sweep(
        layout, rows, row, vector, 1, columns, tiles, span, tile, passes, CLUSTER, slots, tile * height
    )


@lru_cache(maxsize=4096)
def places(sizes: Sizes, count: int, multiprocessors: int) -> Places:
    """Return the geometry of the pass over ``count`` places a channel."""
    C, last = sizes.C, sizes.last
    vector = sizes.vector if last and C % sizes.vector == 0 else 1
    columns = C // vector
    tile = 1 if not last else min(columns, WIDE if vector > 1 else 4 * WIDE)
    tiles = -(-columns // tile)
    height = THREADS // tile
    blocks = max(1, min(-(-4 * multiprocessors // tiles), PLACES, -(-count // (UNROLL * height))))
    return Places("LAST" if last else "FIRST", vector, tile, tiles, blocks, tile * height)


class Cut(NamedTuple):
    """A call's geometry: of the fused kernels where there is a fused one, else of the separate ones."""

    sweep: Sweep
    places: Places
    fused: bool
    packed: bytes  # as part of a Call


_GEOMETRY = struct.Struct("<17q")


@lru_cache(maxsize=4096)
def cut(sizes: Sizes, count: int, multiprocessors: int, fused: bool) -> Cut:
    """Return the geometry of a call with ``count`` places a channel."""
    found = cluster(sizes, multiprocessors) if fused else None
    over = found or sweep(sizes, multiprocessors)
    at = places(sizes, count, multiprocessors)
    return Cut(over, at, found is not None, packed(sizes, over, at))


def packed(sizes: Sizes, sweep: Sweep, places: Places) -> bytes:
    """Return the part of a Call that the geometry fills."""
    return _GEOMETRY.pack(*sizes[:3], *sweep[1:12], places.tile, places.tiles, places.blocks)
