"""The contenders of a layer: ours, a copy of the same bytes, full BN in NumPy and PyTorch."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

import sbncore as sbn
from bench.cases import EPS, Buffers, Data, tensor
from bench.report import installed

RESULTS = ("y", "x", "weight", "bias", "residual")


class Contender:
    """A layer over the sets of buffers, the next of them in every call; "both" goes back to forward's.

    A call returns what must stay alive where it was captured in a CUDA graph.

    Args:
        data: What it computes on.
        repeated: Whether a phase is called many times in a row, not forward and backward in turn.
    """

    name = ""
    needs = "numpy"  # a package
    ours = False

    def __init__(self, data: Data, repeated: bool = False) -> None:
        self.data, self.repeated, self.turn = data, repeated, -1
        self.y: list[Any] = [None] * len(data.sets)
        self.saved: list[Any] = [None] * len(data.sets)

    def run(self, k: int) -> tuple[Any, Any]:
        """Return y of the k-th buffers, and what its backward needs."""
        raise NotImplementedError

    def differentiate(self, k: int) -> Sequence[Any]:
        """Return the gradients of x, weight, bias and residual, None where there is none."""
        raise NotImplementedError

    def forward(self) -> Any:
        k = self.turn = (self.turn + 1) % len(self.data.sets)
        self.y[k], self.saved[k] = self.run(k)
        return self.saved[k]

    def backward(self) -> Any:
        k = self.turn = (self.turn + 1) % len(self.data.sets)
        self.grads = self.differentiate(k)
        return self.saved[k], self.grads

    def both(self) -> Any:
        kept = self.forward()
        self.turn -= 1
        return kept, self.backward()

    @property
    def phases(self) -> dict[str, Callable[[], Any]]:
        return {"forward": self.forward, "backward": self.backward}

    def weights(self) -> np.ndarray:
        """Return p of the last forward, (N, *spatial)."""
        N, C, *spatial = self.data.case.shape
        return np.full((N, *spatial), C / self.data.case.elements)

    def results(self) -> dict[str, Any]:
        """Return y and the gradients by name, of the current buffers."""
        found = zip(RESULTS, (self.y[self.turn], *self.grads), strict=False)
        return {name: value for name, value in found if value is not None}


class Ours(Contender):
    """sbncore with reused outputs; unless repeated, a forward draws its plan, as a training step does."""

    ours = True

    def __init__(self, data: Data, sampler: sbn.Sampler, name: str, repeated: bool = False) -> None:
        super().__init__(data, repeated)
        self.sampler, self.name, self.step = sampler, name, 0
        self.activation = "relu" if data.case.relu else None
        self.fixed = sampler.plan(data.case.shape, step=1) if repeated else None
        self.parameters = data.weight, data.bias
        if not isinstance(data.weight, np.ndarray):
            import sbncore.adapters.torch  # noqa: F401  (which lets the functions know tensors)

    def plan(self) -> sbn.Plan:
        """Draw and spell out the places of the next step; forward pays for this again."""
        plan = self.sampler.plan(self.data.case.shape, step=self.step + 1)
        _ = plan.runs
        return plan

    @property
    def phases(self) -> dict[str, Callable[[], Any]]:
        return super().phases if self.repeated else {"plan": self.plan, **super().phases}

    def run(self, k: int) -> tuple[Any, Any]:
        self.step += 1
        plan = self.fixed or self.sampler.plan(self.data.case.shape, step=self.step)
        x, _, y, _, residual = self.data.sets[k]
        _, saved = sbn.forward(
            x, *self.parameters, plan=plan, eps=EPS, activation=self.activation, residual=residual, out=y
        )
        return self.data.sets[k].y, saved

    def differentiate(self, k: int) -> Sequence[Any]:
        return sbn.backward(self.data.sets[k].dy, self.saved[k], out=self.data.sets[k].dx)

    def weights(self) -> np.ndarray:
        return self.saved[self.turn].plan.weights()

    def results(self) -> dict[str, Any]:
        return super().results() | {"x": self.data.sets[self.turn].dx}


class Inference(Contender):
    """Normalization by given statistics: the batch's own, so that the reference can check y."""

    def __init__(self, data: Data, eager: bool = False) -> None:
        super().__init__(data)
        self.name, self.ours = "PyTorch's inference" if eager else "sbn.batch_norm, inference", not eager
        axes, x = (0, *range(2, len(data.case.shape))), data.sets[0].x
        exact = (moment(axes, dtype=np.float64) for moment in (x.mean, x.var))
        self.inputs = [x, *(each.astype(data.weight.dtype) for each in exact), data.weight, data.bias]
        if eager:
            self.inputs = [tensor(array) for array in self.inputs]

    def run(self, k: int) -> tuple[Any, Any]:
        x, mean, var, weight, bias = self.inputs
        if self.ours:
            y = self.data.sets[k].y
            return sbn.batch_norm(x, mean, var, weight, bias, training=False, eps=EPS, out=y)
        import torch

        with torch.inference_mode():
            return torch.nn.functional.batch_norm(x, mean, var, weight, bias, eps=EPS), None

    def differentiate(self, k: int) -> Sequence[Any]:
        return ()


