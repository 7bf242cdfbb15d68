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


def has_prior(sampler: sbn.Sampler) -> bool:
    """Return whether a sampler may give weight to given statistics; one of the user's own may."""
    if isinstance(sampler, sbn.Mixture):
        return any(has_prior(one) for _, one in sampler.components)
    return isinstance(sampler, sbn.Prior) or not sampler.settled
