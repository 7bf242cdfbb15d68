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
from bench.network import Network, cross_entropy
from bench.options import integer, parser

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
    print("compiling the kernels (the first time takes some seconds; kept out of the timings)", flush=True)
    # BLAS threads wait for one another in a loop: beside another program two took twice as long as one
    with threadpool_limits(1, user_api="blas"):
        for name, sampler in SAMPLERS.items():
            train(name, sampler, 1, seed)
        runs = [train(name, sampler, epochs, seed) for name, sampler in SAMPLERS.items()]
    where = machine()
    about = report.about(where, "demo", arguments, f"{epochs} epochs of batches of {BATCH}, seed {seed}.")
    report.publish(
        out, "demo", "Sampled beside full normalization", [about, "", *table(runs)], where,
        draw=lambda figure: draw(figure, runs),
    )  # fmt: skip
    drawn = f"learning curves: {(out / 'demo.png').resolve()}"
    print("\n" + (drawn if report.installed("matplotlib") else "no matplotlib, so no learning curves"))


if __name__ == "__main__":
    main()
