"""Numerical gradient checking of any forward/backward pair of functions on arrays of any framework."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import ceil, inf, isfinite, log2, sqrt
from typing import Any, NamedTuple

import numpy as np

from sbncore.drawing import integer
from sbncore.gradient_functions import Array, Function, gradients_of, inputs_of

__all__ = ["Discrepancy", "GradientReport", "check_gradients"]

_ROUND_OFF = 32  # units in the last place
DEFAULTS = {"float64": (1e-6, 1e-8, 1e-3), "float32": (2e-3, 1e-4, 0.03)}  # rtol, atol, step


@dataclass(frozen=True)
class Discrepancy:
    """One comparison, at the element ``index`` or (None) along the direction of that number."""

    name: str
    index: tuple[int, ...] | None
    direction: int | None
    analytic: float
    numerical: float
    error: float  # |analytic - numerical| / max(|analytic|, |numerical|)
    excess: float  # |analytic - numerical| / tolerance: above 1 it fails
    hint: str = ""  # why the numerical value is itself in doubt

    def __str__(self) -> str:
        where = f" along direction {self.direction}" if self.index is None else ""
        where = str(list(self.index)) if self.index else where
        text = f"{self.name}{where}: analytic {self.analytic!r}, numerical {self.numerical!r}"
        return f"{text}, relative error {self.error:.1e}" + (self.hint and f" ({self.hint})")


@dataclass(frozen=True)
class GradientReport:
    """What ``check_gradients`` found: true when all passed, printable."""

    passed: bool
    worst: Discrepancy
    checks: int
    failed: int
    by_input: tuple[Discrepancy, ...]  # the worst of each input

    def __bool__(self) -> bool:
        return self.passed

    def __str__(self) -> str:
        if self.passed:
            return f"gradients agree in {self.checks} checks; the worst is {self.worst}"
        others = [d for d in self.by_input if d.excess > 1 and d is not self.worst]
        head = f"gradients differ in {self.failed} of {self.checks} checks:"
        return "\n  ".join([head, *map(str, [self.worst, *others])])

    def raise_if_failed(self) -> None:
        """Raise AssertionError with the report's text unless all passed."""
        if not self.passed:
            raise AssertionError(str(self))


