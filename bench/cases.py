"""What a layer is measured on, and the judge: arrays of one shape, layout and dtype against the reference."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from sbncore import reference
from sbncore.arrays import empty

EPS = 1e-5
TOLERANCE = {"float64": 1e-11, "float32": 2e-5, "float16": 4e-3, "bfloat16": 3e-2}
JUDGED = 1_500_000  # values at most that the float64 reference is given


class WrongResult(Exception):
    """An implementation that differs from the reference; its speed is of no interest."""


@dataclass(frozen=True)
class Case:
    """One layer's call; layout "first" or "last" is the memory's, channels are axis 1 in both."""

    shape: tuple[int, ...]
    layout: str
    dtype: str
    relu: bool
    residual: bool

    def __str__(self) -> str:
        extras = "".join(f" +{name}" for name in ("residual", "relu") if getattr(self, name))
        return f"{'×'.join(map(str, self.shape))} channels-{self.layout} {self.dtype}{extras}"


class Data:
    """The arrays of a case, in its memory layout, and the buffers that results go to.

    All begin at a cache line, as PyTorch's own do, for every contender alike.
    """

    def __init__(self, case: Case, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.case = case
        self.dtype = _dtype(case.dtype)
        wide = np.float64 if case.dtype == "float64" else np.float32
        N, C, *spatial = case.shape
        sizes = (N, C, *spatial) if case.layout == "first" else (N, *spatial, C)

        def draw(mean: float, deviation: float) -> np.ndarray:
            values = rng.standard_normal(sizes, dtype=wide)
            values *= deviation
            values += mean
            memory = empty(sizes, self.dtype)
            memory[...] = values
            return self.arrange(memory)

        self.x, self.dy = draw(1, 2), draw(0, 1)
        self.residual = draw(0, 1) if case.residual else None
        self.weight = (1 + 0.1 * rng.standard_normal(C)).astype(wide)
        self.bias = (0.1 * rng.standard_normal(C)).astype(wide)
        self.y, self.dx = (self.arrange(empty(sizes, self.dtype)) for _ in range(2))

    def arrange(self, memory: np.ndarray) -> np.ndarray:
        return memory if self.case.layout == "first" else np.moveaxis(memory, -1, 1)

    def memory(self, array: np.ndarray) -> np.ndarray:
        """Return the array as (N, C, S), or channels-last as (N*S, C): a view."""
        N, C = self.case.shape[:2]
        if self.case.layout == "first":
            return array.reshape(N, C, -1)
        return np.moveaxis(array, 1, -1).reshape(-1, C)


class Implementation(Protocol):
    """One way to compute a layer: ours or a peer's."""

    name: str

    def forward(self) -> None: ...

    def backward(self) -> None: ...

    def weights(self) -> np.ndarray:
        """Return p of the last forward, (N, *spatial)."""

    def results(self) -> dict[str, Any]:
        """Return y and the gradients by name, as NumPy arrays."""


def verify(one: Implementation, data: Data, tolerance: float) -> None:
    """Compare a forward and a backward with the reference, on a few channels of the whole batch.

    Nothing crosses channels, so that judging a few of them is exact.

    Raises:
        WrongResult: naming what differs and by how much.
    """
    case = data.case
    N, C, *spatial = case.shape
    few = max(2, min(16, JUDGED // (N * int(np.prod(spatial)))))
    at = np.unique(np.linspace(0, C - 1, few).astype(int))
    one.forward()
    y, saved = reference.forward(
        data.x[:, at], data.weight[at], data.bias[at], p=one.weights(), eps=EPS,
        activation="relu" if case.relu else None,
        residual=None if data.residual is None else data.residual[:, at],
    )  # fmt: skip
    if case.relu:  # where z is 0 up to rounding either derivative is right
        dy = data.dy[:, at]
        dy[np.abs(saved.z) < (1e-9 if case.dtype == "float64" else 1e-3)] = 0
        data.dy[:, at] = dy
    one.backward()
    truth = {"y": y, **reference.backward(data.dy[:, at], saved)}
    for name, value in one.results().items():
        got = np.asarray(value[at] if value.ndim == 1 else value[:, at]).astype(np.float64)
        error = np.abs(got - truth[name]).max() / max(1.0, np.abs(truth[name]).max())
        if not error <= tolerance:
            what = name if name == "y" else f"the gradient of {name}"
            raise WrongResult(
                f"{one.name} on {case}: {what} is off by {error:.1e}, more than {tolerance:.0e} allows"
            )


def _dtype(name: str) -> np.dtype:
    if name != "bfloat16":
        return np.dtype(name)
    import ml_dtypes

    return np.dtype(ml_dtypes.bfloat16)
