"""The contenders of a layer: ours, a copy of the same bytes, and full BN in NumPy, PyTorch and JAX."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

import sbncore as sbn
from bench.cases import EPS, Data


class Ours:
    """sbncore with reused outputs; every forward draws its plan anew, as a training step does."""

    def __init__(self, data: Data, sampler: sbn.Sampler, name: str) -> None:
        self.data, self.sampler, self.name, self.step = data, sampler, name, 0
        self.activation = "relu" if data.case.relu else None

    def plan(self) -> sbn.Plan:
        """Draw and spell out the places of the next step; forward pays for this again."""
        plan = self.sampler.plan(self.data.case.shape, step=self.step + 1)
        _ = plan.runs
        return plan

    def forward(self) -> None:
        data = self.data
        self.step += 1
        self.y, self.saved = sbn.forward(
            data.x, data.weight, data.bias, plan=self.sampler.plan(data.case.shape, step=self.step), eps=EPS,
            activation=self.activation, residual=data.residual, out=data.y,
        )  # fmt: skip

    def backward(self) -> None:
        self.grads = sbn.backward(self.data.dy, self.saved, out=self.data.dx)

    def weights(self) -> np.ndarray:
        return self.saved.plan.weights()

    def results(self) -> dict[str, Any]:
        gradients = self.grads._asdict()
        return {"y": self.y} | {name: value for name, value in gradients.items() if value is not None}


class Copy:
    """A copy into a reused buffer on as many threads as ours: PyTorch's ``copy_``, or without it NumPy's."""

    def __init__(self, data: Data, threads: int) -> None:
        source, target = (np.ravel(data.memory(array)) for array in (data.x, data.y))
        self.pool: ThreadPoolExecutor | None = None
        if torch_version() is not None:
            import torch

            torch.set_num_threads(threads)
            wholes = source.view(f"i{source.itemsize}"), target.view(f"i{target.itemsize}")
            x, out = (torch.from_numpy(whole) for whole in wholes)
            self.copy: Callable[[], object] = lambda: out.copy_(x)
            return
        edges = [source.size * t // threads for t in range(threads + 1)]
        slices = [slice(edges[t], edges[t + 1]) for t in range(threads)]
        self.pieces = [(target[piece], source[piece]) for piece in slices]
        self.pool = ThreadPoolExecutor(threads)
        self.copy = self._copy

    def _copy(self) -> None:
        assert self.pool is not None
        others = [self.pool.submit(np.copyto, *piece) for piece in self.pieces[1:]]
        np.copyto(*self.pieces[0])
        for other in others:
            other.result()

    def close(self) -> None:
        if self.pool is not None:
            self.pool.shutdown()


class NumPy:
    """Full BN as a careful NumPy user writes it: whole-array operations into reused buffers, xhat kept.

    NumPy runs them on one thread. float16 and bfloat16 are computed in float32.
    """

    name = "NumPy"

    def __init__(self, data: Data, threads: int = 1) -> None:
        self.data = data
        self.x, self.dy, self.y, self.dx = map(data.memory, (data.x, data.dy, data.y, data.dx))
        self.residual = None if data.residual is None else data.memory(data.residual)
        first = data.case.layout == "first"
        self.axes = (0, 2) if first else (0,)
        self.along = (1, -1, 1) if first else (1, -1)
        self.weight, self.bias = (a.reshape(self.along) for a in (data.weight, data.bias))
        compute = data.weight.dtype
        self.converts = data.dtype != compute
        self.xhat, self.z, self.g = (np.empty_like(self.x, compute) for _ in range(3))
        self.wide = [np.empty_like(self.x, compute) for _ in range(2 * self.converts)]

    def forward(self) -> None:
        x, z, xhat = self._widen(self.x, 0), self.z if self.converts else self.y, self.xhat
        np.subtract(x, x.mean(self.axes, keepdims=True), out=xhat)
        var = np.square(xhat, out=z).mean(self.axes, keepdims=True)
        self.rstd = 1 / np.sqrt(var + EPS)
        xhat *= self.rstd
        np.multiply(xhat, self.weight, out=z)
        z += self.bias
        if self.residual is not None:
            z += self._widen(self.residual, 0)
        if self.data.case.relu:
            np.maximum(z, 0, out=z)
        if self.converts:
            np.copyto(self.y, z, casting="unsafe")

    def backward(self) -> None:
        g, xhat = self._widen(self.dy, 1), self.xhat
        if self.data.case.relu:
            g = np.multiply(g, (self.z if self.converts else self.y) > 0, out=self.g)
        self.dresidual = g
        dx = self.wide[0] if self.converts else self.dx
        M = g.size // self.weight.size
        self.dbias = g.sum(self.axes, keepdims=True)
        self.dweight = np.multiply(g, xhat, out=dx).sum(self.axes, keepdims=True)
        np.multiply(xhat, self.dweight / -M, out=dx)
        dx += g
        dx -= self.dbias / M
        dx *= self.weight * self.rstd
        if self.converts:
            np.copyto(self.dx, dx, casting="unsafe")

    def weights(self) -> np.ndarray:
        return _full(self.data)

    def results(self) -> dict[str, Any]:
        return {
            "y": self.data.y, "x": self.data.dx, "weight": self.dweight.ravel(), "bias": self.dbias.ravel(),
        }  # fmt: skip

    def _widen(self, array: np.ndarray, buffer: int) -> np.ndarray:
        if not self.converts:
            return array
        np.copyto(self.wide[buffer], array)
        return self.wide[buffer]


class Torch:
    """PyTorch eager: F.batch_norm, in-place add and ReLU as torchvision's blocks have them, autograd."""

    name = "PyTorch"

    def __init__(self, data: Data, threads: int) -> None:
        import torch

        torch.set_num_threads(threads)
        self.torch, self.data = torch, data
        given = (self._tensor(data.x), torch.from_numpy(data.weight), torch.from_numpy(data.bias))
        residual = () if data.residual is None else (self._tensor(data.residual),)
        self.inputs = tuple(tensor.requires_grad_() for tensor in (*given, *residual))
        self.dy = self._tensor(data.dy)

    def _tensor(self, array: np.ndarray) -> Any:
        if array.dtype.name == "bfloat16":
            tensor = self.torch.from_numpy(array.view(np.int16)).view(self.torch.bfloat16)
        else:
            tensor = self.torch.from_numpy(array)
        # Its channels-last kernel wants two spatial axes or three.
        return tensor.unsqueeze(2) if tensor.ndim == 3 else tensor

    def normalized(self, x: Any, weight: Any, bias: Any, *residual: Any) -> Any:
        y = self.torch.nn.functional.batch_norm(x, None, None, weight, bias, training=True, eps=EPS)
        if residual:
            y = y.add_(residual[0])
        return y.relu_() if self.data.case.relu else y

    def forward(self) -> None:
        self.y = self.normalized(*self.inputs)

    def backward(self) -> None:
        self.grads = self.torch.autograd.grad(self.y, self.inputs, self.dy)

    def weights(self) -> np.ndarray:
        return _full(self.data)

    def results(self) -> dict[str, Any]:
        shape = self.data.case.shape
        names = ("x", "weight", "bias", "residual")
        tensors = {"y": self.y.detach()} | dict(zip(names, self.grads, strict=False))
        wide = {name: tensor.to(self.torch.float64).numpy() for name, tensor in tensors.items()}
        return {name: a.reshape(shape) if a.ndim > 1 else a for name, a in wide.items()}


