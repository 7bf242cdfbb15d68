"""What a layer is measured on, and how its results are checked against the float64 reference."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from sbncore import reference

EPS = 1e-5
MB = 1_000_000
LINE = 64  # bytes of a cache line
ITEMSIZE = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}
SAMPLED = 1 / 16  # of the data, where nothing else is said
CHECKED = 1_700_000  # values at most that the reference is given, but for one whole channel


class Tolerance(NamedTuple):
    """Largest error, relative to the largest value."""

    ours: float
    peers: float  # NumPy adds rows in float32, one by one; PyTorch rounds after each operation
    unsure: float  # |z| up to which rounding may decide whether ReLU passes a value


TOLERANCE = {
    "float64": Tolerance(1e-11, 5e-10, 1e-9),
    "float32": Tolerance(2e-5, 1e-3, 1e-3),
    "float16": Tolerance(4e-3, 1e-2, 3e-2),
    "bfloat16": Tolerance(3e-2, 6e-2, 3e-2),
}


class WrongResult(Exception):
    """An implementation that differs from the reference; its speed is of no interest."""


@dataclass(frozen=True)
class Case:
    """One layer's call; ``layout`` "first" or "last" is the memory's, channels are axis 1 in both."""

    shape: tuple[int, ...]
    layout: str = "first"
    dtype: str = "float32"
    relu: bool = False
    residual: bool = False

    @property
    def size(self) -> str:
        return "×".join(map(str, self.shape))

    @property
    def variant(self) -> str:
        return "BN" + "+add" * self.residual + "+ReLU" * self.relu

    @property
    def C(self) -> int:
        return self.shape[1]

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.elements * ITEMSIZE[self.dtype]

    def moved(self, phase: str, sampled: float = SAMPLED) -> int:
        """Return the bytes of an exact phase: tensors, the sample again, a bit for each masked value."""
        masked = self.relu and self.residual
        tensors, sample, bits = {"forward": (2 + self.residual, 1, 1), "backward": (3 + masked, 3, 1)}.get(
            phase, (5 + self.residual + masked, 4, 2)
        )
        return round((tensors + sample * sampled) * self.nbytes) + masked * bits * self.elements // 8

    def __str__(self) -> str:
        return f"{self.size} channels-{self.layout} {self.dtype} {self.variant}"


class Buffers(NamedTuple):
    """Inputs, and the memory that results go to."""

    x: Any
    dy: Any
    y: Any
    dx: Any
    residual: Any


class Data:
    """The arrays of a case in its memory layout: NumPy's, or PyTorch's tensors on a device.

    Several ``sets`` of buffers, used in rotation, keep a tensor from being still in the cache.
    """

    def __init__(self, case: Case, device: str | None = None, sets: int = 1) -> None:
        self.case, self.rng = case, np.random.default_rng(0)
        self.wide: Any = np.float64 if case.dtype == "float64" else np.float32
        new = partial(_array, case)
        if device:
            import torch

            torch.manual_seed(0)
            new = partial(_tensor, case, device)
        self.sets = [
            Buffers(
                self._normal(new(), 1, 2),
                self._normal(new(), 0, 1),
                new(),
                new(),
                self._normal(new(), 0, 1) if case.residual else None,
            )
            for _ in range(sets)
        ]
        parameters = [self._normal(np.empty(case.C, self.wide), mean, 0.1) for mean in (1, 0)]
        self.weight, self.bias = (tensor(each).to(device) for each in parameters) if device else parameters

    def _normal(self, array: Any, mean: float, deviation: float) -> Any:
        if not isinstance(array, np.ndarray):
            return array.normal_(mean, deviation)
        values = self.rng.standard_normal(array.shape, dtype=self.wide)
        array[...] = mean + np.float32(deviation) * values
        return array

    def memory(self, array: np.ndarray) -> np.ndarray:
        """Return a NumPy array as (N, C, S), or channels-last as (N*S, C): a view."""
        N, C = self.case.shape[:2]
        if self.case.layout == "first":
            return array.reshape(N, C, -1)
        return np.moveaxis(array, 1, -1).reshape(-1, C)

    def shaped(self, array: np.ndarray) -> np.ndarray:
        """Return what `memory` returned in the case's shape; a parameter as it is."""
        N, C, *spatial = self.case.shape
        if array.ndim == 1:
            return array
        if self.case.layout == "first":
            return array.reshape(self.case.shape)
        return np.moveaxis(array.reshape(N, *spatial, C), -1, 1)


