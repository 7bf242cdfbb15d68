"""The contenders of a layer: ours, a copy of the same bytes, and full BN in NumPy, PyTorch and JAX."""

from __future__ import annotations

import importlib.util
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

import sbncore as sbn
from bench.cases import EPS, Buffers, Data, tensor

GRADIENTS = ("x", "weight", "bias", "residual")


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

    def next(self) -> int:
        self.turn = (self.turn + 1) % len(self.data.sets)
        return self.turn

    @property
    def current(self) -> Buffers:
        return self.data.sets[self.turn]

    def forward(self) -> Any:
        raise NotImplementedError

    def backward(self) -> Any:
        raise NotImplementedError

    def both(self) -> Any:
        kept = self.forward()
        self.turn -= 1
        return kept, self.backward()

    def weights(self) -> np.ndarray:
        """Return p of the last forward, (N, *spatial)."""
        N, C, *spatial = self.data.case.shape
        return np.full((N, *spatial), C / self.data.case.elements)

    def results(self) -> dict[str, Any]:
        """Return y and the gradients by name, of the current buffers."""
        raise NotImplementedError


class Ours(Contender):
    """sbncore with reused outputs; unless repeated, a forward draws its plan, as a training step does."""

    ours = True

    def __init__(self, data: Data, sampler: sbn.Sampler, name: str, repeated: bool = False) -> None:
        super().__init__(data, repeated)
        self.sampler, self.name, self.step = sampler, name, 0
        self.activation = "relu" if data.case.relu else None
        self.fixed = sampler.plan(data.case.shape, step=1) if repeated else None
        self.views = [Buffers(*map(_view, buffers)) for buffers in data.sets]
        self.parameters = [_view(data.weight), _view(data.bias)]
        self.saved: list[Any] = [None] * len(data.sets)

    def plan(self) -> sbn.Plan:
        """Draw and spell out the places of the next step; forward pays for this again."""
        plan = self.sampler.plan(self.data.case.shape, step=self.step + 1)
        _ = plan.runs
        return plan

    def forward(self) -> Any:
        k = self.next()
        self.step += 1
        plan = self.fixed or self.sampler.plan(self.data.case.shape, step=self.step)
        x, _, y, _, residual = self.views[k]
        _, self.saved[k] = sbn.forward(
            x, *self.parameters, plan=plan, eps=EPS, activation=self.activation, residual=residual, out=y
        )
        return self.saved[k]

    def backward(self) -> Any:
        k = self.next()
        self.grads = sbn.backward(self.views[k].dy, self.saved[k], out=self.views[k].dx)
        return self.saved[k], self.grads

    def weights(self) -> np.ndarray:
        return self.saved[self.turn].plan.weights()

    def results(self) -> dict[str, Any]:
        gradients = self.grads._asdict() | {"x": self.current.dx}
        return {"y": self.current.y} | {k: value for k, value in gradients.items() if value is not None}


class Inference(Contender):
    """Ours by given statistics: the batch's own, so that the reference can check y."""

    name, ours = "sbn.batch_norm, inference", True

    def __init__(self, data: Data) -> None:
        super().__init__(data)
        axes, x = (0, *range(2, len(data.case.shape))), data.sets[0].x
        exact = (moment(axes, dtype=np.float64) for moment in (x.mean, x.var))
        self.statistics = [each.astype(data.weight.dtype) for each in exact]

    def forward(self) -> None:
        self.next()
        x, y, (mean, var) = self.current.x, self.current.y, self.statistics
        sbn.batch_norm(x, mean, var, self.data.weight, self.data.bias, training=False, eps=EPS, out=y)

    def backward(self) -> None:
        self.turn = 0

    def results(self) -> dict[str, Any]:
        return {"y": self.current.y}


class TorchInference(Inference):
    """The same by PyTorch, into new memory."""

    name, needs, ours = "PyTorch's inference", "torch", False

    def __init__(self, data: Data) -> None:
        super().__init__(data)
        given = (data.sets[0].x, *self.statistics, data.weight, data.bias)
        self.tensors = [tensor(array) for array in given]

    def forward(self) -> None:
        import torch

        self.next()
        with torch.inference_mode():
            self.y = torch.nn.functional.batch_norm(*self.tensors, training=False, eps=EPS)

    def results(self) -> dict[str, Any]:
        return {"y": self.y}


