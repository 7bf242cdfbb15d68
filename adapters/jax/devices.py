"""A training call over the devices of a mapped axis: their moments merge, their backward's sums add up.

Each device draws from its own part of the batch, as layer ``layer + device * 2**32``, so that the samples are
independent. By the merge a device's p_i are scaled by its share of all counts.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import sbncore as sbn
from sbncore import checks
from sbncore.adapters.jax.callbacks import Options, callback, kept_of, like, plan_of
from sbncore.layout import layout_of
from sbncore.plans import Plan, Recipe
from sbncore.residuals import Residuals
from sbncore.statistics import unbiased

WORD = 8  # bytes: statistics are exchanged in float64, which JAX may not have


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def trained_over(
    options: Options, axis: Any, x: Any, mean: Any, var: Any, *others: Any
) -> tuple[Any, Any, Any]:
    """Return y and the new running statistics; others are weight, bias, residual and step."""
    y, mean, var, *_ = _forward(options, axis, x, mean, var, *others)
    return y, mean, var


def _remembered(options: Options, axis: Any, x: Any, mean: Any, var: Any, *others: Any) -> tuple[Any, Any]:
    weight, bias, residual, step = others
    y, mean, var, state, mask, share = _forward(options, axis, x, mean, var, *others)
    added = None if residual is None else jnp.zeros(0)  # what is there or not is not traced
    return (y, mean, var), (x, weight, bias, state, mask, added, step, jax.lax.axis_index(axis), share)


def _differentiated(options: Options, axis: Any, kept: Any, cotangents: Any) -> tuple[Any, ...]:
    (x, weight, bias, _, _, added, *_), dy = kept, cotangents[0]
    C, wide = x.shape[options.channel_axis], jnp.promote_types(x.dtype, jnp.float32)
    dresidual = like(x) if added is not None and options.activation is not None else None
    sums = jax.ShapeDtypeStruct((2, C), wide)
    dx, local, dresidual = callback(_run_sums, options, (like(x), sums, dresidual))(dy, *kept)
    if options.gradient != "detached":
        total = jax.lax.psum(local, axis)
        dx = callback(_run_repair, options, like(x))(dx, dy, total, *kept)
    dweight, dbias = (
        None if each is None else one.astype(each.dtype)
        for each, one in zip((weight, bias), local, strict=True)
    )
    return dx, None, None, dweight, dbias, dy if added is not None and dresidual is None else dresidual, None


trained_over.defvjp(_remembered, _differentiated)


def _forward(options: Options, axis: Any, x: Any, mean: Any, var: Any, *others: Any) -> Any:
    """Return y, the moved running statistics, the state, the mask and this device's share."""
    *_, residual, step = others
    device = jax.lax.axis_index(axis)
    row = jax.ShapeDtypeStruct((WORD * (2 * x.shape[options.channel_axis] + 1),), np.uint8)
    table = jax.lax.all_gather(callback(_run_moments, options, row)(x, mean, var, step, device), axis)
    share = jax.ShapeDtypeStruct((WORD,), np.uint8)
    results = like(x), like(mean), like(var), *kept_of(options, x, residual), share
    return callback(_run_merged, options, results)(x, mean, var, *others, table, device)


def _run_moments(options: Options, out: Any, given: tuple[Any, ...]) -> None:
    x, mean, var, step, device = given
    plan = plan_of(options, x.shape, int(step), int(device))
    prior = sbn.Statistics(mean, var) if plan.prior > 0 else None
    found = sbn.moments(x, plan, prior=prior, channel_axis=options.channel_axis, dtype="float64")
    out[...] = np.concatenate([found.mean, found.var, [found.count]]).view(np.uint8)


def _run_merged(options: Options, out: tuple[Any, ...], given: tuple[Any, ...]) -> None:
    y, mean, var, state, mask, share = out
    x, old_mean, old_var, weight, bias, residual, step, table, device = given
    rows = np.array(table).view("f8")
    C = rows.shape[1] // 2
    merged = sbn.merge(*(sbn.Statistics(row[:C], row[C : 2 * C], float(row[-1])) for row in rows))
    if merged.count <= 1:
        raise ValueError("x: expected more than 1 value per channel over all devices, got a single one")
    layout = layout_of(x, options.channel_axis)
    evaluation = Plan(Recipe((layout.N, *layout.spatial), (), 1.0))
    _, saved = sbn.forward(
        x, weight, bias, plan=evaluation, prior=sbn.Statistics(merged.mean, merged.var), eps=options.eps,
        channel_axis=options.channel_axis, activation=options.activation, residual=residual, out=y,
    )  # fmt: skip
    kept = Residuals.of(saved)
    state[...], mask[...] = kept.state, kept.mask
    share[...] = np.array([rows[int(device), -1] / rows[:, -1].sum()]).view(np.uint8)
    if mean is not None:
        momentum = checks.momentum_of(options.momentum, int(step))
        news = merged.mean, merged.var * unbiased(merged.count)
        keep = ~(np.isfinite(news[0]) & np.isfinite(news[1])) & options.skip_nonfinite
        for target, old, new in zip((mean, var), (old_mean, old_var), news, strict=True):
            wide = old.astype(np.float64)
            target[...] = np.where(keep, wide, wide + momentum * (new - wide))


def _saved(options: Options, kept: tuple[Any, ...], gradient: str) -> Any:
    """Return what backward takes: the merged statistics' state, with this device's own plan."""
    x, weight, bias, state, mask, added, step, device, _ = kept
    kind = np.promote_types(np.float32, x.dtype) if x.dtype == np.float64 else np.dtype(np.float32)
    C = x.shape[options.channel_axis]
    # both, so that their sums are computed
    weight = np.ones(C, kind) if weight is None else weight
    bias = np.zeros(C, kind) if bias is None else bias
    return Residuals(x, weight, bias, state, mask).saved(
        plan=plan_of(options, x.shape, int(step), int(device)),
        channel_axis=options.channel_axis,
        activation=options.activation,
        residual=added is not None,
        gradient=gradient,
    )


def _run_sums(options: Options, out: tuple[Any, ...], given: tuple[Any, ...]) -> None:
    (dx, sums, dresidual), (dy, *kept) = out, given
    saved = _saved(options, tuple(kept), "detached")
    needs = ["x", "weight", "bias", *(["residual"] if dresidual is not None else [])]
    grads = sbn.backward(dy, saved, needs=needs, out=dx)
    if dresidual is not None:
        dresidual[...] = grads.residual
    if options.gradient == "sampled":
        grads = sbn.backward(dy, saved, needs=["weight", "bias"], gradient="sampled")
    sums[0], sums[1] = grads.weight, grads.bias


def _run_repair(options: Options, out: Any, given: tuple[Any, ...]) -> None:
    dx, dy, sums, *kept = given
    out[...] = dx
    share, kind = np.array(kept[-1]).view("f8")[0], sums.dtype
    saved = _saved(options, tuple(kept), options.gradient)
    sbn.repair(out, dy, saved, *((each * share).astype(kind) for each in sums))
