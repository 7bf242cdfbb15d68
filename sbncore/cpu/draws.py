"""What compiled code draws (`sbncore.cpu.runs`): the runs of the commonest plans."""

from __future__ import annotations

import struct
from collections.abc import Callable
from ctypes import addressof
from typing import Any, NamedTuple

import numpy as np

from sbncore.arrays import address
from sbncore.cpu.kernels import compiled
from sbncore.cpu.record import Draw as Argument
from sbncore.plans import Draw, MapPlaces, Plan, Recipe, Runs, WholeSamples

FEW = 4  # runs of a map, that are drawn here
LARGEST = 2**63 - 1  # of an int64
_WORDS = struct.Struct("<3q")  # from Argument.seed on
_ADDRESSES = struct.Struct("<3q")  # from Argument.begin on


class Drawn(NamedTuple):
    """A plan's runs as kernels read them: how many there are, their addresses, and what keeps the memory."""

    number: int
    begin: int
    length: int
    share: int
    memory: Any

    @classmethod
    def of(cls, runs: Runs) -> Drawn:
        """Return runs that are spelled out."""
        begin, length, share = map(address, runs)
        return cls(len(runs.begin), begin, length, share, runs)


def takes(recipe: Recipe) -> bool:
    """Whether the runs of a recipe are found here."""
    if len(recipe.parts) != 1:
        return False
    part = recipe.parts[0]
    if type(part) is WholeSamples:
        return part.stride > 0
    return type(part) is MapPlaces and part.positions <= FEW * part.length


def drawing(recipe: Recipe) -> Callable[[Draw], Drawn]:
    """Return what finds the runs of a recipe that is taken here, of a draw whose words are int64s."""
    part = recipe.parts[0]
    fixed = {
        "stream": part.key,
        "first": part.first,
        "rows": part.rows,
        "S": recipe.S,
        "weight": part.weight / part.count,
    }
    if isinstance(part, WholeSamples):
        if recipe.full:
            everything = Drawn.of(Plan(recipe).runs)
            return lambda draw: everything
        name, most = "whole_samples", part.samples
        fixed |= {"samples": part.samples, "stride": part.stride}
    else:
        assert isinstance(part, MapPlaces)
        length = min(part.length, part.positions)
        name, most = "map_places", (-(-part.positions // length) + 1) * part.rows
        fixed |= {
            "positions": part.positions,
            "run": length,
            "stride": part.stride,
            "align": part.align,
            "common": part.common,
        }
    template, share = bytes(Argument(**fixed)), np.empty(most)  # all draws write the same weights
    weights, row = address(share), 8 * most

    def find(draw: Draw) -> Drawn:
        places = compiled(name)
        if places is None:  # by a process's first kernel
            return Drawn.of(Plan(recipe, draw).runs)
        record, room = Argument.from_buffer_copy(template), np.empty(2 * most, np.int64)
        begin = address(room)
        _WORDS.pack_into(record, Argument.seed.offset, *draw)
        _ADDRESSES.pack_into(record, Argument.begin.offset, begin, begin + row, weights)
        places(addressof(record))
        return Drawn(record.count, begin, begin + row, weights, (room, share))

    return find


def fits(draw: Draw) -> bool:
    """Whether a draw's words are int64s."""
    seed, layer, step = draw
    return -LARGEST <= seed <= LARGEST and -LARGEST <= layer <= LARGEST and -LARGEST <= step <= LARGEST