def copier(data: Data) -> Callable[[], object]:
    """Return a copy of x into y, of the next buffers in each call, on as many threads as ours.

    It is PyTorch's ``copy_``, or without it NumPy's.
    """
    if installed("torch"):
        pairs = itertools.cycle([(tensor(buffers.y), tensor(buffers.x)) for buffers in data.sets])

        def copy() -> None:
            y, x = next(pairs)
            y.copy_(x)

        return copy
    threads, (x, _, y, *_) = sbn.get_num_threads(), data.sets[0]
    pieces = [np.array_split(np.ravel(data.memory(array)), threads) for array in (y, x)]
    pool = ThreadPoolExecutor(threads)
    return lambda: list(pool.map(np.copyto, *pieces))


class NumPy(Contender):
    """Full BN as a careful NumPy user writes it: whole-array operations into reused buffers, xhat kept.

    NumPy runs them on one thread. float16 and bfloat16 are computed in float32.
    """

    name = "NumPy"

    def __init__(self, data: Data, repeated: bool = False) -> None:
        super().__init__(data, repeated)
        self.wide = data.weight.dtype
        first = data.case.layout == "first"
        self.axes: tuple[int, ...] = (0, 2) if first else (0,)
        along = (1, -1, 1) if first else (1, -1)
        self.weight, self.bias = (array.reshape(along) for array in (data.weight, data.bias))
        self.arrays = Buffers(*(array if array is None else data.memory(array) for array in data.sets[0]))
        outputs = self.arrays.y, self.arrays.dx
        self.z, self.dx = (a if a.dtype == self.wide else np.empty_like(a, self.wide) for a in outputs)
        self.xhat, self.g = (np.empty_like(self.z) for _ in range(2))

    def run(self, k: int) -> tuple[Any, Any]:
        z, xhat, x = self.z, self.xhat, self.arrays.x.astype(self.wide, copy=False)
        np.subtract(x, x.mean(self.axes, keepdims=True), out=xhat)
        rstd = 1 / np.sqrt(np.square(xhat, out=z).mean(self.axes, keepdims=True) + EPS)
        xhat *= rstd
        np.multiply(xhat, self.weight, out=z)
        z += self.bias
        if self.arrays.residual is not None:
            z += self.arrays.residual.astype(self.wide, copy=False)
        if self.data.case.relu:
            np.maximum(z, 0, out=z)
        if z is not self.arrays.y:
            self.arrays.y[...] = z
        return self.data.sets[0].y, rstd

    def differentiate(self, k: int) -> Sequence[Any]:
        g, dx, xhat, rstd = self.arrays.dy.astype(self.wide, copy=False), self.dx, self.xhat, self.saved[k]
        if self.data.case.relu:
            g = np.multiply(g, self.z > 0, out=self.g)
        M = g.size // self.weight.size
        dbias = g.sum(self.axes, keepdims=True)
        dweight = np.multiply(g, xhat, out=dx).sum(self.axes, keepdims=True)
        np.multiply(xhat, dweight / -M, out=dx)
        dx += g
        dx -= dbias / M
        dx *= self.weight * rstd
        if dx is not self.arrays.dx:
            self.arrays.dx[...] = dx
        return self.data.sets[0].dx, dweight.ravel(), dbias.ravel()


class Torch(Contender):
    """PyTorch eager: F.batch_norm, in-place add and ReLU as torchvision's blocks have them, autograd."""

    name, needs = "PyTorch", "torch"

    def __init__(self, data: Data, repeated: bool = False) -> None:
        super().__init__(data, repeated)
        parameters = [tensor(data.weight), tensor(data.bias)]
        self.inputs = [
            [t.detach().requires_grad_() for t in (_maps(x), *parameters, _maps(r)) if t is not None]
            for x, _, _, _, r in data.sets
        ]
        self.dy = [_maps(buffers.dy) for buffers in data.sets]
        self.layer: Any = self.normalized

    def normalized(self, x: Any, weight: Any, bias: Any, residual: Any = None) -> Any:
        import torch

        y = torch.nn.functional.batch_norm(x, None, None, weight, bias, training=True, eps=EPS)
        y = y if residual is None else y.add_(residual)
        return y.relu_() if self.data.case.relu else y

    def run(self, k: int) -> tuple[Any, Any]:
        return self.layer(*self.inputs[k]), None

    def differentiate(self, k: int) -> Sequence[Any]:
        import torch

        keep = self.repeated or None
        return torch.autograd.grad(self.y[k], self.inputs[k], self.dy[k], retain_graph=keep)  # type: ignore[no-any-return]

    def results(self) -> dict[str, Any]:
        shape = self.data.case.shape
        return {name: t.reshape(shape) if t.ndim > 1 else t for name, t in super().results().items()}


class Compiled(Torch):
    """PyTorch's compiler, inductor, on the same function; compiled when it is first called."""

    name = "torch.compile"

    def __init__(self, data: Data, repeated: bool = False) -> None:
        import torch

        super().__init__(data, repeated)
        torch._dynamo.reset()  # else the ninth case, and every one after it, would run eagerly
        self.layer = torch.compile(self.normalized, fullgraph=True, dynamic=False)


def _maps(array: Any) -> Any:
    """Return the tensor of an array, or of None; PyTorch's channels-last kernel wants two axes or three."""
    if array is None:
        return None
    found = tensor(array)
    return found.unsqueeze(2) if found.ndim == 3 else found
