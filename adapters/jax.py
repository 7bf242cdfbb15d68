"""Sampled batch normalization as a pure function of JAX's arrays, by the CPU engine, from inside XLA.

What is traced stays traced: a step may be a number that a compiled loop counts, and every step draws anew.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any, NamedTuple

import numpy as np

try:
    import jax
    import jax.numpy as jnp
    from jax.experimental.buffer_callback import buffer_callback
except ImportError as missing:
    raise ImportError(f"sbncore.adapters.jax needs JAX ({missing}): pip install 'sbncore[jax]'") from missing

import sbncore as sbn
from sbncore import arguments, checks
from sbncore.arguments import Arguments
from sbncore.arrays import borrow
from sbncore.call import mask_size
from sbncore.drawing import integer, is_array
from sbncore.layout import layout_of
from sbncore.plans import Plan, Recipe
from sbncore.residuals import Residuals, state_bytes


class Options(NamedTuple):
    """What a training call takes beside arrays."""

    sampler: sbn.Sampler
    seed: int
    layer: int
    momentum: float | None
    eps: float
    channel_axis: int
    activation: str | None
    gradient: str
    skip_nonfinite: bool


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
) -> tuple[jax.Array, tuple[jax.Array | None, jax.Array | None]]:
    """Normalize in training or evaluation, and return the running statistics beside y: `sbncore.batch_norm`.

    Training: ``y = act(weight * (x - mean) * rstd + bias + residual)`` by the statistics that the sampler
    draws, and ``running + momentum * (statistic - running)``, the variance unbiased. Evaluation: the same y
    by the running statistics, in JAX's own operations.

    It works under ``jit``, ``grad`` and ``value_and_grad``, ``vmap`` (one element after the other, each by
    its own statistics and the same draw), ``scan``, ``remat``, ``pmap`` and ``shard_map`` (each device by its
    own statistics). An array that is sharded under ``jit`` is gathered: each device normalizes all of it.

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
    _check(x, vectors, residual, options, checks.flag(training, "training"))
    if not training:
        return _evaluated(x, vectors, residual, options), (running_mean, running_var)
    y, mean, var = _trained(options, x, *vectors, residual, _step(step))
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


def _check(x: Any, vectors: list[Any], residual: Any, options: Options, training: bool) -> None:
    """Complain about arrays and options as the engine does, by arrays of the same shapes."""
    x, residual, *stands = (_stand(each) for each in (x, residual, *vectors))
    mean, var, weight, bias = stands
    if (mean is None) != (var is None):
        raise ValueError("running_mean, running_var: expected both or neither, got one of them")
    given = Arguments(x, weight, bias, residual, None, mean, var)
    if training:
        checks.rank(given.x, options.channel_axis)
        plan = _plan(options, x.shape, 0)
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
        arguments.Options(options.eps, options.channel_axis, options.activation, options.gradient),
    )


def _stand(array: Any) -> Any:
    return None if array is None else np.empty(array.shape, array.dtype)


def _plan(options: Options, shape: tuple[int, ...], step: int) -> sbn.Plan:
    sampler, seed, layer, *_ = options
    return sampler.plan(shape, seed=seed, layer=layer, step=step, channel_axis=options.channel_axis)


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


# --- training ---


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _trained(options: Options, x: Any, mean: Any, var: Any, *others: Any) -> tuple[Any, Any, Any]:
    y, mean, var, *_ = _forward(options, x, mean, var, *others)
    return y, mean, var


def _remembered(options: Options, x: Any, mean: Any, var: Any, *others: Any) -> tuple[Any, Any]:
    weight, bias, residual, step = others
    y, mean, var, state, mask = _forward(options, x, mean, var, *others)
    added = None if residual is None else jnp.zeros(0)  # what is there or not is not traced
    return (y, mean, var), (x, weight, bias, state, mask, added, step)


def _differentiated(options: Options, kept: Any, cotangents: Any) -> tuple[Any, ...]:
    dy, (x, weight, bias, state, mask, added, step) = cotangents[0], kept
    dx, dweight, dbias, dresidual = _backward(options, dy, x, weight, bias, state, mask, added, step)
    if added is not None and dresidual is None:
        dresidual = dy
    return dx, None, None, dweight, dbias, dresidual, None


