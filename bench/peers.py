"""What ours is timed against, by the names of `python -m bench layer --against`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

import sbncore as sbn
from bench.cases import EPS, Data
from bench.contenders import Compiled, Contender, NumPy, Torch


class Jax(Contender):
    """JAX: the formulas jitted, and the backward by its own derivative; on all cores, whatever --threads.

    The backward recomputes what its forward does not keep: a vjp's two halves cannot be jitted apart.
    """

    name, needs = "JAX", "jax"

    def __init__(self, data: Data, repeated: bool = False) -> None:
        import jax
        import jax.numpy as jnp

        super().__init__(data, repeated)
        N, C, *_ = data.case.shape
        first = data.case.layout == "first"
        axes, along, shape = ((0, 2), (1, -1, 1), (N, C, -1)) if first else ((0, 1), (-1,), (N, -1, C))
        maps = (None if each is None else data.memory(each).reshape(shape) for each in data.sets[0])
        x, dy, _, _, residual = maps
        self.inputs = [jnp.asarray(a) for a in (x, data.weight, data.bias, residual) if a is not None]
        self.dy: Any = dy
        self.new, self.wait = jnp.asarray, jax.block_until_ready

        def normalized(x: Any, weight: Any, bias: Any, residual: Any = None) -> Any:
            wide = x.astype(weight.dtype)
            mean = wide.mean(axes, keepdims=True)
            var = jnp.square(wide - mean).mean(axes, keepdims=True)
            scale = weight.reshape(along) * jax.lax.rsqrt(var + EPS)
            z = ((wide - mean) * scale + bias.reshape(along)).astype(x.dtype)
            z = z if residual is None else z + residual
            return jnp.maximum(z, 0) if data.case.relu else z

        function = self.function(normalized)
        self.layer = jax.jit(function)
        self.gradients = jax.jit(lambda inputs, dy: jax.vjp(function, *inputs)[1](dy))

    def function(self, normalized: Callable[..., Any]) -> Callable[..., Any]:
        """Return what is jitted."""
        return normalized

    def run(self, k: int) -> tuple[Any, Any]:
        return self.wait(self.layer(*self.inputs)), None

    def differentiate(self, k: int) -> Sequence[Any]:
        if isinstance(self.dy, np.ndarray):  # JAX copies it, and `verify` may have changed it until now
            self.dy = self.new(self.dy)
        return self.wait(self.gradients(self.inputs, self.dy))  # type: ignore[no-any-return]

    def results(self) -> dict[str, Any]:
        return {name: self.data.shaped(np.asarray(a)) for name, a in super().results().items()}


class JaxSampled(Jax):
    """`sbncore.adapters.jax`, jitted likewise, by the headline's sample: beside "JAX", its users' gain."""

    name = "JAX, sampled"
    sampler = sbn.FeatureSampling(1 / 16)

    def function(self, normalized: Callable[..., Any]) -> Callable[..., Any]:
        from sbncore.adapters.jax import batch_norm

        options: dict[str, Any] = {
            "activation": "relu" if self.data.case.relu else None,
            "sampler": self.sampler,
        }
        axis = 1 if self.data.case.layout == "first" else -1

        def sampled(x: Any, weight: Any, bias: Any, residual: Any = None) -> Any:
            more = options | {"channel_axis": axis, "residual": residual, "eps": EPS}
            return batch_norm(x, None, None, weight, bias, training=True, **more)[0]

        return sampled

    def weights(self) -> np.ndarray:
        return self.sampler.plan(self.data.case.shape).weights()


PEERS: dict[str, type[Contender]] = {
    "numpy": NumPy, "torch": Torch, "compile": Compiled, "jax": Jax, "jax-sampled": JaxSampled,
}  # fmt: skip
