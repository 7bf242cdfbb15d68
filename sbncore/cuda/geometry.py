"""How the kernels divide their work: pure functions of sizes, which the launch and the emulator share.

Constants bear the names they have in the kernels.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from sbncore.plans import MapPlaces, Part, ScatteredPlaces, WholeSamples

THREADS = 256  # of a block, at most
WARP = 32
UNROLL = 4  # rows that a thread takes at a time
ACCESSES = 8  # of a piece of a run, that a thread takes
CHANNELS = 264  # of a tile, at most
FINISHED = 2  # channels that a block finishes
# Blocks of a pass over everything for each multiprocessor. One that sums takes as many as are resident,
# since each leaves its sums; one that only writes ends more evenly in many. Measured on an H200.
WRITING, SUMMING, SUMMING_SETS = 16, 4, 2
PROLOGUE = 1  # what a block's beginning and end cost, in steps of UNROLL rows
WIDE = 8  # columns of a channels-last tile: 128 bytes
PLACES = 2  # blocks of a pass over places for each multiprocessor
STRIDED, DISTINCT, MAP, SCATTERED = range(4)
MOST = 512  # blocks of it that share a tile: their sums are added up afterwards


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
    tile: int
    share: int
    slots: int
    tiles: int
    blocks: int
    threads: int

    @property
    def grid(self) -> tuple[int, int]:
        return self.tiles, self.blocks


class Runs(NamedTuple):
    """A part of a plan, but for its keys: groups of runs; fields as in places.cu's Part."""

    weight: float  # p of each place
    kind: int
    first: int
    rows: int
    groups: int
    positions: int
    length: int
    stride: int
    align: int
    starts: int  # places where a run may begin
    common: bool

    @property
    def number(self) -> int:
        """Runs of a group."""
        return -(-self.positions // self.length)


class Pieces(NamedTuple):
    """How threads share a run."""

    pieces: int  # of a run
    piece: int  # accesses
    lanes: int  # threads of a piece
    share: int  # pieces of a block


class Places(NamedTuple):
    """The pass over the places drawn."""

    layout: str
    vector: int
    tile: int
    tiles: int
    blocks: int
    threads: int
    pieces: tuple[Pieces, ...]  # of each part

    @property
    def grid(self) -> tuple[int, int]:
        return self.tiles, self.blocks


def sweep(sizes: Sizes, multiprocessors: int, sums: bool = False) -> Sweep:
    """Return the geometry of a pass over everything that leaves sums, or does not."""
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
        tile = columns if columns <= WARP else _least_waste(columns)
    tiles = -(-columns // tile)
    quads = -(-rows // UNROLL)
    height = max(1, min(THREADS // tile, quads))
    steps = -(-quads // height)
    resident = WRITING if not sums else SUMMING if layout == "FIRST" else SUMMING_SETS
    share = -(-steps // _blocks(tiles, steps, resident * multiprocessors)) * height
    slots = row if last else tiles + fold * C
    blocks = -(-quads // share)
    return Sweep(layout, rows, row, vector, fold, columns, tile, share, slots, tiles, blocks, tile * height)


def _least_waste(columns: int) -> int:
    """Return a tile of whole warps, the widest of those that leave the fewest threads without a column."""
    tiles = range(THREADS, 0, -WARP)
    return min(tiles, key=lambda tile: -(-columns // tile) * tile)


def _blocks(tiles: int, steps: int, resident: int) -> int:
    """Return how many blocks share a tile's steps: those after which the last block ends soonest."""
    waves = lambda blocks: -(-tiles * blocks // resident)  # noqa: E731
    most = min(steps, max(1, 2 * resident // tiles))
    return min(range(1, most + 1), key=lambda blocks: waves(blocks) * (-(-steps // blocks) + PROLOGUE))


def runs_of(part: Part, size: int) -> Runs:
    """Return the runs of a part in maps of ``size`` positions."""
    p = part.weight / part.count
    if isinstance(part, WholeSamples):
        kind = STRIDED if part.stride else DISTINCT
        return Runs(p, kind, part.first, part.rows, part.samples, size, size, part.stride, 1, 1, False)
    if isinstance(part, MapPlaces):
        length, starts = min(part.length, part.positions), size // part.align
        shape = part.rows, part.positions, length, part.stride, part.align, starts, part.common
        return Runs(p, MAP, part.first, part.rows, *shape)
    assert isinstance(part, ScatteredPlaces)
    return Runs(p, SCATTERED, part.first, part.rows, part.positions, 1, 1, 0, 1, 1, False)


def words_of(runs: Runs, width: int, size: int) -> int:
    """Return in how many words of ``width`` positions a run lies at most, in maps of ``size`` positions.

    Words begin at multiples of the width in memory, wherever a run does; a run that wraps has two ends more.
    """
    begins = size if runs.kind in (STRIDED, DISTINCT) else runs.align if runs.kind == MAP else 1
    several = runs.stride if runs.length < runs.positions else 0
    unit = math.gcd(width, size, begins, runs.length, runs.positions, several)
    units, of_word = runs.length // unit, width // unit
    return min(units, (units - 4) // of_word + 4)


def pieces_of(runs: Runs, words: int, height: int, blocks: int) -> Pieces:
    """Return how some blocks of ``height`` rows share a part, a run of which lies in so many words.

    In the fewest rounds, since each waits for memory; then by the most threads, whose accesses lie together.
    """

    def shared(lanes: int) -> tuple[int, Pieces]:
        pieces, together = -(-words // (lanes * ACCESSES)), height // lanes
        rounds = -(-runs.groups * runs.number * pieces // (blocks * together))
        return rounds, Pieces(pieces, lanes * ACCESSES, lanes, rounds * together)

    lanes = [1]
    while lanes[0] < words and 2 * lanes[0] <= min(WARP, height):
        lanes.insert(0, 2 * lanes[0])
    return min(map(shared, lanes), key=lambda each: each[0])[1]


def places(sizes: Sizes, parts: tuple[Runs, ...], vector: int, multiprocessors: int) -> Places:
    """Return the geometry of the pass over places, an access being at most ``vector`` elements."""
    C, S, last = sizes.C, sizes.S, sizes.last
    if last:
        vector = sizes.vector if C % sizes.vector == 0 else 1
    columns = C // vector if last else C
    # channels-first: so many channels, and below so many blocks, that all are resident at once
    wide = WIDE if not last or vector > 1 else 4 * WIDE
    tile = min(wide, columns if last else -(-C // (PLACES * multiprocessors)))
    tiles, height = -(-columns // tile), THREADS // tile
    most = max(1, min(PLACES * multiprocessors // tiles, MOST))
    width = 1 if last else vector
    pieces = tuple(pieces_of(runs, words_of(runs, width, S), height, most) for runs in parts)
    blocks = [
        -(-runs.groups * runs.number * each.pieces // each.share)
        for runs, each in zip(parts, pieces, strict=True)
    ]
    layout = "LAST" if last else "FIRST"
    return Places(layout, vector, tile, tiles, max(blocks, default=1), tile * height, pieces)


def fields(sizes: Sizes, writing: Sweep, summing: Sweep, places: Places) -> tuple[int, ...]:
    """Return what the kernels read of the geometry, in the order of places.cu's Call."""
    over = writing
    return (
        *sizes[:3],
        over.rows,
        over.row,
        over.vector,
        over.fold,
        over.columns,
        over.tile,
        over.share,
        summing.share,
        over.slots,
        places.tile,
    )