class Copy:
    """A copy of x into y on as many threads as ours: PyTorch's ``copy_``, or without it NumPy's."""

    def __init__(self, data: Data) -> None:
        self.data, self.turn = data, -1
        self.pool: ThreadPoolExecutor | None = None
        if installed("torch"):
            self.pairs = [(tensor(buffers.y), tensor(buffers.x)) for buffers in data.sets]
            return
        threads = sbn.get_num_threads()
        halves = (np.ravel(data.memory(array)) for array in (data.sets[0].y, data.sets[0].x))
        self.pieces = list(zip(*(np.array_split(half, threads) for half in halves), strict=True))
        self.pool = ThreadPoolExecutor(threads)

    def copy(self) -> None:
        if self.pool is None:
            self.turn = (self.turn + 1) % len(self.pairs)
            target, source = self.pairs[self.turn]
            target.copy_(source)
            return
        others = [self.pool.submit(np.copyto, *piece) for piece in self.pieces[1:]]
        np.copyto(*self.pieces[0])
        for other in others:
            other.result()

    def close(self) -> None:
        if self.pool is not None:
            self.pool.shutdown()


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

    def forward(self) -> None:
        z, xhat, x = self.z, self.xhat, self.arrays.x.astype(self.wide, copy=False)
        np.subtract(x, x.mean(self.axes, keepdims=True), out=xhat)
        self.rstd = 1 / np.sqrt(np.square(xhat, out=z).mean(self.axes, keepdims=True) + EPS)
        xhat *= self.rstd
        np.multiply(xhat, self.weight, out=z)
        z += self.bias
        if self.arrays.residual is not None:
            z += self.arrays.residual.astype(self.wide, copy=False)
        if self.data.case.relu:
            np.maximum(z, 0, out=z)
        if z is not self.arrays.y:
            self.arrays.y[...] = z

    def backward(self) -> None:
        g, dx, xhat = self.arrays.dy.astype(self.wide, copy=False), self.dx, self.xhat
        if self.data.case.relu:
            g = np.multiply(g, self.z > 0, out=self.g)
        M = g.size // self.weight.size
        self.dbias = g.sum(self.axes, keepdims=True)
        self.dweight = np.multiply(g, xhat, out=dx).sum(self.axes, keepdims=True)
        np.multiply(xhat, self.dweight / -M, out=dx)
        dx += g
        dx -= self.dbias / M
        dx *= self.weight * self.rstd
        if dx is not self.arrays.dx:
            self.arrays.dx[...] = dx

    def results(self) -> dict[str, Any]:
        _, _, y, dx, _ = self.data.sets[0]
        return {"y": y, "x": dx, "weight": self.dweight.ravel(), "bias": self.dbias.ravel()}


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
        self.y: list[Any] = [None] * len(data.sets)
        self.layer: Any = self.normalized

    def normalized(self, x: Any, weight: Any, bias: Any, residual: Any = None) -> Any:
        import torch

        y = torch.nn.functional.batch_norm(x, None, None, weight, bias, training=True, eps=EPS)
        y = y if residual is None else y.add_(residual)
        return y.relu_() if self.data.case.relu else y

    def forward(self) -> None:
        k = self.next()
        self.y[k] = self.layer(*self.inputs[k])

    def backward(self) -> None:
        import torch

        k = self.next()
        self.grads = torch.autograd.grad(
            self.y[k], self.inputs[k], self.dy[k], retain_graph=self.repeated or None
        )

    def results(self) -> dict[str, Any]:
        found = {"y": self.y[self.turn]} | dict(zip(GRADIENTS, self.grads, strict=False))
        shape = self.data.case.shape
        return {name: t.detach().reshape(shape) if t.ndim > 1 else t for name, t in found.items()}


class Compiled(Torch):
    """PyTorch's compiler, inductor, on the same function; compiled when it is first called."""

    name = "torch.compile"

    def __init__(self, data: Data, repeated: bool = False) -> None:
        import torch

        super().__init__(data, repeated)
        torch._dynamo.reset()  # else the ninth case, and every one after it, would run eagerly
        self.layer = torch.compile(self.normalized, fullgraph=True, dynamic=False)


class Jax(Contender):
    """JAX: the formulas jitted, and the backward by its own derivative; on all cores, whatever --threads."""

    name, needs = "JAX", "jax"

    def __init__(self, data: Data, repeated: bool = False) -> None:
        import jax
        import jax.numpy as jnp

        super().__init__(data, repeated)
        axes, along = ((0, 2), (1, -1, 1)) if data.case.layout == "first" else ((0,), (1, -1))
        x, dy, _, _, residual = data.sets[0]
        given = [data.memory(x), data.weight, data.bias]
        given += [] if residual is None else [data.memory(residual)]
        self.inputs, self.dy = [jnp.asarray(array) for array in given], jnp.asarray(data.memory(dy))
        self.wait = jax.block_until_ready

        def normalized(x: Any, weight: Any, bias: Any, residual: Any = None) -> Any:
            wide = x.astype(weight.dtype)
            mean = wide.mean(axes, keepdims=True)
            var = jnp.square(wide - mean).mean(axes, keepdims=True)
            scale = weight.reshape(along) * jax.lax.rsqrt(var + EPS)
            z = ((wide - mean) * scale + bias.reshape(along)).astype(x.dtype)
            z = z if residual is None else z + residual
            return jnp.maximum(z, 0) if data.case.relu else z

        self.call = jax.jit(normalized)
        self.differentiate = jax.jit(lambda inputs, dy: jax.vjp(normalized, *inputs)[1](dy))

    def forward(self) -> None:
        self.y = self.wait(self.call(*self.inputs))

    def backward(self) -> None:
        """Recomputes what its forward does not keep: a vjp's two halves cannot be jitted apart."""
        self.grads = self.wait(self.differentiate(self.inputs, self.dy))

    def results(self) -> dict[str, Any]:
        found = {"y": self.y} | dict(zip(GRADIENTS, self.grads, strict=False))
        return {name: self._shaped(np.asarray(array)) for name, array in found.items()}

    def _shaped(self, array: np.ndarray) -> np.ndarray:
        N, C, *spatial = self.data.case.shape
        if array.ndim == 1 or self.data.case.layout == "first":
            return array if array.ndim == 1 else array.reshape(self.data.case.shape)
        return np.moveaxis(array.reshape(N, *spatial, C), -1, 1)


PEERS: dict[str, type[Contender]] = {"numpy": NumPy, "torch": Torch, "compile": Compiled, "jax": Jax}


def installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def _view(array: Any) -> Any:
    """Return an array as ours takes it: CuPy's view of a tensor on a GPU, but of bfloat16, which it lacks."""
    if array is None or isinstance(array, np.ndarray) or "bfloat16" in str(array.dtype):
        return array
    import cupy

    return cupy.from_dlpack(array)


def _maps(array: Any) -> Any:
    """Return the tensor of an array, or of None; PyTorch's channels-last kernel wants two axes or three."""
    if array is None:
        return None
    found = tensor(array)
    return found.unsqueeze(2) if found.ndim == 3 else found
