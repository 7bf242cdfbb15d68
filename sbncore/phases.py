"""What an engine does in a call, in order: estimate, normalize, differentiate; of checked arguments."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from sbncore.checks import Parameters
from sbncore.layout import Layout
from sbncore.plans import Plan
from sbncore.saved import Saved
from sbncore.statistics import Moments, merge_moments

if TYPE_CHECKING:
    from sbncore.cpu.engine import Coefficients


# What is not finite shows in the result, as in every framework; it is no warning.
_quiet = np.errstate(all="ignore")


@_quiet
def estimate(x: np.ndarray, layout: Layout, plan: Plan, prior: Moments | None) -> Moments:
    """Return the moments of the places drawn, mixed with the prior."""
    from sbncore.cpu import engine

    if plan.prior == 1 and prior is not None:
        return prior
    if not x.size:
        return np.zeros(layout.C), np.zeros(layout.C), 0.0
    mean, var = engine.moments(x, layout, plan.runs)
    if prior is None:
        return mean, var, plan.effective_count
    alone = plan.effective_count * (1 - plan.prior) ** 2
    return merge_moments([(mean, var, alone), prior], (1 - plan.prior, plan.prior))


@_quiet
def reciprocal_deviation(var: np.ndarray, eps: float) -> np.ndarray:
    """Return rstd; infinite where a given variance and eps are 0."""
    return 1 / np.sqrt(var + eps)


@_quiet
def normalize(
    y: np.ndarray,
    x: np.ndarray,
    layout: Layout,
    mean: np.ndarray,
    rstd: np.ndarray,
    given: Parameters,
    relu: bool,
    masked: bool,
) -> tuple[Coefficients, np.ndarray | None]:
    """Write y; return what it was made with, and where ``masked`` the bits of y > 0."""
    from sbncore.cpu import engine

    coefficients = engine.coefficients(mean, rstd, given.weight, given.bias, engine.compute_type(x))
    mask = engine.mask_for(layout) if masked else None
    if x.size:
        residual = None if given.residual is None else layout.flatten(given.residual)
        engine.normalize(y, mask, x, residual, coefficients, relu, layout)
    return coefficients, mask


@_quiet
def differentiate(
    dx: np.ndarray | None,
    dresidual: np.ndarray | None,
    dy: np.ndarray,
    saved: Saved,
    gradient: str,
) -> tuple[np.ndarray, np.ndarray]:
    """Write dx and dresidual, and return dbias and dweight in float64.

    The exact gradient is one pass over dy and x and a repair of the places drawn; where all are drawn, the
    sums come first and the "repair" is the pass that writes.
    """
    from sbncore.cpu import engine

    if not saved.x.size:
        return np.zeros(saved.layout.C), np.zeros(saved.layout.C)
    x, layout, plan, relu, mask, c = (
        saved.x, saved.layout, saved.plan, saved.relu, saved.mask, saved.coefficients)  # fmt: skip
    places = plan.runs
    through = gradient != "detached" and len(places.begin) > 0  # the gradient flows through the statistics
    dense = through and plan.full and dx is not None  # the repair writes everything
    written = (None, None) if dense else (dx, dresidual)
    if gradient == "sampled" and through:
        scaled = places._replace(weight=places.weight * (layout.N * layout.S / (1 - plan.prior)))
        dbias, second = engine.sums(None, None, dy, x, mask, c, relu, layout, scaled)
        if any(array is not None for array in written):
            engine.sums(*written, dy, x, mask, c, relu, layout)
    else:
        dbias, second = engine.sums(*written, dy, x, mask, c, relu, layout)
    rounding = saved.moments[0] - c.shift
    dweight = (second - rounding * dbias) * saved.rstd
    if through and dx is not None:
        k1 = c.scale * saved.rstd * dweight
        k0 = c.scale * dbias - k1 * rounding
        engine.repair(dx, dresidual if dense else None, dy, x, mask, c, k0, k1, relu, layout, places)
    return dbias, dweight