_trained.defvjp(_remembered, _differentiated)


def _forward(options: Options, x: Any, mean: Any, var: Any, *others: Any) -> Any:
    """Return y, the moved running statistics, the state and the mask."""
    residual, mask = others[2], 0
    if options.activation == "relu" and residual is not None and x.size:
        layout = layout_of(np.empty(x.shape, np.uint8), options.channel_axis)
        mask = mask_size(layout, False, x.dtype.itemsize)
    sizes = state_bytes(x.shape[options.channel_axis]), mask
    kept = (jax.ShapeDtypeStruct((size,), np.uint8) for size in sizes)
    results = _like(x), _like(mean), _like(var), *kept
    return _callback(_run_forward, options, results)(x, mean, var, *others)


def _backward(options: Options, dy: Any, x: Any, weight: Any, bias: Any, *kept: Any) -> Any:
    """Return the gradients of x, weight, bias and the residual, None where there is none or it is dy."""
    added = kept[2]
    dresidual = _like(x) if added is not None and options.activation is not None else None
    results = _like(x), _like(weight), _like(bias), dresidual
    return _callback(_run_backward, options, results)(dy, x, weight, bias, *kept)


def _like(array: Any) -> Any:
    return None if array is None else jax.ShapeDtypeStruct(array.shape, array.dtype)


@lru_cache(maxsize=1024)
def _callback(run: Callable[..., None], options: Options, results: Any) -> Callable[..., Any]:
    """Return a function of JAX's arrays; the same one for the same arguments, or XLA would compile anew."""

    def called(_: Any, out: Any, *given: Any) -> None:
        run(options, *(tuple(map(_memory, arrays)) for arrays in (out, given)))

    once = jax.custom_vjp(buffer_callback(called, results, vmap_method="sequential"))
    once.defvjp(_twice, _twice)
    return once


def _twice(*_: Any) -> Any:
    raise NotImplementedError("sbncore's batch_norm cannot be differentiated twice in JAX")


def _memory(buffer: Any) -> Any:
    """Return a buffer of XLA's as NumPy's array, no copy."""
    if buffer is None:
        return None
    try:
        return np.asarray(buffer)
    except Exception as complaint:
        raise NotImplementedError(
            "sbncore.adapters.jax runs on JAX's CPU backend; sbncore's functions take arrays on a GPU"
        ) from complaint


def _run_forward(options: Options, out: tuple[Any, ...], given: tuple[Any, ...]) -> None:
    (y, mean, var, state, mask), (x, old_mean, old_var, weight, bias, residual, step) = out, given
    if mean is not None:
        mean[...], var[...] = old_mean, old_var
    sampler, seed, layer, momentum, eps, channel_axis, activation, gradient, skip_nonfinite = options
    _, saved = sbn.batch_norm(
        x, mean, var, weight, bias, True, momentum, eps, sampler=sampler, seed=seed, layer=layer,
        step=int(step), channel_axis=channel_axis, activation=activation, residual=residual,
        gradient=gradient, out=y, skip_nonfinite=skip_nonfinite,
    )  # fmt: skip
    kept = Residuals.of(saved)
    state[...], mask[...] = kept.state, kept.mask


def _run_backward(options: Options, out: tuple[Any, ...], given: tuple[Any, ...]) -> None:
    (dx, dweight, dbias, dresidual), (dy, x, weight, bias, state, mask, added, step) = out, given
    saved = Residuals(x, weight, bias, state, mask).saved(
        plan=_plan(options, x.shape, int(step)),
        channel_axis=options.channel_axis,
        activation=options.activation,
        residual=added is not None,
        gradient=options.gradient,
    )
    named = {"x": dx, "weight": dweight, "bias": dbias, "residual": dresidual}
    needs = [name for name, array in named.items() if array is not None]
    grads = sbn.backward(dy, saved, needs=needs, out=dx)
    for name in needs[1:]:
        named[name][...] = getattr(grads, name)
