"""What compiled code draws (`sbncore.cpu.runs`): the runs of the commonest plans."""

from __future__ import annotations

from collections.abc import Callable
from ctypes import addressof

import numpy as np

from sbncore.arrays import address
from sbncore.cpu.kernels import compiled
from sbncore.cpu.record import Draw as Argument
from sbncore.plans import Draw, MapPlaces, Plan, Recipe, Runs, WholeSamples

FEW = 4  # runs of a map, that are drawn here
LARGEST = 2**63 - 1  # of an int64


def takes(recipe: Recipe) -> bool:
    """Whether the runs of a recipe are found here."""
    if len(recipe.parts) != 1:
        return False
    part = recipe.parts[0]
    if type(part) is WholeSamples:
        return part.stride > 0
    return type(part) is MapPlaces and part.positions <= FEW * part.length


def drawing(recipe: Recipe) -> Callable[[int, int, int], Runs]:
    """Return what finds the runs of a recipe that is taken here, of (seed, layer, step), signed words."""
    part = recipe.parts[0]
    fixed = {
        "stream": part.key, "first": part.first, "rows": part.rows, "S": recipe.S,
        "weight": part.weight / part.count,
    }  # fmt: skip
    if isinstance(part, WholeSamples):
        if recipe.full:
            everything = Plan(recipe).runs
            return lambda *_: everything
        name, most = "whole_samples", part.samples
        fixed |= {"samples": part.samples, "stride": part.stride}
    else:
        assert isinstance(part, MapPlaces)
        length = min(part.length, part.positions)
        name, most = "map_places", (-(-part.positions // length) + 1) * part.rows
        fixed |= {
            "positions": part.positions, "run": length, "stride": part.stride, "align": part.align,
            "common": part.common,
        }  # fmt: skip
    template, share = bytes(Argument(**fixed)), np.empty(most)  # all draws write the same weights
    row = 8 * most

    def draw(seed: int, layer: int, step: int) -> Runs:
        places = compiled(name)
        if places is None:  # by a process's first kernel
            return Plan(recipe, Draw(seed, layer, step)).runs
        record, room = Argument.from_buffer_copy(template), np.empty((2, most), np.int64)
        record.seed, record.layer, record.step = seed, layer, step
        record.begin, record.share = address(room), address(share)
        record.length = record.begin + row
        places(addressof(record))
        count = record.count
        return Runs(room[0, :count], room[1, :count], share[:count])

    return draw


def fits(draw: Draw) -> bool:
    """Whether a draw's words are int64s."""
    return min(draw) >= -LARGEST - 1 and max(draw) <= LARGEST
