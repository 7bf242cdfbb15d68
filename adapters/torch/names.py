"""The samplers by the names that torch's operators know them by, since a schema takes no sampler."""

from __future__ import annotations

import sbncore as sbn

_samplers: dict[str, sbn.Sampler] = {}


def name_of(sampler: sbn.Sampler) -> str:
    """Return the name of a sampler in this process: its repr, and a number where another bears that."""
    name = first = repr(sampler)
    number = 1
    while _samplers.setdefault(name, sampler) != sampler:
        number += 1
        name = f"{first} #{number}"
    return name


def named(name: str) -> sbn.Sampler:
    """Return the sampler of a name that was given."""
    return _samplers[name]
