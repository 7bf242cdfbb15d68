"""A model's BatchNorm layers into sampled ones, and back: same Parameters, same buffers, same state_dict."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Mapping
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

import sbncore as sbn
from sbncore.adapters.torch.fuse import fuse as fuse_layers
from sbncore.adapters.torch.fuse import unfuse
from sbncore.adapters.torch.layers import (
    FULL,
    OPTIONS,
    SampledBatchNorm,
    SampledBatchNorm1d,
    SampledBatchNorm2d,
    SampledBatchNorm3d,
)
from sbncore.adapters.torch.virtual import VirtualBatch
from sbncore.samplers import DEFAULT

PAIRS: dict[type[_BatchNorm], type[SampledBatchNorm]] = {
    nn.BatchNorm1d: SampledBatchNorm1d,
    nn.BatchNorm2d: SampledBatchNorm2d,
    nn.BatchNorm3d: SampledBatchNorm3d,
    nn.SyncBatchNorm: SampledBatchNorm,
}
Skip = Collection[str] | Callable[[str, nn.Module], bool]


def convert_sampled_batchnorm(
    model: nn.Module,
    sampler: sbn.Sampler | Mapping[str, sbn.Sampler] = DEFAULT,
    *,
    gradient: str = "exact",
    fuse: bool = False,
    skip: Skip = (),
    process_group: Any = None,
    seed: int = 0,
    skip_nonfinite: bool = False,
    own_rows: bool = False,
) -> nn.Module:
    """Replace a model's BatchNorm layers, in place, by sampled ones that share their Parameters and buffers.

    Each keeps its mode, device, dtype, hooks and place in the state_dict, and gets as ``layer`` its number
    among all the model's BatchNorm layers, in the order of ``named_modules``. A SyncBatchNorm keeps its
    process group. A subclass of torch's four layers is converted if it adds nothing to its base, and is else
    left. What was left, and a model that has no BatchNorm layer, is said in one warning.

    Args:
        model: any module; it may be a BatchNorm layer itself.
        sampler, gradient, process_group, seed, skip_nonfinite, own_rows: as `SampledBatchNorm`, but that a
            sixteenth is drawn if none is given, in up to four runs a map, 1,024 values per channel at least:
            ``FeatureSampling(1/16, "runs", at_least=1024)``. Samplers by the names of layers, as
            `suggest_samplers` returns them, leave the layers not named as they are.
        fuse: also fuse BatchNorm and ReLU, and BatchNorm, addition and ReLU, where torch.fx can trace a
            module (`sbncore.adapters.torch.fuse`); what it cannot is said in a warning.
        skip: names of layers as in ``named_modules``, or a function of (name, layer), to be left as they are.

    Returns:
        The model, or the layer (or traced module) that replaces it.

    Raises:
        TypeError, ValueError: for arguments, unknown names in skip, layers of a `VirtualBatch` that would
            not draw from its virtual samples and layers whose eps or momentum is out of range among them,
            before anything is replaced.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    options: dict[str, Any] = {
        "gradient": gradient,
        "seed": seed,
        "skip_nonfinite": skip_nonfinite,
        "own_rows": own_rows,
    }
    by_name = sampler if isinstance(sampler, Mapping) else None
    chosen: Any = (sampler,) if by_name is None else (FULL, *by_name.values())
    for one in chosen:
        SampledBatchNorm(1, sampler=one, process_group=process_group, **options)  # complains
    skipped = _skipper(model, skip)
    if by_name is not None:
        _known(model, by_name, "sampler")
    numbers: dict[nn.Module, int] = {}
    samplers: dict[nn.Module, Any] = {}
    notes: list[str] = []
    for name, module in model.named_modules(remove_duplicate=False):
        if not isinstance(module, _BatchNorm) or module in samplers:
            continue
        obstacle = _obstacle(module)
        if obstacle is None:
            numbers.setdefault(module, len(numbers))
        if skipped(name, module) or (by_name is not None and name not in by_name):
            continue
        if obstacle is None:
            samplers[module] = sampler if by_name is None else by_name[name]
            _check_options(name, module)
        else:
            notes.append(f"{name}: {obstacle}")
    if not any(isinstance(module, _BatchNorm) for module in model.modules()):
        notes.append(f"{type(model).__name__} has no BatchNorm layer, and stays as it is")
    _check_virtual(model, samplers)

    def sampled(module: nn.Module) -> nn.Module:
        if module not in samplers:
            return module
        group = process_group or getattr(module, "process_group", None)
        if group is None and isinstance(module, nn.SyncBatchNorm):
            group = "world"
        plain = _plain(module)
        new = _like(module, type(module) if plain is None else PAIRS[plain])
        if plain is not None:
            new.__dict__["_converted_from"] = type(module)
        activation = getattr(module, "activation", None) if plain is None else None
        new.configure(
            sampler=samplers[module],
            activation=activation,
            process_group=group,
            layer=numbers[module],
            **options,
        )
        return new

    model = _replaced(model, sampled)
    if fuse:
        model, messages = fuse_layers(model)
        notes += messages
    if notes:
        warnings.warn(_summary(notes), stacklevel=2)
    return model