def check_gradients(
    forward: Callable[..., object],
    backward: Callable[..., object],
    inputs: Sequence[Any] | Mapping[str, Any],
    *,
    names: Sequence[str] | None = None,
    outputs: int | None = None,
    directions: int = 8,
    elementwise: int = 2000,
    rtol: float | None = None,
    atol: float | None = None,
    step: float | None = None,
    seed: int = 0,
) -> GradientReport:
    """Compare the gradients that ``backward`` returns with numerical derivatives of ``forward``.

    ::

        L = Σ dy·y with dy random and fixed,    grad = dL/dinput from backward
        numerical = Σ dy·(8·[y(h) - y(-h)] - [y(2h) - y(-2h)]) / 12h,  y(t) = forward(input + t·v)
        |Σ grad·v - numerical| ≤ rtol·rms(grad·v) + atol·‖v‖·max|grad| + 32ε·(‖dy·y‖ + ‖grad·x‖) / h

    ``v`` is, for each input by itself, every one of some random directions and every element (v
    is 1 there, 0 elsewhere). An input of more than ``elementwise`` elements is cut instead into
    about √size runs, each with a random direction, and a failing run is bisected to an element:
    a wrong element shows in an array of any size, unless it is tiny beside the others. Where a
    check fails, h shrinks until the numerical value is steady, and the report says if that never
    happens or if the slopes on the two sides differ: a kink or noise, perhaps, and no wrong
    gradient. Keep the inputs away from kinks, such as a ReLU's 0, and the functions repeatable.
    No array of the caller's is changed. The cost is about 4 forward calls a check.

    Arrays are NumPy's, or another framework's on the CPU that speak DLPack, such as PyTorch's and JAX's;
    forward and backward get each of its own type. Check in float64 where the functions can; in float32, where
    ε is 1.2e-7, an error of some thousandths is in their rounding.

    Arguments:
        forward: called with one array per input, returns ``y`` or ``(y, saved)``; y is float64, or float32
            if an input is. Of several outputs it returns ``(y1, y2, ...)`` or ``(y1, y2, ..., saved)``.
        backward: called with ``(dy)`` or ``(dy, saved)``, or with ``(dy1, dy2, ...)`` and so on, returns the
            gradients in the inputs' order, or by name as a mapping or as attributes; one that is None is
            not checked.
        inputs: float64 or float32 arrays of any shape, in order or by name.
        names: the inputs' names, where ``inputs`` is a sequence.
        outputs: how many arrays forward returns before ``saved``; by default one, unless what follows it
            looks like another, which is then asked for.
        directions: number of random directions per input, 0 for none.
        elementwise: largest size that is checked element by element, 0 for directions only.
        rtol, atol: the tolerances of the formula; 1e-6 and 1e-8, with a float32 input 2e-3 and 1e-4.
        step: h in units of the input's standard deviation (of its magnitude, if constant), times the fifth
            root of max|x| in that unit: it balances the formula's error, h⁴, and the resolution of x, 1/h.
            1e-3, with a float32 input 0.03.
        seed: of dy and v; the report is a function of the arguments alone.

    Returns:
        The report: true when all passed, printable, with ``raise_if_failed()``.

    Raises:
        TypeError: an array of another dtype or device, a result of an unknown form, or a count that is no
            integer.
        ValueError: no inputs, a wrong shape, values that are not finite, or a bad option.
    """
    counts = {"directions": directions, "elementwise": elementwise}
    for option, count in {**counts, "seed": seed, "outputs": 1 if outputs is None else outputs}.items():
        integer(option, count)
    if outputs is not None and outputs < 1:
        raise ValueError(f"outputs must be 1 or more, got {outputs}")
    if directions == elementwise == 0:
        raise ValueError("directions and elementwise are both 0: nothing to check")
    function = Function(forward, outputs, inputs_of(inputs, names))
    rtol, atol, step = (
        default if given is None else given
        for given, default in zip((rtol, atol, step), DEFAULTS[function.precision], strict=True)
    )
    options = {**counts, "atol": atol}
    for option, number in (options | {"rtol": rtol, "step": step}).items():
        if not 0 <= number < inf or (number == 0 and option in ("rtol", "step")):
            raise ValueError(f"{option} must be positive and finite, got {number}")
    arrays = function.arrays
    rng = np.random.default_rng([seed, 0x67726164])  # lest dy equal an input drawn from the seed
    y, saved = function(arrays)
    if y.size == 0 or not np.isfinite(y).all():
        raise ValueError("forward's y is empty or not finite everywhere")
    dy = rng.standard_normal(y.size)
    grads = gradients_of(backward(*function.split(dy), *saved), function)
    checks, failed, by_input = 0, 0, list[Discrepancy]()
    for name, grad in grads.items():
        cuts = np.linspace(0, grad.size, ceil(sqrt(grad.size)) + 1).astype(int).tolist()
        spans = [(0, grad.size)] * directions
        spans += pairwise(cuts) if grad.size > elementwise > 0 else []
        probes = [_Probe(a, _direction(rng, b - a), d) for d, (a, b) in enumerate(spans)]
        if grad.size <= elementwise:
            probes += [_Probe(i, np.ones(1), None) for i in range(grad.size)]
        h = _step(arrays[name], step, float(np.finfo(function.precision).eps))
        checker = _Checker(function, arrays, name, grad, y, dy, h, rtol, atol)
        worst, failures = checker.judge(probes)
        checks, failed = checks + len(probes), failed + failures
        by_input.append(worst)
    worst = max(by_input, key=lambda d: (d.excess > 1 and d.index is not None, d.excess))
    return GradientReport(failed == 0, worst, checks, failed, tuple(by_input))


class _Probe(NamedTuple):
    """A direction ``v`` over the flat elements from ``start``; a single element has no number."""

    start: int
    v: Array
    number: int | None


def _direction(rng: np.random.Generator, size: int) -> Array:
    """Return entries of ±[1, 2): none tiny, few alike, of few bits, so that x + h·v is exact."""
    v: Array = rng.integers(64, 128, size) / 64 * rng.choice([-1.0, 1.0], size)
    return v


