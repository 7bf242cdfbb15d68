"""A kernel's one argument: the bytes of the struct Call in places.cu, and of the parts of a plan in it."""

from __future__ import annotations

import struct
from typing import Any

from sbncore.plans import MapPlaces, Part, ScatteredPlaces, WholeSamples

PARTS = 8  # of a plan, at most
SORTED = 4096  # up to this size, distinct values are drawn by a kernel of its own
STRIDED, DISTINCT, MAP, SCATTERED = range(4)
OWN = {name: 1 << bit for bit, name in enumerate(
    ("weight", "bias", "prior_mean", "prior_var", "running_mean", "running_var"))}  # fmt: skip

POINTERS = (
    "y", "dx", "dresidual", "mask", "dweight", "dbias", "running_mean", "running_var", "state", "step_kept",
    "partial", "x", "dy", "residual", "weight", "bias", "prior_mean", "prior_var", "step",
)  # fmt: skip
_POINTERS = struct.Struct(f"<{len(POINTERS)}Q")
_NUMBERS = struct.Struct("<5d5q")
_PART = struct.Struct("<QQd9qQ")
SIZE = _POINTERS.size + _NUMBERS.size + 17 * 8 + 8 + PARTS * _PART.size


def pack(
    pointers: dict[str, int],
    geometry: bytes,
    parts: bytes,
    *,
    prior: float = 0.0,
    eps: float = 0.0,
    momentum: float = 0.0,
    unbiased: float = 0.0,
    total_scale: float = 0.0,
    skip_nonfinite: bool = False,
    elements: int = 0,
    from_places: bool = False,
    from_blocks: int = 0,
    onto: bool = False,
) -> bytes:
    """Return the bytes of a Call; absent pointers are 0."""
    get = pointers.get
    call = b"".join((
        _POINTERS.pack(*[get(name, 0) for name in POINTERS]),
        _NUMBERS.pack(prior, eps, momentum, unbiased, total_scale, skip_nonfinite, elements, from_places,
                      from_blocks, onto),
        geometry,
        parts,
    ))  # fmt: skip
    return call.ljust(SIZE, b"\0")


def pack_parts(parts: tuple[Part, ...], size: int, tables: dict[int, int], walked: bool = True) -> bytes:
    """Return the parts of a Call, for maps of ``size`` positions.

    ``tables`` holds the address of the values that part k draws, where `table_size` says that it has some.
    Unless ``walked``, the first part lends its weight and no places.
    """
    packed = [_pack(part, size, tables.get(k, 0)) for k, part in enumerate(parts)]
    return struct.pack("<q", len(parts) if walked else 0) + b"".join(packed)


def table_size(part: Part, size: int) -> int:
    """Return how many drawn values a part keeps in device memory: none where the kernels hash them."""
    if isinstance(part, ScatteredPlaces) and part.rows * size <= SORTED:
        return part.positions
    if isinstance(part, WholeSamples) and not part.stride and part.rows <= SORTED:
        return part.samples
    return 0


def range_size(part: Part, size: int) -> int:
    """Return of how many values a part draws."""
    return part.rows * size if isinstance(part, ScatteredPlaces) else part.rows


def _pack(part: Part, size: int, table: int) -> bytes:
    key = part.key
    words: tuple[int, int] = (key, 0) if isinstance(key, int) else (key.before, key.stream)
    weight = part.weight / part.count
    if isinstance(part, WholeSamples):
        kind = STRIDED if part.stride else DISTINCT
        shape: tuple[Any, ...] = (part.samples, size, size, part.stride, 1, 0)
    elif isinstance(part, MapPlaces):
        kind, shape = MAP, (part.rows, part.positions, part.length, part.stride, part.align, part.common)
    else:
        assert isinstance(part, ScatteredPlaces)
        kind, shape = SCATTERED, (part.positions, 1, 1, 0, 1, 0)
    return _PART.pack(*words, weight, kind, part.first, part.rows, *shape, table)
