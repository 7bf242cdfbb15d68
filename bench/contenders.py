"""What the GPU benchmark lets run: a case's rotating buffers, ours and PyTorch over them, and their judge.

Works on PyTorch's CPU tensors too, which is how its tests run without a GPU.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

import sbncore as sbn
from bench.cases import WrongResult
from bench.goals import SAMPLED, Case
from sbncore import reference

SAMPLER = sbn.FeatureSampling(1 / SAMPLED)
EPS = 1e-5
TOLERANCE = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 6e-2}
UNSURE = 3e-2  # of z, within which rounding may decide whether ReLU passes a value
MOST_BUFFERS = 128
LARGE = 1_500_000  # values of a channel, beyond which one is judged, not two


def buffers(case: Case, l2: int) -> int:
    """Return how many sets of buffers hold twice the L2 cache in x and y alone, which a forward touches."""
    return max(1, min(MOST_BUFFERS, -(-2 * l2 // (2 * case.nbytes))))


class Data:
    """Buffers (x, dy, y, dx, residual), more than L2 holds: ``tensors``, and ``sets`` as ours takes them."""

    def __init__(self, case: Case, l2: int, device: str = "cuda") -> None:
        import torch

        self.case = case
        kind = getattr(torch, case.dtype)
        layout = torch.channels_last if case.last else torch.contiguous_format
        torch.manual_seed(1)

        def normal(mean: float = 0.0, deviation: float = 1.0) -> Any:
            values = torch.randn(case.shape, device=device, dtype=kind).mul_(deviation).add_(mean)
            return values.contiguous(memory_format=layout)

        def unset() -> Any:
            return torch.empty(case.shape, device=device, dtype=kind, memory_format=layout)

        self.tensors = [
            (normal(1, 2), normal(), unset(), unset(), normal() if case.residual else None)
            for _ in range(buffers(case, l2))
        ]
        noise = [0.1 * torch.randn(case.C, device=device) for _ in range(2)]
        self.torch_parameters = [1 + noise[0], noise[1]]

        def view(tensor: Any) -> Any:
            if tensor is None or device == "cpu" or tensor.dtype == torch.bfloat16:
                return tensor
            import cupy

            return cupy.from_dlpack(tensor)

        self.sets = [tuple(map(view, each)) for each in self.tensors]
        self.parameters = [view(parameter) for parameter in self.torch_parameters]


class Contender:
    """A layer over the sets of buffers, the next of them in every call; "both" goes back to forward's."""

    name: str
    turn = 0

    def __init__(self, data: Data) -> None:
        self.data = data

    def next(self) -> int:
        self.turn = (self.turn + 1) % len(self.data.sets)
        return self.turn

    def forward(self) -> Any:
        raise NotImplementedError

    def backward(self) -> Any:
        raise NotImplementedError

    def both(self) -> Any:
        kept = self.forward()
        self.turn -= 1
        return kept, self.backward()

    def p(self) -> np.ndarray:
        """Return the statistics' weights, (N, *spatial)."""
        raise NotImplementedError

    def y(self) -> Any:
        """Return the output of the set that is on."""
        raise NotImplementedError

    def gradients(self) -> dict[str, Any]:
        """Return the last gradients by name."""
        raise NotImplementedError


class Ours(Contender):
    """sbncore; its outputs go to the sets' y and dx. A call returns what a captured graph must keep."""

    name = "ours"

    def __init__(self, data: Data) -> None:
        super().__init__(data)
        self.activation = "relu" if data.case.relu else None
        self.plan = SAMPLER.plan(data.case.shape, step=1)
        self.saved: list[Any] = [None] * len(data.sets)
        for _ in data.sets:
            self.forward()

    def forward(self) -> Any:
        k = self.next()
        x, _, y, _, residual = self.data.sets[k]
        _, self.saved[k] = sbn.forward(
            x, *self.data.parameters, plan=self.plan, activation=self.activation, residual=residual, out=y,
            eps=EPS,
        )  # fmt: skip
        return self.saved[k]

    def backward(self) -> Any:
        k = self.next()
        self.grads = sbn.backward(self.data.sets[k][1], self.saved[k], out=self.data.sets[k][3])
        return self.saved[k], self.grads

    def p(self) -> np.ndarray:
        return self.plan.weights()

    def y(self) -> Any:
        return self.data.tensors[self.turn][2]

    def gradients(self) -> dict[str, Any]:
        found = self.grads._asdict() | {"x": self.data.tensors[self.turn][3]}
        return {name: gradient for name, gradient in found.items() if gradient is not None}


