"""A small convolutional network in plain NumPy, channels-last, normalized by sbncore."""

from __future__ import annotations

import time
from typing import Any

import numpy as np

import sbncore as sbn
from sbncore.adapters.numpy import SampledBatchNorm


class Conv:
    """3x3 convolution with zero padding, as one matrix product over the patches."""

    def __init__(self, inputs: int, outputs: int, rng: np.random.Generator, dtype: Any) -> None:
        deviation = np.sqrt(2 / (9 * inputs))
        self.weight = (rng.normal(size=(9 * inputs, outputs)) * deviation).astype(dtype)
        self.dweight = np.zeros_like(self.weight)

    def forward(self, x: np.ndarray) -> np.ndarray:
        N, H, W, C = self.shape = x.shape
        padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
        shifts = [padded[:, i : i + H, j : j + W] for i in range(3) for j in range(3)]
        self.patches = np.concatenate(shifts, axis=-1).reshape(-1, 9 * C)
        return (self.patches @ self.weight).reshape(N, H, W, -1)

    def backward(self, dy: np.ndarray) -> np.ndarray:
        N, H, W, C = self.shape
        dy = dy.reshape(N * H * W, -1)
        self.dweight = self.patches.T @ dy
        dpatches = (dy @ self.weight.T).reshape(N, H, W, 9, C)
        padded = np.zeros((N, H + 2, W + 2, C), dy.dtype)
        for k in range(9):
            i, j = divmod(k, 3)
            padded[:, i : i + H, j : j + W] += dpatches[..., k, :]
        return padded[:, 1:-1, 1:-1]


class Pool:
    """Mean over 2x2 squares."""

    def forward(self, x: np.ndarray) -> np.ndarray:
        N, H, W, C = x.shape
        return x.reshape(N, H // 2, 2, W // 2, 2, C).mean((2, 4))

    def backward(self, dy: np.ndarray) -> np.ndarray:
        return np.repeat(np.repeat(dy / 4, 2, axis=1), 2, axis=2)


class Head:
    """Mean over the map, then a linear layer."""

    def __init__(self, inputs: int, outputs: int, rng: np.random.Generator, dtype: Any) -> None:
        self.weight = (rng.normal(size=(inputs, outputs)) / np.sqrt(inputs)).astype(dtype)
        self.bias = np.zeros(outputs, dtype)

    def forward(self, x: np.ndarray) -> np.ndarray:
        self.shape, self.features = x.shape, x.mean((1, 2))
        return self.features @ self.weight + self.bias

    def backward(self, dy: np.ndarray) -> np.ndarray:
        N, H, W, C = self.shape
        self.dweight, self.dbias = self.features.T @ dy, dy.sum(0)
        dx = (dy @ self.weight.T / (H * W)).astype(dy.dtype)
        return np.broadcast_to(dx[:, None, None], (N, H, W, C))


class Network:
    """Three times convolution, normalization, ReLU; pooled to half the size after the second."""

    def __init__(
        self,
        sampler: sbn.Sampler,
        seed: int,
        channels: tuple[int, int, int] = (16, 32, 64),
        dtype: Any = np.float32,
    ) -> None:
        rng = np.random.default_rng([seed, 0])
        a, b, c = channels
        self.norms = [
            SampledBatchNorm(
                width, dtype=dtype, sampler=sampler, activation="relu", channel_axis=-1, seed=seed, layer=k
            )
            for k, width in enumerate(channels)
        ]
        conv = [Conv(i, o, rng, dtype) for i, o in ((1, a), (a, b), (b, c))]
        norm = self.norms
        self.layers = [conv[0], norm[0], conv[1], norm[1], Pool(), conv[2], norm[2], Head(c, 10, rng, dtype)]
        self.seconds_in_norm = 0.0

    def forward(self, x: np.ndarray) -> np.ndarray:
        return self._through(x, self.layers, "forward")

    def backward(self, dy: np.ndarray) -> np.ndarray:
        return self._through(dy, self.layers[::-1], "backward")

    def _through(self, array: np.ndarray, layers: list[Any], direction: str) -> np.ndarray:
        for layer in layers:
            start = time.perf_counter()
            array = getattr(layer, direction)(array)
            if isinstance(layer, SampledBatchNorm):
                self.seconds_in_norm += time.perf_counter() - start
        return array

    def train(self, mode: bool) -> None:
        for norm in self.norms:
            norm.train(mode)

    def parameters(self) -> list[tuple[Any, str]]:
        """Return (layer, name) of every array that is learned; its gradient is layer's ``d`` + name."""
        return [(layer, name) for layer in self.layers for name in ("weight", "bias") if hasattr(layer, name)]

    def share_of_data(self) -> float:
        """Return the share of all normalized values that the last statistics were drawn from."""
        drawn = total = 0
        for norm in self.norms:
            assert norm.saved is not None and norm.weight is not None
            plan, C = norm.saved.plan, norm.weight.size
            drawn += C * plan.count
            total += C * plan.N * plan.S
        return drawn / total


def cross_entropy(logits: np.ndarray, labels: np.ndarray) -> tuple[float, np.ndarray]:
    """Return the mean loss and its gradient."""
    shifted = logits - logits.max(1, keepdims=True)
    log_p = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
    rows = np.arange(len(labels))
    dlogits = np.exp(log_p)
    dlogits[rows, labels] -= 1
    return float(-log_p[rows, labels].mean()), dlogits / len(labels)
