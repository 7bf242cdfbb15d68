"""What compiled code draws (`sbncore.cpu.places`): the runs of the commonest plans."""

from __future__ import annotations

from collections.abc import Callable
from ctypes import addressof

import numpy as np

from sbncore.cpu.kernels import compiled
from sbncore.cpu.record import Draw, addresses
from sbncore.plans import MapPlaces, Plan, Runs, WholeSamples

FEW = 4  # runs of a map, that are drawn here
LARGEST = 2**63 - 1  # of an int64


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
    part = recipe.parts[0]
    fixed = {
        "stream": part.key, "first": part.first, "rows": part.rows, "S": recipe.S,
        "weight": part.weight / part.count,
    }  # fmt: skip
    if isinstance(part, WholeSamples):
        if recipe.full:
            everything = recipe.runs
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
    template, share = bytes(Draw(**fixed)), np.empty(most)  # all draws write the same weights
    row = 8 * most

    def draw(seed: int, layer: int, step: int) -> Runs:
        places = compiled(name)
        if places is None:  # by a process's first kernel
            return recipe.drawn(seed, layer, step).runs
        record, room = Draw.from_buffer_copy(template), np.empty((2, most), np.int64)
        record.seed, record.layer, record.step = seed, layer, step
        record.begin, record.share = begin, _ = addresses(room, share)
        record.length = begin + row
        places(addressof(record))
        count = record.count
        return Runs(room[0, :count], room[1, :count], share[:count])

    return draw


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
