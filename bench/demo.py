"""The demonstration: sampled normalization trains a network on real images, beside full normalization.

scikit-learn's digits (1,797 scans of 8x8) and a small network in NumPy; every sampler from the same initial
weights over the same batches. ``python -m bench.demo``, or ``make demo``.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits
from tqdm import tqdm

import sbncore as sbn
from bench import report
from bench.machine import machine
from bench.options import integer, parser
from sbncore.adapters.numpy import SampledBatchNorm

BATCH, VIRTUAL, TEST = 64, 8, 500
RATE, MOMENTUM, DECAY = 0.05, 0.9, 5e-4
FS, BS, VDN = sbn.FeatureSampling(1 / 8), sbn.BatchSampling(1 / 8), sbn.VirtualSamples(VIRTUAL)
SAMPLERS: dict[str, sbn.Sampler] = {
    "full BN": sbn.Full(),
    "BS": BS,
    "FS": FS,
    "VDN": VDN,
    "BS + VDN": sbn.Mixture([(0.5, BS), (0.5, VDN)]),
    "FS + VDN": sbn.Mixture([(0.5, FS), (0.5, VDN)]),
}


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


@dataclass
class Run:
    """What one training showed."""

    name: str
    steps: list[int] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)
    accuracy: list[float] = field(default_factory=list)
    seconds: float = 0.0
    seconds_in_norm: float = 0.0
    share: float = 1.0


def digits(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return images (N, 8, 8, 1) and labels to train on and to test with."""
    from sklearn.datasets import load_digits

    data = load_digits()
    x = data.images.astype(np.float32)[..., None]
    x = (x - x.mean()) / x.std()
    order = np.random.default_rng([seed, 1]).permutation(len(x))
    train, test = order[TEST:], order[:TEST]
    return x[train], data.target[train], x[test], data.target[test]


def virtual_samples(x: np.ndarray, count: int, seed: int, step: int) -> np.ndarray:
    """Return white noise of the data's mean 0 and deviation 1, a pure function of (seed, step)."""
    return np.random.default_rng([seed, 2, step]).normal(size=(count, *x.shape[1:])).astype(x.dtype)


def accuracy(network: Network, x: np.ndarray, labels: np.ndarray) -> float:
    """Return the share of right answers, by the running statistics."""
    network.train(False)
    right = float((network.forward(x).argmax(1) == labels).mean())
    network.train(True)
    return right


def train(name: str, sampler: sbn.Sampler, epochs: int, seed: int) -> Run:
    """Train a network with this sampler; the clock runs for the training steps alone."""
    x, labels, x_test, labels_test = digits(seed)
    network, run = Network(sampler, seed), Run(name)
    velocity = [np.zeros_like(getattr(layer, each)) for layer, each in network.parameters()]
    batches = len(x) // BATCH
    for epoch in tqdm(range(epochs), desc=name, unit="epoch"):
        order = np.random.default_rng([seed, 3, epoch]).permutation(len(x))
        losses = []
        rate = RATE * 0.5 * (1 + np.cos(np.pi * epoch / epochs))
        for k in range(batches):
            chosen, step = order[k * BATCH : (k + 1) * BATCH], epoch * batches + k
            network.seconds_in_norm = 0.0
            start = time.perf_counter()
            batch = np.concatenate([x[chosen], virtual_samples(x, sampler.virtual, seed, step)])
            logits = network.forward(batch)
            loss, dlogits = cross_entropy(logits[:BATCH], labels[chosen])
            # virtual samples never reach the loss; through the statistics they still move the gradient
            network.backward(np.concatenate([dlogits, np.zeros_like(logits[BATCH:])]))
            for (layer, each), v in zip(network.parameters(), velocity, strict=True):
                value = getattr(layer, each)
                v *= MOMENTUM
                v -= rate * (getattr(layer, "d" + each) + DECAY * value)
                value += v
            run.seconds += time.perf_counter() - start
            run.seconds_in_norm += network.seconds_in_norm
            losses.append(loss)
        run.share = network.share_of_data()
        run.steps.append((epoch + 1) * batches)
        run.loss.append(float(np.mean(losses)))
        run.accuracy.append(accuracy(network, x_test, labels_test))
    return run


def table(runs: list[Run]) -> list[str]:
    """Return the runs as a Markdown table."""
    titles = ["sampler", "test accuracy", "time in normalization", "of the step", "share of the data used"]
    lines = []
    for run in runs:
        part = run.seconds_in_norm / run.seconds
        cells = [f"{run.accuracy[-1]:.1%}", f"{run.seconds_in_norm:.2f} s", f"{part:.0%}", f"{run.share:.1%}"]
        lines.append([run.name, *cells])
    return report.markdown(titles, lines)


def draw(figure: Any, runs: list[Run]) -> None:
    """Draw the learning curves."""
    figure.set_size_inches(11, 4.2)
    left, right = figure.subplots(1, 2)
    for run in runs:
        style = {"linewidth": 2.4, "color": "black"} if run.name == "full BN" else {"linewidth": 1.3}
        left.plot(run.steps, [100 * (1 - a) for a in run.accuracy], label=run.name, **style)
        right.plot(run.steps, run.loss, label=run.name, **style)
    left.set(ylabel="test error (%)", title="Error on 500 test digits", yscale="log")
    right.set(ylabel="training loss", title="Cross-entropy on the training batches", yscale="log")
    ticks = (1, 2, 5, 10, 20, 50)
    left.set_yticks(ticks, [str(tick) for tick in ticks])
    left.minorticks_off()
    for axes in (left, right):
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
    right.legend(frameon=False)
    figure.suptitle("scikit-learn's digits, one network, six ways to its statistics")


def main(arguments: list[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    one = parser("demo", __doc__, "two epochs", Path("out"))
    one.add_argument("--epochs", type=integer, default=20)
    one.add_argument("--seed", type=int, default=0)
    options = one.parse_args(arguments)
    epochs, seed, out = 2 if options.quick else options.epochs, options.seed, options.out
    seconds = 3 * epochs  # on two cores of an AMD EPYC
    print(
        f"trains {len(SAMPLERS)} networks for {epochs} epochs, about {seconds} s, and the first time "
        "compiles kernels for some seconds more",
        flush=True,
    )
    # BLAS threads wait for one another in a loop: beside another program two took twice as long as one
    with threadpool_limits(1, user_api="blas"):
        for name, sampler in SAMPLERS.items():
            train(name, sampler, 1, seed)
        runs = [train(name, sampler, epochs, seed) for name, sampler in SAMPLERS.items()]
    where = machine()
    about = report.about(where, "demo", arguments, f"{epochs} epochs of batches of {BATCH}, seed {seed}.")
    report.publish(
        out,
        "demo",
        "Sampled beside full normalization",
        [about, "", *table(runs)],
        where,
        draw=lambda figure: draw(figure, runs),
    )
    drawn = f"learning curves: {(out / 'demo.png').resolve()}"
    print("\n" + (drawn if report.installed("matplotlib") else "no matplotlib, so no learning curves"))


if __name__ == "__main__":
    main()
