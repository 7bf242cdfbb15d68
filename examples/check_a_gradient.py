"""Checking one's own layer: its backward against numerical derivatives in float64, first right, then wrong.

Run it: python examples/check_a_gradient.py
"""

import numpy as np

import sbncore as sbn


def forward(x, weight):
    """RMS normalization: y = weight * x / sqrt(mean(x**2) + eps), over the channels of each sample."""
    r = 1 / np.sqrt((x**2).mean(1, keepdims=True) + 1e-5)
    return weight * x * r, (x, weight, r)


def backward(dy, saved):
    x, weight, r = saved
    g = dy * weight
    dx = r * (g - x * r**2 * (g * x).mean(1, keepdims=True))
    return dx, (dy * x * r).sum(0)


def forgetful(dy, saved):
    """As if r did not depend on x."""
    x, weight, r = saved
    return dy * weight * r, (dy * x * r).sum(0)


rng = np.random.default_rng(0)
inputs = {"x": rng.normal(size=(6, 5)), "weight": rng.uniform(0.5, 1.5, 5)}
for name, function in (("backward", backward), ("forgetful", forgetful)):
    report = sbn.check_gradients(forward, function, inputs)
    print(f"{name}: {'right' if report else 'wrong'}\n{report}\n")
