"""Sampled batch normalization as a pure function of JAX's arrays, by the CPU engine, from inside XLA.

What is traced stays traced: a step may be a number that a compiled loop counts, and every step draws anew.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import sbncore as sbn
from sbncore import arguments, checks
from sbncore.adapters.jax.callbacks import Options, plan_of
from sbncore.adapters.jax.device import trained
from sbncore.adapters.jax.devices import trained_over
from sbncore.arguments import Arguments
from sbncore.arrays import borrow
from sbncore.drawing import integer, is_array
from sbncore.layout import layout_of
from sbncore.plans import Plan, Recipe


def batch_norm(
    x: jax.Array,
    running_mean: jax.Array | None,
    running_var: jax.Array | None,
    weight: jax.Array | None = None,
    bias: jax.Array | None = None,
    training: bool = False,
    momentum: float | None = 0.1,
    eps: float = 1e-5,
    *,
    sampler: sbn.Sampler = sbn.Full(),  # noqa: B008 - a frozen value
    seed: int = 0,
    layer: int = 0,
    step: Any = 0,
    channel_axis: int = -1,
    activation: str | None = None,
    residual: jax.Array | None = None,
    gradient: str = "exact",
    skip_nonfinite: bool = False,
    axis_name: Any = None,
) -> tuple[jax.Array, tuple[jax.Array | None, jax.Array | None]]:
    """Normalize in training or evaluation, and return the running statistics beside y: `sbncore.batch_norm`.

    Training: ``y = act(weight * (x - mean) * rstd + bias + residual)`` by the statistics that the sampler
    draws, and ``running + momentum * (statistic - running)``, the variance unbiased. Evaluation: the same y
    by the running statistics, in JAX's own operations.

    It works under ``jit``, ``grad`` and ``value_and_grad``, ``vmap`` (one element after the other, each by
    its own statistics and the same draw), ``scan``, ``remat``, ``pmap`` and ``shard_map`` (each device by its
    own statistics, unless ``axis_name`` says otherwise; gradients want ``check_vma=False``). An array that is
    sharded under ``jit`` is gathered: each device normalizes all of it.

    Args:
        x: (N, ..., C), float32, float16, bfloat16, or float64 where JAX has that.
        running_mean, running_var: (C,), float32 (float64 beside float64 x) or x's own dtype; or both None
            (then training must be true). In training they get no gradient.
        weight, bias: likewise; None is 1 and 0.
        training, momentum, eps, sampler, seed, layer, activation, gradient, skip_nonfinite: as
            `sbncore.batch_norm`, none of them traced. momentum weighs the new statistics, as PyTorch's does;
            Flax's weighs the old.
        step: an integer or an integer array, traced or not: what to draw.
        channel_axis: of x; JAX's users have channels last.
        residual: as x, added before the activation.
        axis_name: of a mapped axis (``shard_map``, ``pmap``), or several: its devices share their statistics,
            each drawing from its own part of the batch. The weights' gradients are each device's own.

    Returns:
        y of x's shape and dtype, and the new running statistics, or those given in evaluation.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came, while tracing.
        NotImplementedError: for a second derivative; where XLA runs, for arrays that are not on the CPU.

    Source: Chen et al., IEEE TNNLS 32(1), 2021, section III.
    """
    x = jnp.asarray(x)
    vectors = [running_mean, running_var, weight, bias]
    vectors = [None if each is None else jnp.asarray(each) for each in vectors]
    residual = None if residual is None else jnp.asarray(residual)
    rules = checks.OPTIONS
    options = Options(
        rules["sampler"](sampler),
        rules["seed"](seed),
        rules["layer"](layer),
        rules["momentum"](momentum),
        checks.epsilon(eps, statistics_are_given=not training),
        integer("channel_axis", channel_axis),
        activation,
        gradient,
        rules["skip_nonfinite"](skip_nonfinite),
    )
    device = None if axis_name is None else 0
    _check(x, vectors, residual, options, checks.flag(training, "training"), device)
    if not training:
        return _evaluated(x, vectors, residual, options), (running_mean, running_var)
    arrays = x, *vectors, residual, _step(step)
    y, mean, var = (
        trained(options, *arrays) if axis_name is None else trained_over(options, axis_name, *arrays)
    )
    return y, (mean, var)


def _step(step: Any) -> jax.Array:
    if not is_array(step):
        number = integer("step", step)
        if not -(2**31) <= number < 2**31:
            raise ValueError(f"step: expected an integer of 32 bits, got {number}")
        step = np.int32(number)
    step = jnp.asarray(step)
    if step.shape != () or not jnp.issubdtype(step.dtype, jnp.integer):
        raise TypeError(f"step: expected one integer, got an array of {step.dtype}, shape {step.shape}")
    return step


def _check(
    x: Any, vectors: list[Any], residual: Any, options: Options, training: bool, device: int | None
) -> None:
    """Complain about arrays and options as the engine does, by arrays of the same shapes."""
    x, residual, *stands = (_stand(each) for each in (x, residual, *vectors))
    mean, var, weight, bias = stands
    if (mean is None) != (var is None):
        raise ValueError("running_mean, running_var: expected both or neither, got one of them")
    given = Arguments(x, weight, bias, residual, None, mean, var)
    if training:
        checks.rank(given.x, options.channel_axis)
        plan = plan_of(options, x.shape, 0, device)
        if plan.prior > 0 and mean is None:
            raise ValueError("running_mean, running_var: expected arrays for the sampler's prior, got None")
        prior = (mean, var) if plan.prior > 0 else (None, None)
    else:
        if mean is None:
            raise ValueError("running_mean, running_var: expected arrays when training is false, got None")
        checks.rank(borrow(x, "x"), options.channel_axis)
        layout = layout_of(x, options.channel_axis)
        plan, prior = Plan(Recipe((layout.N, *layout.spatial), (), 1.0)), (mean, var)
    views = arguments.borrowed(given._replace(prior_mean=prior[0], prior_var=prior[1]))
    arguments.prepared(
        views,
        plan,
        arguments.Options(
            options.eps,
            options.channel_axis,
            options.activation,
            options.gradient,
            fewest=2 if device is None else 1,
        ),
    )


def _stand(array: Any) -> Any:
    return None if array is None else np.empty(array.shape, array.dtype)


def _evaluated(x: Any, vectors: list[Any], residual: Any, options: Options) -> jax.Array:
    wide = jnp.promote_types(x.dtype, jnp.float32)
    along = [1] * x.ndim
    along[options.channel_axis] = -1
    mean, var, weight, bias = (None if v is None else v.astype(wide).reshape(along) for v in vectors)
    scale: Any = jax.lax.rsqrt(var + options.eps)  # type: ignore[operator]
    z = (x.astype(wide) - mean) * (scale if weight is None else scale * weight)
    z = z if bias is None else z + bias
    z = z if residual is None else z + residual.astype(wide)
    return (jax.nn.relu(z) if options.activation == "relu" else z).astype(x.dtype)
