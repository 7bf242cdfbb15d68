"""Numerical gradient checking of any forward/backward pair of functions on float64 arrays."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import ceil, inf, isfinite, log2, prod, sqrt
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from sbncore.drawing import integer

__all__ = ["Discrepancy", "GradientReport", "check_gradients"]

Array = NDArray[np.float64]

_ROUND_OFF = 32 * float(np.finfo(np.float64).eps)


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
    inputs: Sequence[Array] | Mapping[str, Array],
    *,
    names: Sequence[str] | None = None,
    outputs: int | None = None,
    directions: int = 8,
    elementwise: int = 2000,
    rtol: float = 1e-6,
    atol: float = 1e-8,
    step: float = 1e-3,
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

    Arguments:
        forward: called with one array per input, returns ``y`` or ``(y, saved)``; y is float64. Of
            several outputs it returns ``(y1, y2, ...)`` or ``(y1, y2, ..., saved)``.
        backward: called with ``(dy)`` or ``(dy, saved)``, or with ``(dy1, dy2, ...)`` and so on, returns the
            gradients in the inputs' order, or by name as a mapping or as attributes; one that is None is
            not checked.
        inputs: float64 arrays of any shape, in order or by name.
        names: the inputs' names, where ``inputs`` is a sequence.
        outputs: how many arrays forward returns before ``saved``; by default one, unless what follows it
            looks like another, which is then asked for.
        directions: number of random directions per input, 0 for none.
        elementwise: largest size that is checked element by element, 0 for directions only.
        rtol, atol: the tolerances of the formula.
        step: h in units of the input's standard deviation (of its magnitude, if constant), times the fifth
            root of max|x| in that unit: it balances the formula's error, h⁴, and the resolution of x, 1/h.
        seed: of dy and v; the report is a function of the arguments alone.

    Returns:
        The report: true when all passed, printable, with ``raise_if_failed()``.

    Raises:
        TypeError: an array that is not float64, a result of an unknown form, or a count that is no integer.
        ValueError: no inputs, a wrong shape, values that are not finite, or a bad option.
    """
    counts = {"directions": directions, "elementwise": elementwise}
    for option, count in {**counts, "seed": seed, "outputs": 1 if outputs is None else outputs}.items():
        integer(option, count)
    if outputs is not None and outputs < 1:
        raise ValueError(f"outputs must be 1 or more, got {outputs}")
    options = {**counts, "atol": atol}
    for option, number in (options | {"rtol": rtol, "step": step}).items():
        if not 0 <= number < inf or (number == 0 and option in ("rtol", "step")):
            raise ValueError(f"{option} must be positive and finite, got {number}")
    if directions == elementwise == 0:
        raise ValueError("directions and elementwise are both 0: nothing to check")
    arrays = _inputs(inputs, names)
    rng = np.random.default_rng([seed, 0x67726164])  # lest dy equal an input drawn from the seed
    function = _Function(forward, outputs)
    y, saved = function(arrays)
    if y.size == 0 or not np.isfinite(y).all():
        raise ValueError("forward's y is empty or not finite everywhere")
    dy = rng.standard_normal(y.size)
    grads = _gradients(backward(*function.split(dy.copy()), *saved), arrays)
    checks, failed, by_input = 0, 0, list[Discrepancy]()
    for name, grad in grads.items():
        cuts = np.linspace(0, grad.size, ceil(sqrt(grad.size)) + 1).astype(int).tolist()
        spans = [(0, grad.size)] * directions
        spans += pairwise(cuts) if grad.size > elementwise > 0 else []
        probes = [_Probe(a, _direction(rng, b - a), d) for d, (a, b) in enumerate(spans)]
        if grad.size <= elementwise:
            probes += [_Probe(i, np.ones(1), None) for i in range(grad.size)]
        checker = _Checker(function, arrays, name, grad, y, dy, _step(arrays[name], step), rtol, atol)
        worst, failures = checker.judge(probes)
        checks, failed = checks + len(probes), failed + failures
        by_input.append(worst)
    worst = max(by_input, key=lambda d: (d.excess > 1 and d.index is not None, d.excess))
    return GradientReport(failed == 0, worst, checks, failed, tuple(by_input))


