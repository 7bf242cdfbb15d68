"""Which sampler each layer of a model can do with, judged by what goes into it."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_map

import sbncore as sbn
from sbncore.adapters.torch.layers import FULL, SampledBatchNorm
from sbncore.adapters.torch.virtual import VirtualBatch
from sbncore.estimates import samplers, tried


class Suggested(dict[str, sbn.Sampler]):
    """The samplers by the layers' names; printed, why each was chosen.

    Attributes:
        tried: of each layer what `sbncore.suggest` found, the cheapest first, its choice last.
        shapes, sizes: of each layer's input, the sizes in bytes.
    """

    def __init__(self) -> None:
        super().__init__()
        self.tried: dict[str, list[sbn.Fidelity]] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.sizes: dict[str, int] = {}

    @property
    def passes(self) -> float:
        """`sbncore.Fidelity.passes` of the choices, a mean weighted by the layers' bytes."""
        total = sum(self.sizes.values())
        return sum(self.sizes[name] * found[-1].passes for name, found in self.tried.items()) / total

    def __str__(self) -> str:
        total, lines = sum(self.sizes.values()), []
        for name, found in self.tried.items():
            share = f"{self.sizes[name] / total:.0%} of the bytes"
            lines.append(f"{name}: {self.shapes[name]}, {share}: {self[name]}, {_figures(found[-1])}")
            lines += [f"    too far off: {one.sampler}, {_figures(one)}" for one in found[-3:-1]]
        lines.append(f"all layers: {self.passes:.1f} passes over their memory, full batch normalization 8")
        return "\n".join(lines)

    def as_dict(self) -> dict[str, Any]:
        """Return all that was found in strings, numbers, lists and dicts, as `json.dumps` takes them.

        By the layer's name its input's shape and bytes, the sampler, and of each candidate tried its error
        in standard deviations, the share of the input that it reads and the passes over memory.
        """
        return {
            name: {
                "shape": list(self.shapes[name]),
                "bytes": self.sizes[name],
                "sampler": str(self[name]),
                "tried": [
                    {
                        "sampler": str(one.sampler),
                        "error": one.error,
                        "share": one.share,
                        "passes": one.passes,
                    }
                    for one in found
                ],
            }
            for name, found in self.tried.items()
        }

    def picture(self, file: Any) -> None:
        """Draw each layer's candidates, error over passes, the choice marked; in the format of the name.

        Args:
            file: a path, or a file opened for writing bytes.

        Raises:
            ModuleNotFoundError: without Matplotlib.
        """
        from matplotlib.figure import Figure

        figure = Figure((7, 4.5), layout="constrained")
        axes = figure.subplots()
        for name, found in self.tried.items():
            (line,) = axes.plot([one.passes for one in found], [one.error for one in found], ".:", alpha=0.6)
            axes.plot(found[-1].passes, found[-1].error, "o", color=line.get_color(), label=name)
        axes.set_ylim(0)
        axes.set_xlabel("passes over memory, forward and backward (full batch normalization: 8)")
        axes.set_ylabel("error of the statistics, standard deviations")
        axes.legend(title="layer, its choice", fontsize="small", ncols=2)
        figure.savefig(file)


def _figures(found: sbn.Fidelity) -> str:
    return f"error {found.error:.3f}, {found.passes:.1f} passes"


def suggest_samplers(
    model: nn.Module,
    batch: Any,
    *,
    tolerance: float = 0.03,
    candidates: Iterable[sbn.Sampler] | None = None,
    draws: int = 16,
    seed: int = 0,
) -> Suggested:
    """Return `sbncore.suggest` of every BatchNorm layer's input, by the layers' names; print it to see why.

    One forward of a copy, uncompiled, with full statistics and without gradients; the model, its statistics,
    the batch and torch's random numbers stay as they are. Of a layer that is called more than once, what the
    last of the inputs for which the others' did not do wants. ``convert_sampled_batchnorm(model, suggested)``
    takes what is returned.

    Args:
        model: any module with torch's BatchNorm layers, or sampled ones, before or after some training. One
            in evaluation mode is judged in training mode; in one that trains, layers in evaluation mode stay
            so.
        batch: what to call the model with, a tensor or a tuple of arguments: a training batch, not a small
            one, since errors depend on its size.
        tolerance, candidates, draws, seed: as `sbncore.suggest`, but no virtual samples.

    Raises:
        TypeError: for a model that is none, or that ``copy.deepcopy`` refuses.
        ValueError: for one without BatchNorm layers that are called, or with a `VirtualBatch`, whose noise
            is no data: judge its ``model``.
        As `sbncore.suggest`, naming the layer.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    if candidates is not None:
        candidates = samplers("candidates", candidates)
        if any(one.virtual for one in candidates):
            raise ValueError("candidates: expected samples of the batch, got virtual samples")
    options = {"tolerance": tolerance, "candidates": candidates, "draws": draws, "seed": seed}
    chosen = Suggested()
    copied = _copy(model)
    for name, module in copied.named_modules():
        if isinstance(module, _BatchNorm):
            if isinstance(module, SampledBatchNorm):
                module.sampler = FULL
            module.register_forward_pre_hook(partial(_judge, chosen, name, options), with_kwargs=True)
    inputs = tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, batch)
    with torch.no_grad(), torch.random.fork_rng(), torch.compiler.set_stance("force_eager"):
        copied(*(inputs if type(inputs) is tuple else (inputs,)))
    if not chosen:
        raise ValueError("model: expected BatchNorm layers that a forward calls, found none")
    return chosen


def _copy(model: nn.Module) -> nn.Module:
    for name, module in model.named_modules():
        if isinstance(module, VirtualBatch):
            here = f"its {name!r}" if name else "one"
            raise ValueError(f"model: expected no VirtualBatch, got {here}; judge what is inside, its .model")
    try:
        copied = copy.deepcopy(model)
    except Exception as refusal:
        raise TypeError(f"model: expected one that copy.deepcopy can copy, got: {refusal}") from refusal
    return copied if model.training else copied.train()


def _judge(
    chosen: Suggested,
    name: str,
    options: dict[str, Any],
    layer: Any,
    arguments: tuple[Any, ...],
    keywords: dict[str, Any],
) -> None:
    """Before a layer's forward: choose for its input."""
    x = (arguments[0] if arguments else keywords["input"]).detach()
    draw = {"draws": options["draws"], "seed": options["seed"], "eps": layer.eps}
    try:
        before = chosen.get(name)
        if before is None or not sbn.fidelity(x, before, **draw).error <= options["tolerance"]:
            found = tried(x, eps=layer.eps, **options)
            chosen[name], chosen.tried[name] = found[-1].sampler, found
            chosen.shapes[name], chosen.sizes[name] = tuple(x.shape), x.nbytes
    except (TypeError, ValueError) as complaint:
        raise type(complaint)(f"{name}: {complaint}") from complaint
