"""Flax NNX: a small network on scikit-learn's digits, by nnx.BatchNorm and converted.

Training code stays as it is: the converted layers are nnx.BatchNorms that normalize by a sample.
Run it: python examples/flax_digits.py
"""

import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from sklearn.datasets import load_digits

import sbncore as sbn
from sbncore.adapters.flax import convert_sampled_batchnorm

TRAINED, BATCH, EPOCHS, SEEDS = 1408, 64, 6, 3


class Block(nnx.Module):
    def __init__(self, inputs, outputs, rngs):
        self.conv = nnx.Conv(inputs, outputs, (3, 3), use_bias=False, rngs=rngs)
        self.bn = nnx.BatchNorm(outputs, momentum=0.9, rngs=rngs)

    def __call__(self, x):
        return nnx.relu(self.bn(self.conv(x)))


class Network(nnx.Module):
    def __init__(self, rngs):
        self.blocks = nnx.List([Block(1, 16, rngs), Block(16, 32, rngs)])
        self.head = nnx.Linear(2 * 2 * 32, 10, rngs=rngs)

    def __call__(self, x):
        for block in self.blocks:
            x = nnx.max_pool(block(x), (2, 2), (2, 2))
        return self.head(x.reshape(len(x), -1))


@nnx.jit
def train_step(model, optimizer, x, labels):
    def loss(model):
        return optax.softmax_cross_entropy_with_integer_labels(model(x), labels).mean()

    optimizer.update(model, nnx.grad(loss)(model))


def accuracy(model, images, labels, seed):
    """Train, and return the share of right answers on what was held back."""
    optimizer = nnx.Optimizer(model, optax.sgd(0.05, 0.9), wrt=nnx.Param)
    random = np.random.default_rng(seed)
    for _ in range(EPOCHS):
        for chosen in random.permutation(TRAINED).reshape(-1, BATCH):
            train_step(model, optimizer, images[chosen], labels[chosen])
    model.eval()
    return float((model(images[TRAINED:]).argmax(1) == labels[TRAINED:]).mean())


digits = load_digits()
images, labels = jnp.asarray(digits.images[..., None] / 16, "float32"), jnp.asarray(digits.target)
for name in ("nnx.BatchNorm", "sampled, 1/4"):
    found = []
    for seed in range(SEEDS):
        model = Network(nnx.Rngs(seed))
        if name != "nnx.BatchNorm":
            convert_sampled_batchnorm(model, sbn.FeatureSampling(1 / 4), seed=seed)
        found.append(accuracy(model, images, labels, seed))
    print(f"{name}: {' '.join(f'{100 * each:.1f}%' for each in found)}, mean {100 * np.mean(found):.1f}%")
