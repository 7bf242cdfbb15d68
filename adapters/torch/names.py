"""The samplers by the names that torch's operators know them by, since a schema takes no sampler."""

from __future__ import annotations

import sbncore as sbn

_samplers: dict[str, sbn.Sampler] = {}


def name_of(sampler: sbn.Sampler) -> str:
    """Return the name of a sampler in this process."""
    name = repr(sampler)
    _samplers[name] = sampler
    return name


def named(name: str) -> sbn.Sampler:
    """Return the sampler of a name that was given."""
    return _samplers[name]