class _Function:
    """forward as a function of all inputs to one flat array, the outputs one after another."""

    def __init__(self, forward: Callable[..., object], outputs: int | None) -> None:
        self.forward, self.outputs = forward, outputs
        self.shapes: list[tuple[int, ...]] = []

    def __call__(self, arrays: dict[str, Array]) -> tuple[Array, list[object]]:
        """Return y and a list of what forward saved, empty if it returned nothing more."""
        handed = [x.copy(order="K") for x in arrays.values()]
        result = self.forward(*handed)
        values = list(result) if isinstance(result, tuple) else [result]
        count = self.outputs or 1
        if not count <= len(values) <= count + 1:
            form = "y or (y, saved)" if count == 1 else f"{count} outputs, or those and saved"
            raise TypeError(f"forward must return {form}, got {len(values)} values; outputs says how many")
        ys, saved = values[:count], values[count:]
        if self.outputs is None and any(_looks_like_an_output(each, [*handed, *ys]) for each in saved):
            raise TypeError(
                "forward returned two float64 arrays: pass outputs=2 if both are outputs, outputs=1 if the "
                "second is what backward needs"
            )
        arrays_of = [_float64("forward's y", y) for y in ys]
        shapes = [y.shape for y in arrays_of]
        self.shapes = self.shapes or shapes
        for before, shape in zip(self.shapes, shapes, strict=True):
            if shape != before:
                raise ValueError(f"forward's y has shape {before}, then {shape}")
        return np.concatenate([y.ravel() for y in arrays_of]), saved

    def split(self, flat: Array) -> list[Array]:
        """Return the parts of a flat array that belong to each output, in its shape."""
        sizes = [prod(shape) for shape in self.shapes]
        parts = np.split(flat, np.cumsum(sizes)[:-1])
        return [part.reshape(shape) for part, shape in zip(parts, self.shapes, strict=True)]


def _looks_like_an_output(value: object, others: list[object]) -> bool:
    """Whether it is an array as outputs are, and neither an input nor the output that stands before it."""
    is_array = isinstance(value, np.ndarray) and value.dtype == np.float64
    return is_array and not any(value is other for other in others)


class _Probe(NamedTuple):
    """A direction ``v`` over the flat elements from ``start``; a single element has no number."""

    start: int
    v: Array
    number: int | None


def _direction(rng: np.random.Generator, size: int) -> Array:
    """Return entries of ±[1, 2): none tiny, few alike, of few bits, so that x + h·v is exact."""
    v: Array = rng.integers(64, 128, size) / 64 * rng.choice([-1.0, 1.0], size)
    return v


def _step(x: Array, step: float) -> float:
    """Return a power of 2 near `check_gradients`' h."""
    peak = float(np.abs(x).max()) or 1.0
    spread = float(np.std(x / peak))
    spread = spread if spread > 64 * float(np.finfo(np.float64).eps) else 1.0
    return float(2.0 ** round(log2(step * peak * spread ** (4 / 5))))


class _Checker(NamedTuple):
    """The comparisons for the input ``name``."""

    function: _Function
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
        noise *= _ROUND_OFF
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


def _inputs(inputs: Sequence[Array] | Mapping[str, Array], names: Sequence[str] | None) -> dict[str, Array]:
    if isinstance(inputs, Mapping):
        names, inputs = list(inputs) if names is None else names, list(inputs.values())
    if isinstance(inputs, np.ndarray):
        raise TypeError("inputs must be a sequence or a mapping of arrays, got one array")
    if len(inputs) == 0:
        raise ValueError("inputs is empty: nothing to check")
    labels = names or [f"inputs[{i}]" for i in range(len(inputs))]
    if not len(labels) == len(set(labels)) == len(inputs):
        raise ValueError(f"{len(inputs)} inputs need a name each, got {labels}")
    return {label: _finite(label, x) for label, x in zip(labels, inputs, strict=True)}


def _gradients(result: object, arrays: dict[str, Array]) -> dict[str, Array]:
    """Return by name the gradients that are not None."""
    values: list[object] = [result]
    if isinstance(result, Mapping):
        values = [result[name] for name in arrays if name in result]
    elif type(result) not in (list, tuple) and all(hasattr(result, name) for name in arrays):
        values = [getattr(result, name) for name in arrays]
    elif isinstance(result, (list, tuple)):
        values = [*result]
    if len(values) != len(arrays):
        came = f"{len(values)} (in {type(result).__name__})"
        came += f", under the names {[*result]}" if isinstance(result, Mapping) else ""
        raise ValueError(f"backward must return a gradient for each of {[*arrays]}, got {came}")
    pairs = zip(arrays, values, strict=True)
    grads = {name: _finite(f"the gradient of {name}", g) for name, g in pairs if g is not None}
    for name, grad in grads.items():
        if grad.shape != (shape := arrays[name].shape):
            raise ValueError(f"the gradient of {name} has shape {grad.shape}, {name} has {shape}")
    if not grads:
        raise ValueError("backward returned None for every input: nothing to check")
    return grads


def _float64(what: str, value: object) -> Array:
    array: Array = np.array(value, order="K")  # a copy: the caller may use the buffer again
    if array.dtype != np.float64:
        came = f"{array.dtype} ({type(value).__name__})"
        raise TypeError(f"{what} must be a float64 array, got {came}")
    return array


def _finite(what: str, value: object) -> Array:
    array = _float64(what, value)
    if array.size == 0 or not np.isfinite(array).all():
        raise ValueError(f"{what} is empty or not finite everywhere")
    return array