def _step(x: Array, step: float, eps: float) -> float:
    """Return a power of 2 near `check_gradients`' h."""
    peak = float(np.abs(x).max()) or 1.0
    spread = float(np.std(x / peak))
    spread = spread if spread > 64 * eps else 1.0
    return float(2.0 ** round(log2(step * peak * spread ** (4 / 5))))


class _Checker(NamedTuple):
    """The comparisons for the input ``name``."""

    function: Function
    arrays: dict[str, Array]
    name: str
    grad: Array
    y: Array
    dy: Array
    h: float
    rtol: float
    atol: float

    def judge(self, probes: list[_Probe]) -> tuple[Discrepancy, int]:
        """Return the worst discrepancy, an element's if one fails, and the number of failures."""
        found = [(probe, self.compare(probe)) for probe in probes]
        bad = [(probe, d) for probe, d in found if d.excess > 1]
        if not bad:
            return max((d for _, d in found), key=lambda d: d.excess), 0
        probe, worst = min(bad, key=lambda f: (f[0].v.size, -f[1].excess))
        while (cut := probe.v.size // 2) > 0:  # down to the element that errs
            left = _Probe(probe.start, probe.v[:cut], 0)
            right = _Probe(probe.start + cut, probe.v[cut:], 0)
            probe = max(left, right, key=lambda half: self.compare(half).excess)
        element = self.compare(_Probe(probe.start, np.ones(1), None))
        return element if element.excess > 1 else worst, len(bad)

    def slopes(self, probe: _Probe, h: float) -> tuple[float, float]:
        """Return the derivative along the probe, and the right-hand less the left-hand one."""
        ys, part = [], slice(probe.start, probe.start + probe.v.size)
        with np.errstate(all="ignore"):
            for t in (-2 * h, -h, h, 2 * h):
                x = self.arrays[self.name].copy(order="K")
                x.flat[part] = x.flat[part] + t * probe.v
                ys.append(self.function(self.arrays | {self.name: x})[0])
            rise = 8 * (ys[2] - ys[1]) - (ys[3] - ys[0])  # differences first: errors cancel
            bend = (ys[2] - self.y) - (self.y - ys[1])
            return float((self.dy * rise).sum() / (12 * h)), float((self.dy * bend).sum() / h)

    def compare(self, probe: _Probe) -> Discrepancy:
        """Compare along the probe; where that fails, with smaller steps until one is steady."""
        terms = self.grad.flat[probe.start : probe.start + probe.v.size] * probe.v
        analytic = float(terms.sum())
        allowed = self.rtol * float(np.linalg.norm(terms)) / sqrt(terms.size)
        allowed += self.atol * float(np.linalg.norm(probe.v) * np.abs(self.grad).max())
        noise = float(np.linalg.norm(self.dy * self.y))
        noise += float(np.linalg.norm(self.grad * self.arrays[self.name]))
        noise *= _ROUND_OFF * float(np.finfo(self.function.precision).eps)
        h, steady, hint = self.h, False, ""
        first, bend = numerical, _ = self.slopes(probe, h)
        while not (gap := abs(analytic - numerical)) <= (tolerance := allowed + noise / h):
            if steady or h < self.h / 8**6:
                break
            before, bend_before, h = numerical, bend, h / 8
            numerical, bend = self.slopes(probe, h)
            steady = abs(numerical - before) <= allowed + noise / h
        if not isfinite(numerical):
            raise ValueError(f"forward's y is not finite close to {self.name}")
        if gap > tolerance and not steady:
            hint = f"a kink or noise? smaller steps lead to {numerical!r}"
            numerical = first if isfinite(first) else numerical
            gap, tolerance = abs(analytic - numerical), allowed + noise / self.h
        elif gap > tolerance and abs(bend) > max(abs(bend_before) / 2, 1.8 * gap):
            hint = f"a kink? the slopes on its two sides differ by {abs(bend)!r}"
        error = gap / max(abs(analytic), abs(numerical)) if gap else 0.0
        excess = (gap / tolerance if tolerance else inf) if gap else 0.0
        index = None
        if probe.number is None:
            index = tuple(int(i) for i in np.unravel_index(probe.start, self.grad.shape))
        return Discrepancy(self.name, index, probe.number, analytic, numerical, error, excess, hint)
