"""CuPy: the same functions on a GPU's arrays, which stay there. Without a GPU it says so and ends.

Run it: python examples/cupy_arrays.py
"""

import sys

import numpy as np

import sbncore as sbn

try:
    import cupy as cp

    cp.cuda.runtime.getDeviceCount()
except Exception as missing:
    print(f"skipped, no GPU for CuPy: {missing}")
    sys.exit()

plan = sbn.FeatureSampling(1 / 16, "runs").plan((32, 64, 56, 56), layer=1, step=7)
x = cp.random.default_rng(0).standard_normal((32, 64, 56, 56), dtype=cp.float32)
y, saved = sbn.forward(x, plan=plan, activation="relu")
grads = sbn.backward(cp.ones_like(y), saved)
print("y on the GPU:", type(y).__module__, y.device, "its gradient:", grads.x.device)

on_the_cpu, _ = sbn.forward(x.get(), plan=plan, activation="relu")  # the same draw
print("the CPU agrees:", bool(np.allclose(y.get(), on_the_cpu, atol=1e-5)))