def _array(case: Case) -> np.ndarray:
    """Return unset memory from the beginning of a cache line on, where PyTorch's own begins too."""
    if case.dtype == "bfloat16":
        import ml_dtypes  # noqa: F401  (NumPy learns the name)
    N, C, *spatial = case.shape
    memory = np.empty(case.nbytes + LINE, np.uint8)
    first = -memory.ctypes.data % LINE
    flat = memory[first : first + case.nbytes].view(case.dtype)
    if case.layout == "first":
        return flat.reshape(case.shape)
    return np.moveaxis(flat.reshape(N, *spatial, C), -1, 1)


def _tensor(case: Case, device: str) -> Any:
    import torch

    layout = torch.contiguous_format if case.layout == "first" else torch.channels_last
    kind = getattr(torch, case.dtype)
    return torch.empty(case.shape, device=device, dtype=kind, memory_format=layout)


def tensor(array: Any) -> Any:
    """Return PyTorch's view of a NumPy array, or the tensor it is."""
    import torch

    if not isinstance(array, np.ndarray):
        return array
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def host(array: Any) -> np.ndarray:
    """Return any array as float64 in NumPy's."""
    if hasattr(array, "detach"):
        return array.detach().double().cpu().numpy()  # type: ignore[no-any-return]
    return np.asarray(array.get() if hasattr(array, "get") else array).astype(np.float64)


def verify(one: Any) -> None:
    """Compare a contender's forward and backward with the reference, on a few channels of the whole batch.

    Nothing crosses channels, so that checking a few is exact. Where rounding may decide about ReLU, dy of
    these channels becomes 0: either derivative is right there.

    Raises:
        WrongResult: naming what differs and by how much.
    """
    data, case, allowed = one.data, one.data.case, TOLERANCE[one.data.case.dtype]
    values = case.elements // case.C
    few = max(1, min(16, CHECKED // values))
    # The last channel is always among them: it is at the largest offset.
    at = np.unique(np.linspace(case.C - 1, 0, few).astype(int)).tolist()
    x, dy, _, _, residual = data.sets[0]
    one.turn = -1
    one.forward()
    y, saved = reference.forward(
        host(x[:, at]),
        host(data.weight[at]),
        host(data.bias[at]),
        p=one.weights(),
        eps=EPS,
        activation="relu" if case.relu else None,
        residual=None if residual is None else host(residual[:, at]),
    )
    if case.relu:
        sure = np.abs(saved.z) >= allowed.unsure
        dy[:, at] *= sure.astype(dy.dtype) if isinstance(dy, np.ndarray) else dy.new_tensor(sure)
    one.turn = -1
    one.backward()
    truth = {"y": y, **reference.backward(host(dy[:, at]), saved)}
    for name, value in one.results().items():
        of_channels = value.ndim == 1
        least = math.sqrt(values) if of_channels else 1.0  # a sum of so many may be near 0 by chance
        got = host(value[at] if of_channels else value[:, at])
        error = np.abs(got - truth[name]).max() / max(least, np.abs(truth[name]).max())
        tolerance = allowed.ours if one.ours else allowed.peers
        if not error <= tolerance:
            what = name if name == "y" else f"the gradient of {name}"
            bound = f"more than {tolerance:.0e} allows"
            raise WrongResult(f"{one.name} on {case}: {what} is off by {error:.1e}, {bound}")
