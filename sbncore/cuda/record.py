"""The one argument of every CUDA kernel: the bytes of the struct Call in places.cu."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from sbncore.cuda.geometry import Pieces, Places, Runs
from sbncore.signature import Pointers

PARTS = 8  # of a recipe, at most


class Between(NamedTuple):
    """Addresses within the temporary memory: what kernels leave for those behind them."""

    partial: int = 0  # the blocks' sums
    shift: int = 0
    slopes: int = 0
    tables: Mapping[int, int] = {}  # of drawn values, by part


class Numbers(NamedTuple):
    """What a run sets beside pointers; fields as in places.cu's Call."""

    prior: float = 0.0
    eps: float = 0.0
    momentum: float = 0.0
    unbiased: float = 0.0
    total_scale: float = 0.0
    skip_nonfinite: bool = False
    elements: int = 0
    from_places: bool = False
    from_blocks: int = 0
    onto: bool = False
    writes: bool = True


Keys = Sequence[tuple[int, int]]  # of each part: its key, or what comes before the step, and its stream
_HEAD = struct.Struct("<21Q5d6q")
_GEOMETRY = struct.Struct("<13qq")  # and the number of parts
_KEY = struct.Struct("<QQ")
_PART = struct.Struct("<QQd15qQ")
_ONTO, _PARTS = _HEAD.size - 16, _HEAD.size + _GEOMETRY.size - 8  # where these fields begin
_FIRST_PART = _HEAD.size + _GEOMETRY.size
SIZE = _FIRST_PART + PARTS * _PART.size


def template(fields: tuple[int, ...], runs: tuple[Runs, ...], places: Places, full: bool) -> bytes:
    """Return the record that calls begin with: the geometry's fields, and the parts.

    Of parts that are everything kernels read the weight, and count none.
    """
    record = bytearray(SIZE)
    _GEOMETRY.pack_into(record, _HEAD.size, *fields, 0 if full else len(runs))
    for k, (each, pieces) in enumerate(zip(runs, places.pieces, strict=True)):
        _pack_part(record, k, each, pieces)
    return bytes(record)


def filled(
    template: bytes, at: Pointers, between: Between, numbers: Numbers, step_kept: int, keys: Keys
) -> bytes:
    """Return the bytes of a run."""
    record = bytearray(template)
    _HEAD.pack_into(
        record,
        0,
        at.y,
        at.dx,
        at.dresidual,
        at.mask,
        at.dweight,
        at.dbias,
        at.running_mean,
        at.running_var,
        at.state,
        step_kept,
        between.partial,
        between.shift,
        between.slopes,
        at.x,
        at.dy,
        at.residual,
        at.weight,
        at.bias,
        at.prior_mean,
        at.prior_var,
        at.step,
        *numbers,
    )
    for k, words in enumerate(keys):
        _KEY.pack_into(record, _FIRST_PART + k * _PART.size, *words)
    for k, table in between.tables.items():
        struct.pack_into("<Q", record, _FIRST_PART + (k + 1) * _PART.size - 8, table)
    return bytes(record)


def of_part(record: bytes, k: int) -> bytes:
    """Return the record of the repair of part k alone, onto that of the parts before it."""
    single = bytearray(record)
    begin = _FIRST_PART + k * _PART.size
    single[_FIRST_PART : _FIRST_PART + _PART.size] = record[begin : begin + _PART.size]
    struct.pack_into("<q", single, _PARTS, 1)
    struct.pack_into("<q", single, _ONTO, k > 0)
    return bytes(single)


def _pack_part(record: bytearray, k: int, runs: Runs, pieces: Pieces) -> None:
    weight, *sizes = runs
    _PART.pack_into(record, _FIRST_PART + k * _PART.size, 0, 0, weight, *sizes, runs.number, *pieces, 0)
