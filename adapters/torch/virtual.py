"""VirtualBatch: appends synthetic samples to a training batch and strips them from what comes out."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from sbncore import noise
from sbncore.adapters.torch import replay, rows
from sbncore.adapters.torch.layers import SampledBatchNorm
from sbncore.adapters.torch.ops import word
from sbncore.drawing import integer
from sbncore.hashing import GOLDEN, MASK, absorb

Distribution = Callable[[Tensor, int, int, Tensor], Tensor]


class VirtualBatch(nn.Module):
    """A model that trains with synthetic samples in its batch, from which its layers take statistics (VDN).

    In training ``model(cat(x, virtual))`` without its last ``count`` rows; in evaluation ``model(x)``. The
    layers take their statistics from the last rows where their sampler is `sbncore.VirtualSamples(count)`,
    or a mixture with it.

    Args:
        model: all its batch normalization layers sampled ones of ``count`` virtual samples.
        count: number of virtual samples.
        distribution: function of (x, count, seed, step) that returns the virtual samples, of shape
            (count, *x.shape[1:]) and x's dtype and device; step is an int64 tensor. A Module is trained with
            the model. None is `white_noise` of the batch's own mean and deviation, per channel.
        seed: names the noise beside the step, ``num_batches_tracked``, which is saved with the model; ranks
            should differ in it.

    forward takes x, with the batch first, and whatever else the model takes, targets too, which passes as it
    is. x may be a tuple or a dict of tensors: each floating one gets virtual samples, each other one with a
    row for each sample repeats its first rows. Of a detector, which takes a list of images, wrap the part
    that they enter as one tensor, ``detector.backbone = VirtualBatch(detector.backbone, count)``. Every
    tensor in what the model returns that has a row for each sample, virtual ones included, is stripped; a
    loss computed inside the model has seen them.

    The model's dropout modules pass virtual samples unchanged, and draw for the others what they would draw
    without them, where their input's first axis is the batch. ``F.dropout`` and other random functions see
    all samples. A recomputed forward (`torch.utils.checkpoint`) has the same noise.

    Raises:
        TypeError, ValueError: for arguments, and for layers whose statistics would include virtual samples
            unasked. In forward for x and for what the distribution returned, before anything is counted.

    Source: Chen et al., IEEE TNNLS 32(1), 2021, section III.
    """

    num_batches_tracked: Tensor

    def __init__(
        self, model: nn.Module, count: int, distribution: Distribution | None = None, *, seed: int = 0
    ) -> None:
        super().__init__()
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
        count = integer("VirtualBatch: count", count)
        if count < 1:
            raise ValueError(f"VirtualBatch: expected a count of at least 1, got {count}")
        if not (distribution is None or callable(distribution)):
            raise TypeError(
                f"distribution: expected a function of (x, count, seed, step), got {distribution!r}"
            )
        for name, module in model.named_modules(prefix="model"):
            _check_layer(name, module, count)
        self.count, self.seed = count, integer("seed", seed)
        self.model, self.distribution = model, distribution
        self.register_buffer("num_batches_tracked", torch.zeros((), dtype=torch.int64))
        for module in model.modules():
            if isinstance(module, _DropoutNd) and "forward" not in vars(module):
                module.forward = partial(_drop, module, {})

    def forward(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        """Return what the model returns, for the real samples alone; count the step once all is well."""
        if not self.training:
            return self.model(x, *args, **kwargs)
        leaves, structure = tree_flatten(x)
        drawn = _drawn(x, leaves)
        (step,), counts = replay.read([self.num_batches_tracked])
        distribution = channel_noise if self.distribution is None else self.distribution
        real = leaves[drawn[0]].shape[0]
        for k in drawn:
            seed = self.seed if k == drawn[0] else absorb(self.seed & MASK, k)
            virtual = distribution(leaves[k], self.count, seed, step)
            _check_virtual(virtual, leaves[k], self.count)
            leaves[k] = torch.cat((leaves[k], virtual))
        for k, leaf in enumerate(leaves):  # masks, numbers of tokens
            if k not in drawn and isinstance(leaf, Tensor) and leaf.shape[:1] == (real,):
                again = torch.arange(self.count, device=leaf.device) % real
                leaves[k] = torch.cat((leaf, leaf[again]))
        total = real + self.count
        with rows.running(total, self.count):
            output = self.model(tree_unflatten(leaves, structure), *args, **kwargs)
        if counts is not False:
            self.num_batches_tracked.add_(counts)

        def stripped(leaf: Any) -> Any:
            has_virtual = isinstance(leaf, Tensor) and leaf.ndim > 0 and leaf.shape[0] == total
            return leaf[: -self.count] if has_virtual else leaf

        return tree_map(stripped, output)

    def extra_repr(self) -> str:
        """Return the arguments that are not modules."""
        line = f"count={self.count}, seed={self.seed}"
        shown = self.distribution is None or isinstance(self.distribution, nn.Module)
        return line if shown else f"{line}, distribution={self.distribution!r}"


def channel_noise(x: Tensor, count: int, seed: int, step: Tensor | int) -> Tensor:
    """Return white noise of the batch's mean and deviation per channel, without a gradient.

    ``mean + deviation * white_noise``, in x's dtype, device and memory format.

    Args:
        x: (N, C, *spatial), floating.
        count: number of samples to return.
        seed, step: name the noise.

    Returns:
        (count, C, *spatial).

    Raises:
        TypeError: if x is not floating.
        ValueError: if x has no more than one value per channel: no deviation.
    """
    if not x.is_floating_point():
        raise TypeError(
            f"x: expected a floating dtype, got {x.dtype}; a distribution=, a function of "
            "(x, count, seed, step), can make virtual samples of it"
        )
    values = x.shape[0] * math.prod(x.shape[2:])
    if values < 2:
        raise ValueError(
            f"x: expected more than 1 value per channel, to take the noise's deviation from, got shape "
            f"{tuple(x.shape)}; a distribution= can do without"
        )
    with torch.no_grad():
        kind = torch.float64 if x.dtype == torch.float64 else torch.float32
        axes = [0, *range(2, x.ndim)]
        var, mean = torch.var_mean(x.to(kind), axes, correction=0, keepdim=True)
        white = white_noise((count, *x.shape[1:]), seed=seed, step=step, dtype=kind, device=x.device)
        return (mean + var.sqrt() * white).to(x.dtype).contiguous(memory_format=_memory_format(x))


def white_noise(
    shape: Sequence[int],
    *,
    seed: int = 0,
    step: Tensor | int = 0,
    dtype: torch.dtype = torch.float32,
    device: Any = None,
) -> Tensor:
    """Return `sbncore.noise.white_noise`, bit for bit, computed on the device.

    Args:
        shape, seed, dtype: as there.
        step: an integer or an int64 tensor without axes, which is not read on the host.
        device: where; torch's default if None.
    """
    samples, sample = shape[0], shape[1:]
    count = partial(torch.arange, dtype=torch.int64, device=device)
    if not isinstance(step, Tensor):
        step = torch.full((), word(step), dtype=torch.int64, device=device)
    # the words of stream_key, the step's a tensor
    key = _absorb(_absorb(step, word(absorb(absorb(0, seed & MASK), 0))), noise.STREAM)
    words = _absorb(_absorb(count(samples), key).unsqueeze(1), count(math.prod(sample)))
    pairs = (words & noise.PAIRS) + ((words >> 16) & noise.PAIRS)
    total = (pairs >> 32) + (pairs & 0xFFFF_FFFF)
    return ((total - noise.CENTRE).to(dtype) * noise.SCALE).view(tuple(shape))


def _absorb(key: Tensor, word_: Tensor | int) -> Tensor:
    """`sbncore.hashing.absorb` of int64, which wraps."""
    z = (key ^ word_) + word(GOLDEN)
    z = (z ^ _shifted(z, 30)) * word(0xBF58_476D_1CE4_E5B9)
    z = (z ^ _shifted(z, 27)) * word(0x94D0_49BB_1331_11EB)
    return z ^ _shifted(z, 31)


def _shifted(z: Tensor, bits: int) -> Tensor:
    return (z >> bits) & (2 ** (64 - bits) - 1)


def _memory_format(x: Tensor) -> torch.memory_format:
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.ndim)
    if last is None or x.is_contiguous() or not x.is_contiguous(memory_format=last):
        return torch.contiguous_format
    return last


def _drop(dropout: Any, known: dict[int, int], input: Tensor) -> Tensor:
    """Run a dropout's forward, on real rows alone; ``known`` has the virtual ones of a batch by its rows."""
    total = input.shape[0] if input.ndim else 0
    virtual = rows.now.virtual if total == rows.now.rows else 0
    if not torch.compiler.is_compiling():
        if rows.now.rows == 0 and torch._C._current_graph_task_id() != -1:  # a part of the model, recomputed
            virtual = known.get(total, 0)
        known[total] = virtual
    forward = type(dropout).forward
    if virtual == 0 or not dropout.training:
        return forward(dropout, input)
    return torch.cat((forward(dropout, input[:-virtual]), input[-virtual:]))


