"""A training loop in NumPy: a network of two layers on scikit-learn's digits, its normalization sampled.

Each image is 64 pixels; a hidden layer of 32 channels sees it as 16 positions of 4 pixels. Run it:
python examples/numpy_loop.py
"""

import numpy as np
from sklearn.datasets import load_digits

import sbncore as sbn
from sbncore.adapters.numpy import SampledBatchNorm

digits = load_digits()
images = (digits.images / 16).reshape(-1, 4, 2, 4, 2).transpose(0, 2, 4, 1, 3)  # (N, 2, 2, 4, 4)
x_all = images.reshape(-1, 4, 16).astype(np.float32)  # (N, 4 pixels, 16 positions)
train, test = np.arange(1500), np.arange(1500, len(x_all))

rng = np.random.default_rng(0)
w1 = rng.normal(0, 0.5, (32, 4)).astype(np.float32)
w2 = rng.normal(0, 0.05, (10, 32 * 16)).astype(np.float32)
norm = SampledBatchNorm(32, sampler=sbn.FeatureSampling(1 / 4), activation="relu", layer=1)


def forward(x):
    """Return the hidden layer and the logits."""
    hidden = norm(np.einsum("kc,ncs->nks", w1, x))
    return hidden, hidden.reshape(len(x), -1) @ w2.T


def accuracy(chosen):
    norm.eval()  # by the running statistics
    right = (forward(x_all[chosen])[1].argmax(1) == digits.target[chosen]).mean()
    norm.train()
    return right


rate, batch = 0.1, 50
for epoch in range(8):
    for chosen in rng.permutation(train).reshape(-1, batch):
        x, labels = x_all[chosen], digits.target[chosen]
        hidden, logits = forward(x)  # draws anew, moves the running statistics
        p = np.exp(logits - logits.max(1, keepdims=True))
        p /= p.sum(1, keepdims=True)
        p[np.arange(batch), labels] -= 1
        dlogits = p / batch
        dw2 = dlogits.T @ hidden.reshape(batch, -1)
        dz = norm.backward((dlogits @ w2).reshape(hidden.shape))  # the exact gradient of that draw
        w1 -= rate * np.einsum("nks,ncs->kc", dz, x)
        w2 -= rate * dw2
        norm.weight -= rate * norm.dweight
        norm.bias -= rate * norm.dbias
    print(f"epoch {epoch + 1}: test accuracy {accuracy(test):.1%}")