def revert_sampled_batchnorm(model: nn.Module) -> nn.Module:
    """Replace a model's sampled layers, in place, by torch's own that share their Parameters and buffers.

    What was fused is undone, classes, ``forward`` and ReLU modules, but in a ``torch.fx.GraphModule``. A
    layer that has an activation then has no equal among torch's: it stays, its sampler `sbncore.Full`.
    """
    unfuse(model)
    back = {sampled: plain for plain, sampled in PAIRS.items()}

    def plain(module: nn.Module) -> nn.Module:
        if not isinstance(module, SampledBatchNorm):
            return module
        if module.activation is not None or type(module) not in back:
            module.sampler = FULL
            return module
        new = _like(module, vars(module).get("_converted_from", back[type(module)]))
        kept = ("eps", "momentum", "process_group" if isinstance(new, nn.SyncBatchNorm) else "eps")
        for name in {*OPTIONS, "_name", "_has_prior", "untracked", "_converted_from", "_fused"} - {*kept}:
            new.__dict__.pop(name, None)
        if getattr(new, "process_group", None) == "world":
            new.process_group = None
        return new

    return _replaced(model, plain)


def _plain(module: nn.Module) -> type[_BatchNorm] | None:
    """Return which of torch's layers it is, or None for a sampled one and for others."""
    if isinstance(module, SampledBatchNorm):
        return None
    return next((kind for kind in type(module).__mro__ if kind in PAIRS), None)


# What every class has, and a constructor, which has run.
_NOTHING = {
    "__module__", "__qualname__", "__doc__", "__init__", "__annotations__", "__annotate_func__",
    "__annotations_cache__", "__static_attributes__", "__firstlineno__", "__parameters__",
}  # fmt: skip


def _obstacle(module: nn.Module) -> str | None:
    """Return why a BatchNorm layer cannot be converted, or None."""
    if isinstance(module, SampledBatchNorm):
        return None
    kind, plain = type(module), _plain(module)
    if kind.__name__.startswith("LazyBatchNorm"):
        return "a lazy layer is converted after its first call, not now"
    if plain is None or kind.forward is not plain.forward or "forward" in vars(module):
        return f"{kind.__name__} has its own forward and is left"
    between = kind.__mro__[: kind.__mro__.index(plain)]
    added = sorted({name for base in between for name in vars(base)} - _NOTHING)
    return f"{kind.__name__} has {', '.join(added)} of its own and is left" if added else None


def _check_options(name: str, module: nn.Module) -> None:
    for option in ("eps", "momentum"):
        try:
            OPTIONS[option](getattr(module, option))
        except (TypeError, ValueError) as complaint:
            raise type(complaint)(f"{name}: {complaint}") from None


def _summary(notes: list[str]) -> str:
    """Return all notes as one, those that say the same of several layers together."""
    by_text: dict[str, list[str]] = {}
    for note in notes:
        name, separator, text = note.partition(": ")
        by_text.setdefault(text if separator else note, []).append(name if separator else "")
    return "\n".join(f"{', '.join(names)}: {text}" if names[0] else text for text, names in by_text.items())


def _like(module: nn.Module, kind: type[Any]) -> Any:
    """Return a module of another class that has all that the module has: Parameters, buffers, hooks, mode."""
    new = object.__new__(kind)
    new.__dict__ = {
        name: value.copy() if isinstance(value, dict | set) else value
        for name, value in module.__dict__.items()
    }
    return new


def _replaced(model: nn.Module, replacement: Callable[[nn.Module], nn.Module]) -> nn.Module:
    """Replace modules wherever they occur; one that occurs twice, twice by the same."""
    news = {module: replacement(module) for module in model.modules()}
    for module in news:
        for name, child in module._modules.items():
            if child is not None:
                module._modules[name] = news[child]
    return news[model]


def _skipper(model: nn.Module, skip: Skip) -> Callable[[str, nn.Module], bool]:
    if callable(skip):
        return skip
    if isinstance(skip, str):
        raise TypeError(f"skip: expected a collection of names, got the string {skip!r}")
    if not isinstance(skip, Collection):
        raise TypeError(f"skip: expected a collection of names or a function, got {skip!r}")
    names = set(skip)
    _known(model, names, "skip")
    return lambda name, module: name in names


def _known(model: nn.Module, names: Collection[str], argument: str) -> None:
    modules = model.named_modules(remove_duplicate=False)
    known = [name for name, module in modules if isinstance(module, _BatchNorm)]
    unknown = set(names) - set(known)
    if unknown:
        got = sorted(unknown, key=str)
        raise ValueError(
            f"{argument}: expected names of BatchNorm layers of the model, got {got}; it has "
            f"{', '.join(map(repr, known)) or 'none'}"
        )


def _check_virtual(model: nn.Module, samplers: Mapping[nn.Module, sbn.Sampler]) -> None:
    for batch in model.modules():
        if not isinstance(batch, VirtualBatch):
            continue
        for name, module in batch.named_modules():
            if module in samplers and samplers[module].virtual != batch.count:
                raise ValueError(
                    f"sampler: expected one with VirtualSamples({batch.count}) for {name!r}, which a "
                    f"VirtualBatch holds, got {samplers[module]}"
                )
