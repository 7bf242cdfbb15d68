"""A training call whose statistics are one device's own, and its derivative."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

import sbncore as sbn
from sbncore.adapters.jax.callbacks import Options, callback, kept_of, like, plan_of
from sbncore.residuals import Residuals


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def trained(options: Options, x: Any, mean: Any, var: Any, *others: Any) -> tuple[Any, Any, Any]:
    """Return y and the new running statistics; others are weight, bias, residual and step."""
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


trained.defvjp(_remembered, _differentiated)


def _forward(options: Options, x: Any, mean: Any, var: Any, *others: Any) -> Any:
    """Return y, the moved running statistics, the state and the mask."""
    kept = kept_of(options, x, residual=others[2])
    results = like(x), like(mean), like(var), *kept
    return callback(_run_forward, options, results)(x, mean, var, *others)


def _backward(options: Options, dy: Any, x: Any, weight: Any, bias: Any, *kept: Any) -> Any:
    """Return the gradients of x, weight, bias and the residual, None where there is none or it is dy."""
    added = kept[2]
    dresidual = like(x) if added is not None and options.activation is not None else None
    results = like(x), like(weight), like(bias), dresidual
    return callback(_run_backward, options, results)(dy, x, weight, bias, *kept)


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
        plan=plan_of(options, x.shape, int(step)),
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
