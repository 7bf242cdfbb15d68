"""Sampled batch normalization for Flax NNX: a layer with nnx.BatchNorm's state, and a converter."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

try:
    import jax.numpy as jnp
    from flax import nnx
except ImportError as missing:
    raise ImportError(
        f"sbncore.adapters.flax needs Flax ({missing}): pip install 'sbncore[flax]'"
    ) from missing

import sbncore as sbn
from sbncore import checks
from sbncore.adapters.jax import batch_norm
from sbncore.samplers import DEFAULT

RULES = {name: checks.OPTIONS[name] for name in ("sampler", "gradient", "activation", "seed", "layer")}


class Step(nnx.BatchStat):
    """How many training calls a layer has had, which names the next draw; kept as batch statistics are."""


class SampledBatchNorm(nnx.BatchNorm):
    """`flax.nnx.BatchNorm` by the statistics of a sample.

    In training ``y = act(scale * (x - mean) * rstd + bias + residual)``, mean and var those of the places
    that the sampler draws, and ``running = momentum * running + (1 - momentum) * statistic``: momentum weighs
    the old statistics, as Flax's does. The running variance is unbiased, which Flax's is not.

    Args:
        num_features and all that nnx.BatchNorm takes: as there; axis is one axis, axis_index_groups
            must be None, use_fast_variance is not used.
        sampler, gradient, activation: as `sbncore.batch_norm`.
        seed, layer: integers that name the draws. Layers of one model should differ in ``layer``
            (`convert_sampled_batchnorm` numbers them). The step is the variable ``step``.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came; from a call what
            `sbncore.adapters.jax.batch_norm` raises.

    Source: Chen et al., IEEE TNNLS 32(1), 2021, section III.
    """

    sampler: sbn.Sampler
    gradient: str
    activation: str | None
    seed: int
    layer: int

    def __init__(
        self,
        num_features: int,
        *,
        sampler: sbn.Sampler = sbn.Full(),  # noqa: B008 - a frozen value
        gradient: str = "exact",
        activation: str | None = None,
        seed: int = 0,
        layer: int = 0,
        **options: Any,
    ) -> None:
        super().__init__(num_features, **options)
        self.configure(sampler=sampler, gradient=gradient, activation=activation, seed=seed, layer=layer)

    def configure(self, **options: Any) -> None:
        """Set what nnx.BatchNorm has not, all of it; arguments as the class's."""
        for name, rule in RULES.items():
            options[name] = rule(options[name])
        checks.gradient_for(options["gradient"], options["sampler"])
        if self.axis_index_groups is not None:
            raise ValueError(
                f"axis_index_groups: expected None, got {self.axis_index_groups!r}: all devices of axis_name "
                "share their statistics"
            )
        for name, value in options.items():
            setattr(self, name, value)
        stacked = self.mean[...].shape[:-1]  # of layers that nnx.vmap or nnx.scan runs over
        self.step = Step(jnp.zeros(stacked, jnp.int32))

    def __call__(
        self, x: Any, use_running_average: bool | None = None, *, mask: Any = None, residual: Any = None
    ) -> Any:
        """Return y; in training, move the running statistics and the step.

        Args:
            x: the layer's input; it is promoted with the parameters to ``dtype``, as nnx.BatchNorm does it.
            use_running_average: in place of the layer's own: True for evaluation.
            mask: must be None.
            residual: as x, added before the activation.
        """
        if mask is not None:
            raise ValueError("mask: expected None, got an array: a sample is drawn from all places")
        evaluates = self.use_running_average if use_running_average is None else use_running_average
        if evaluates is None:
            raise ValueError(
                "use_running_average: expected True or False, from the layer or the call, got None"
            )
        variables = self.mean, self.var, self.scale, self.bias
        vectors: list[Any] = [None if each is None else each[...] for each in variables]
        x, *_ = self.promote_dtype((x, *vectors), dtype=self.dtype)
        wide = jnp.promote_types(x.dtype, jnp.float32)
        mean, var, scale, bias = (None if each is None else each.astype(wide) for each in vectors)
        result: Any = batch_norm(
            x,
            mean,
            var,
            scale,
            bias,
            training=not evaluates,
            momentum=1 - self.momentum,
            eps=self.epsilon,
            sampler=self.sampler,
            seed=self.seed,
            layer=self.layer,
            step=self.step[...],
            channel_axis=self.axis,
            activation=self.activation,
            residual=None if residual is None else residual.astype(x.dtype),
            gradient=self.gradient,
            axis_name=self.axis_name,
        )
        y, new = result
        if not evaluates:
            self.mean[...], self.var[...] = (each.astype(jnp.float32) for each in new)
            self.step[...] += 1
        return y


def convert_sampled_batchnorm(
    model: nnx.Module,
    sampler: sbn.Sampler | Mapping[str, sbn.Sampler] = DEFAULT,
    *,
    gradient: str = "exact",
    seed: int = 0,
) -> nnx.Module:
    """Make a model's nnx.BatchNorm layers sampled ones, in place; variables, names and modes stay.

    Each gets as ``layer`` its number among the model's BatchNorm layers, by which they draw differently.
    Subclasses of nnx.BatchNorm are left as they are.

    Args:
        model: any nnx.Module; it may be a BatchNorm itself.
        sampler: of all layers; or a mapping from layers' paths, such as ``"stem/bn"``, to samplers, which
            leaves the others as they are. By default a sixteenth is drawn, at least 1,024 values per channel.
        gradient, seed: as `SampledBatchNorm`.

    Returns:
        The model.

    Raises:
        ValueError, TypeError: naming the argument, before anything has changed; for paths of no BatchNorm.
    """
    found: dict[str, Any] = {
        "/".join(map(str, path)): module
        for path, module in nnx.iter_modules(model)
        if type(module) is nnx.BatchNorm
    }
    chosen = dict(sampler) if isinstance(sampler, Mapping) else dict.fromkeys(found, sampler)
    unknown = sorted(set(chosen) - set(found))
    if unknown:
        raise ValueError(f"sampler: expected paths among {sorted(found)}, got {unknown}")
    for each in chosen.values():
        checks.gradient_for(RULES["gradient"](gradient), RULES["sampler"](each))
    RULES["seed"](seed)
    layers = [(k, path, module) for k, (path, module) in enumerate(found.items()) if path in chosen]
    for _, path, module in layers:
        if module.axis_index_groups is not None:
            raise ValueError(f"model: expected layers without axis_index_groups, got one in {path!r}")
    for k, path, module in layers:
        module.__class__ = SampledBatchNorm
        module.configure(sampler=chosen[path], gradient=gradient, activation=None, seed=seed, layer=k)
    return model