def _check_layer(name: str, module: nn.Module, count: int) -> None:
    if not isinstance(module, _BatchNorm):
        return
    if not isinstance(module, SampledBatchNorm):
        raise ValueError(
            f"{name}: expected a sampled layer with VirtualSamples({count}), alone or in a mixture, got "
            f"{type(module).__name__}, whose statistics would include virtual samples; "
            "convert_sampled_batchnorm replaces it"
        )
    if module.sampler.virtual != count:
        raise ValueError(
            f"{name}: expected a sampler with VirtualSamples({count}), alone or in a mixture, got "
            f"{module.sampler}"
        )


def _drawn(x: Any, leaves: list[Any]) -> list[int]:
    """Return which tensors of x get virtual samples."""
    if isinstance(x, Tensor):
        drawn = [0]
    elif isinstance(x, tuple | dict):
        floating = (isinstance(leaf, Tensor) and leaf.is_floating_point() for leaf in leaves)
        drawn = [k for k, floats in enumerate(floating) if floats]
    else:
        drawn = []
    if not drawn:
        hint = "; a list of images becomes one inside a model: wrap that part" if isinstance(x, list) else ""
        raise TypeError(
            f"x: expected a tensor, or a tuple or dict with floating ones, got {type(x).__name__}{hint}"
        )
    for leaf in (leaves[k] for k in drawn):
        if leaf.ndim < 2:
            raise ValueError(f"x: expected (N, C, *spatial), at least 2 axes, got shape {tuple(leaf.shape)}")
        if leaf.shape[0] != leaves[drawn[0]].shape[0]:
            shapes = [tuple(leaves[k].shape) for k in drawn]
            raise ValueError(f"x: expected tensors of as many samples, got shapes {shapes}")
    return drawn


def _check_virtual(virtual: Any, x: Tensor, count: int) -> None:
    if not isinstance(virtual, Tensor):
        raise TypeError(f"distribution: expected a tensor, got {type(virtual).__name__}")
    if virtual.shape != (count, *x.shape[1:]):
        raise ValueError(f"distribution: expected shape {(count, *x.shape[1:])}, got {tuple(virtual.shape)}")
    if virtual.dtype != x.dtype:
        raise TypeError(f"distribution: expected {x.dtype} as x, got {virtual.dtype}")
    if virtual.device != x.device:
        raise ValueError(f"distribution: expected x's device {x.device}, got {virtual.device}")