class Torch(Contender):
    """PyTorch's functional batch norm (cuDNN's), add and ReLU, with autograd; eager or compiled."""

    def __init__(self, data: Data, compiled: bool = False) -> None:
        import torch

        super().__init__(data)
        self.name = "torch.compile" if compiled else "PyTorch"
        self.inputs = [
            [t.detach().requires_grad_() for t in (x, *data.torch_parameters, r) if t is not None]
            for x, _, _, _, r in data.tensors
        ]
        relu = data.case.relu

        def layer(x: Any, weight: Any, bias: Any, residual: Any = None) -> Any:
            y = torch.nn.functional.batch_norm(x, None, None, weight, bias, training=True, eps=EPS)
            y = y if residual is None else y + residual
            return torch.relu(y) if relu else y

        self.layer: Any = layer
        if compiled:
            torch._dynamo.reset()  # else the ninth case, and every one after it, would run eagerly
            self.layer = torch.compile(layer, dynamic=False)
        self.outputs: list[Any] = [self.layer(*inputs) for inputs in self.inputs]

    def forward(self) -> Any:
        k = self.next()
        self.outputs[k] = self.layer(*self.inputs[k])

    def backward(self) -> Any:
        import torch

        k = self.next()
        dy = self.data.tensors[k][1]
        self.grads = torch.autograd.grad(self.outputs[k], self.inputs[k], dy, retain_graph=True)

    def p(self) -> np.ndarray:
        N, C, *spatial = self.data.case.shape
        return np.full((N, *spatial), C / self.data.case.elements)

    def y(self) -> Any:
        return self.outputs[self.turn].detach()

    def gradients(self) -> dict[str, Any]:
        return dict(zip(("x", "weight", "bias", "residual"), self.grads, strict=False))


def judge(data: Data, *contenders: Contender) -> None:
    """Compare a forward and a backward of each with the reference: first and last channel, or the last.

    Nothing crosses channels, so that judging a few is exact. Where rounding may decide about ReLU, dy of
    those channels becomes 0.

    Raises:
        WrongResult: naming who, what and by how much.
    """
    case, k = data.case, 0
    values = case.elements // case.C
    x, dy, _, _, residual = data.tensors[k]
    saved: dict[tuple[str, int], Any] = {}
    channels = (0, case.C - 1) if values <= LARGE else (case.C - 1,)
    for one in contenders:
        one.turn = k - 1
        one.forward()
        p = one.p()
        for c in channels:
            weight, bias = (_host(t[c : c + 1]) for t in data.torch_parameters)
            y, saved[one.name, c] = reference.forward(
                _host(x[:, c : c + 1]), weight, bias, p=p, eps=EPS, activation="relu" if case.relu else None,
                residual=None if residual is None else _host(residual[:, c : c + 1]),
            )  # fmt: skip
            _hold(one, case, "y", one.y()[:, c : c + 1], y, max(1.0, np.abs(y).max()))
            if case.relu:
                unsure = np.abs(saved[one.name, c].z) < UNSURE
                dy[:, c : c + 1].masked_fill_(dy.new_tensor(unsure).bool(), 0)
    for one in contenders:
        one.turn = k - 1
        one.backward()
        for c in channels:
            truth = reference.backward(_host(dy[:, c : c + 1]), saved[one.name, c])
            for name, gradient in one.gradients().items():
                here = gradient[c : c + 1] if gradient.ndim == 1 else gradient[:, c : c + 1]
                scale = math.sqrt(values) if gradient.ndim == 1 else 1.0  # a sum of so many
                scale = max(scale, np.abs(truth[name]).max())
                _hold(one, case, f"the gradient of {name}", here, truth[name], scale)


def _hold(one: Contender, case: Case, what: str, found: Any, truth: np.ndarray, scale: float) -> None:
    error = np.abs(_host(found) - truth).max() / scale
    if not error <= TOLERANCE[case.dtype]:
        raise WrongResult(f"{one.name} on {case}: {what} is off by {error:.1e}")


def _host(array: Any) -> np.ndarray:
    """Return a tensor of PyTorch's, or an array of CuPy's, as float64 on the host."""
    if hasattr(array, "detach"):
        return array.detach().double().cpu().numpy()  # type: ignore[no-any-return]
    return np.asarray(array.get() if hasattr(array, "get") else array, np.float64)
