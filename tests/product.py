"""What every engine is held to, without Hypothesis: cases by name, and one forward and backward."""

import numpy as np
from conftest import TOLERANCE, error

import sbncore as sbn
from sbncore import reference

DTYPES = {"float64": np.float64, "float32": np.float32, "float16": np.float16}
try:
    import ml_dtypes
except ImportError:  # a machine with a GPU may lack it
    pass
else:
    DTYPES["bfloat16"] = ml_dtypes.bfloat16

SAMPLERS = {
    "full": sbn.Full(),
    "run": sbn.FeatureSampling(1 / 8),
    "runs": sbn.FeatureSampling(1 / 4, "runs"),
    "patch": sbn.FeatureSampling(1 / 4, "patch"),
    "grid": sbn.FeatureSampling(1 / 4, "grid", "common"),
    "samples": sbn.BatchSampling(1 / 4, at_least=4),
    "strided": sbn.BatchSampling(1 / 4, "strided", at_least=4),
    "random": sbn.BatchSampling(1 / 4, "random", at_least=4),
    "scattered": sbn.NaiveSampling(1 / 8, at_least=8),
    "virtual": sbn.Mixture([(0.5, sbn.VirtualSamples(2)), (0.5, sbn.FeatureSampling(1 / 4))]),
    "twice": sbn.Mixture([(0.5, sbn.BatchSampling(1 / 2, "random")), (0.5, sbn.NaiveSampling(1 / 4))]),
}

# Rows of whole columns, columns across channels, and nothing that fits a column; each also of many rows.
SHAPES = [(4, 2, 16), (8, 4, 9), (5, 3, 3), (32, 8, 16), (33, 8, 9)]


def channels_last(array):
    """The same logical array in channels-last memory."""
    return np.moveaxis(np.ascontiguousarray(np.moveaxis(array, 1, -1)), -1, 1)


def run(
    rng, dtype, shape, sampler, last=False, relu=False, add=False, gradient="exact", to=None, back=np.asarray,
    **draw,
):  # fmt: skip
    """One forward and backward held against the reference; ``to`` makes arrays, ``back`` NumPy's of them.

    Returns what the engine gave: y, the gradients, what forward saved.
    """
    kind, C = DTYPES[dtype], shape[1]
    parameter = np.float64 if dtype == "float64" else np.float32
    to = to or (lambda array: array)
    x, dy, residual = (rng.normal(0.5, 1, shape).astype(kind) for _ in range(3))
    weight, bias = rng.normal(1, 0.5, C).astype(parameter), rng.normal(0, 1, C).astype(parameter)
    residual = residual if add else None
    plan = sampler.plan(shape, **draw)
    prior = given = None
    if plan.prior:
        given = [rng.normal(0.5, 1, C).astype(parameter), rng.uniform(1, 2, C).astype(parameter)]
        prior = (plan.prior, *given)
    wide = [None if a is None else a.astype(np.float64) for a in (x, weight, bias, residual)]
    activation = "relu" if relu else None
    y_true, truth = reference.forward(
        *wide[:3], p=plan.weights(), prior=prior, activation=activation, residual=wide[3]
    )
    if relu:  # where the sign of z is in the rounding
        dy = np.where(np.abs(truth.z) < 1e-3, np.zeros_like(dy), dy)
    true = reference.backward(dy.astype(np.float64), truth, gradient)
    arrange = (lambda a: to(channels_last(a))) if last else to
    y, saved = sbn.forward(
        arrange(x), to(weight), to(bias), plan=plan, activation=activation, gradient=gradient,
        prior=None if given is None else sbn.Statistics(*map(to, given)),
        residual=None if residual is None else arrange(residual),
    )  # fmt: skip
    grads = sbn.backward(arrange(dy), saved)
    for name, got, expected in (
        ("y", y, y_true), ("dx", grads.x, true["x"]), ("dweight", grads.weight, true["weight"]),
        ("dbias", grads.bias, true["bias"]), ("dresidual", grads.residual, true["residual"]),
    ):  # fmt: skip
        if got is None and not add:
            continue
        wrong = error(back(got), expected)
        assert wrong <= TOLERANCE[dtype], (name, wrong, dtype, shape, plan)
    return y, grads, saved


def run_in_phases(rng, dtype, shape, sampler, last=False, relu=False, add=False):
    """The exact backward in two phases: the one call's gradients."""
    kind, C = DTYPES[dtype], shape[1]
    parameter = np.float64 if dtype == "float64" else np.float32
    arrange = channels_last if last else np.array
    x, dy, residual = (arrange(rng.normal(0.5, 1, shape).astype(kind)) for _ in range(3))
    weight, bias = rng.normal(1, 0.5, C).astype(parameter), rng.normal(0, 1, C).astype(parameter)
    plan, activation = sampler.plan(shape, step=3), "relu" if relu else None
    _, saved = sbn.forward(
        x, weight, bias, plan=plan, activation=activation, residual=residual if add else None
    )
    whole = sbn.backward(dy, saved)
    first = sbn.backward(dy, saved, gradient="detached")
    for name in ("weight", "bias", "residual"):
        assert (getattr(whole, name) is None) == (getattr(first, name) is None)
        if getattr(whole, name) is not None:
            assert (getattr(whole, name) == getattr(first, name)).all(), name
    sbn.repair(first.x, dy, saved, first.weight, first.bias)
    assert error(first.x, whole.x) <= TOLERANCE[dtype], (dtype, shape, plan)