class Compiled(Torch):
    """PyTorch's compiler, inductor, on the same function; compiled when it is first called."""

    name = "torch.compile"

    def __init__(self, data: Data, threads: int) -> None:
        super().__init__(data, threads)
        self.torch._dynamo.reset()
        self.compiled = self.torch.compile(super().normalized, fullgraph=True, dynamic=False)

    def forward(self) -> None:
        self.y = self.compiled(*self.inputs)


class Jax:
    """JAX: the formulas jitted, and the backward by its own derivative; on all cores, whatever --threads."""

    name = "JAX"

    def __init__(self, data: Data, threads: int) -> None:
        import jax
        import jax.numpy as jnp

        self.jax, self.data = jax, data
        axes, along = ((0, 2), (1, -1, 1)) if data.case.layout == "first" else ((0,), (1, -1))
        dense = (data.memory(array) for array in (data.x, data.dy))
        residual = () if data.residual is None else (data.memory(data.residual),)
        x, self.dy = map(jnp.asarray, dense)
        self.inputs = (x, jnp.asarray(data.weight), jnp.asarray(data.bias), *map(jnp.asarray, residual))

        def normalized(x: Any, weight: Any, bias: Any, *residual: Any) -> Any:
            wide = x.astype(weight.dtype)
            mean = wide.mean(axes, keepdims=True)
            var = jnp.square(wide - mean).mean(axes, keepdims=True)
            scale = weight.reshape(along) * jax.lax.rsqrt(var + EPS)
            z = ((wide - mean) * scale + bias.reshape(along)).astype(x.dtype)
            z = z + residual[0] if residual else z
            return jnp.maximum(z, 0) if data.case.relu else z

        self.call = jax.jit(normalized)
        self.differentiate = jax.jit(lambda inputs, dy: jax.vjp(normalized, *inputs)[1](dy))

    def forward(self) -> None:
        self.y = self.call(*self.inputs).block_until_ready()

    def backward(self) -> None:
        """Recomputes what its forward does not keep: a vjp's two halves cannot be jitted apart."""
        self.grads = self.jax.block_until_ready(self.differentiate(self.inputs, self.dy))

    def weights(self) -> np.ndarray:
        return _full(self.data)

    def results(self) -> dict[str, Any]:
        names = ("x", "weight", "bias", "residual")
        return {"y": self._array(self.y)} | {
            name: self._array(grad) for name, grad in zip(names, self.grads, strict=False)
        }

    def _array(self, result: Any) -> np.ndarray:
        array = np.asarray(result)
        if array.ndim == 1:
            return array
        N, C, *spatial = self.data.case.shape
        if self.data.case.layout == "first":
            return array.reshape(self.data.case.shape)
        return np.moveaxis(array.reshape(N, *spatial, C), -1, 1)


PEERS: dict[str, Any] = {"numpy": NumPy, "torch": Torch, "compile": Compiled, "jax": Jax}
NEEDS = {"torch": "torch", "compile": "torch", "jax": "jax"}


def torch_version() -> str | None:
    """Return PyTorch's version, or None where it is not installed."""
    try:
        import torch
    except ImportError:
        return None
    return torch.__version__


def _full(data: Data) -> np.ndarray:
    N, _, *spatial = data.case.shape
    return np.full((N, *spatial), 1 / (N * np.prod(spatial)))
