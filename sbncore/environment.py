"""What this machine has for sbncore, and whether the engines compute what the reference does."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
from collections.abc import Iterator
from typing import Any

import numpy as np

from sbncore import functional, reference
from sbncore.cpu import threads
from sbncore.samplers import FeatureSampling

PACKAGES = {
    "sbncore": "sbncore", "NumPy": "numpy", "Numba": "numba", "llvmlite": "llvmlite", "PyTorch": "torch",
    "JAX": "jax", "Flax": "flax", "CuPy": "cupy",
}  # fmt: skip
WHEELS = "cupy-cuda12x", "cupy-cuda13x"  # whose module is cupy
ADAPTERS = {
    "torch": "torch",
    "jax": "jax",
    "flax": "flax",
    "cupy": "cuda13",
}  # the extra that brings what is missing
TOLERANCE = {"float64": 1e-11, "float32": 2e-5, "float16": 4e-3, "bfloat16": 3e-2}
SHAPE = (8, 5, 6, 16)


def environment() -> dict[str, str]:
    """Return what a report of a fault should say: versions, processor, compiled kernels, GPU, adapters."""
    found = {"Python": f"{platform.python_version()}, {platform.platform()}"}
    found |= {name: _version(package) for name, package in PACKAGES.items()}
    found |= _cpu()
    found["GPU"] = _gpu()
    for adapter, extra in ADAPTERS.items():
        there = importlib.util.find_spec(adapter) is not None
        found[f"sbncore.adapters.{adapter}"] = "usable" if there else f"pip install 'sbncore[{extra}]'"
    return found


def _cpu() -> dict[str, str]:
    from sbncore.cpu import kernels

    try:
        name, features = kernels.cpu()
    except ImportError as missing:
        return {"CPU": f"not used: {missing}; pip install numba"}
    levels = [level for level, needed in kernels.LEVELS.items() if kernels.has(features, needed)]
    runs = "PyTorch's OpenMP" if threads.openmp() else "a pool of sbncore's own"
    counts = [f"{sum(1 for _ in folder.glob('*.o'))} in {folder}" for folder in kernels.places()]
    return {
        "CPU": f"{name}, {levels[0] if levels else 'below x86-64-v3'}, {os.cpu_count()} cores",
        "threads": f"{threads.get_num_threads()}, of {runs}",
        "compiled kernels": "; ".join(counts),
    }


def _version(package: str) -> str:
    for name in WHEELS if package == "cupy" else (package,):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "not installed"


def _gpu() -> str:
    from sbncore.cuda.device import cupy

    try:
        runtime = cupy().cuda.runtime
    except RuntimeError as complaint:
        return f"not used: {complaint}"
    properties = runtime.getDeviceProperties(runtime.getDevice())
    return f"{properties['name'].decode()}, driver for CUDA {runtime.driverGetVersion() / 1000:g}"


def checks() -> Iterator[tuple[str, str]]:
    """Yield what was checked and "ok", "not compiled yet", or how far it is off.

    A forward and a backward of each dtype and layout against the float64 reference; on the CPU of dtypes
    whose kernels are compiled, and of float32, which is compiled for it; on a GPU, if there is one, of all.
    """
    for dtype in TOLERANCE if importlib.util.find_spec("numba") else ():
        for axis in (1, -1):
            what = f"CPU, {dtype}, channels-{'first' if axis == 1 else 'last'}"
            if dtype == "bfloat16" and importlib.util.find_spec("ml_dtypes") is None:
                yield what, "needs ml_dtypes in NumPy: pip install ml_dtypes"
            elif dtype != "float32" and not _compiled(dtype, axis):
                yield what, f"not compiled yet: python -m sbncore warmup --dtype {dtype}"
            else:
                yield what, _difference(dtype, axis, np.asarray)
    if not _gpu().startswith("not used"):
        from sbncore.cuda.device import cupy

        for dtype in ("float64", "float32", "float16"):
            for axis in (1, -1):
                what = f"GPU, {dtype}, channels-{'first' if axis == 1 else 'last'}"
                yield what, _difference(dtype, axis, cupy().asarray)


def _compiled(dtype: str, axis: int) -> bool:
    from sbncore.cpu import kernels

    memory = "channels_first" if axis == 1 else "channels_last"
    names = (
        str(kernels.Kernel(memory, direction, dtype, relu=True)) for direction in ("forward", "backward")
    )
    return all(kernels.compiled(name) is not None for name in (*names, *kernels.DRAWS))


def _difference(dtype: str, axis: int, to: Any) -> str:
    """Return "ok", or how far y or a gradient is from the reference."""
    if dtype == "bfloat16":
        import ml_dtypes

        kind: Any = ml_dtypes.bfloat16
    else:
        kind = np.dtype(dtype)
    rng = np.random.default_rng(0)
    x, dy = (rng.normal(size=SHAPE).astype(kind) for _ in range(2))
    weight, bias = rng.uniform(0.5, 1.5, (2, SHAPE[1])).astype("f8" if dtype == "float64" else "f4")
    if axis == -1:
        x, dy = (np.ascontiguousarray(np.moveaxis(each, 1, -1)) for each in (x, dy))
    plan = FeatureSampling(1 / 4).plan(x.shape, channel_axis=axis)
    y, saved = functional.forward(
        to(x), to(weight), to(bias), plan=plan, channel_axis=axis, activation="relu"
    )
    grads = functional.backward(to(dy), saved)
    wide = [np.moveaxis(each.astype("f8"), axis, 1) for each in (x, dy)]
    y_true, truth = reference.forward(
        wide[0], weight.astype("f8"), bias.astype("f8"), p=plan.weights(), activation="relu"
    )
    sure = np.abs(truth.z) > 10 * TOLERANCE[dtype]  # elsewhere rounding may decide about the ReLU
    true = reference.backward(wide[1], truth)
    got = {"y": y, "x": grads.x, "weight": grads.weight, "bias": grads.bias}
    for name, expected in (("y", y_true), *true.items()):
        if name not in got:
            continue
        value = got[name].get() if hasattr(got[name], "get") else got[name]
        value = np.asarray(value).astype("f8")
        value = np.moveaxis(value, axis, 1) if value.ndim > 1 else value
        off = np.abs(value - expected)
        off = off[sure] if off.ndim > 1 else off / max(1.0, float(np.sqrt(x.size / SHAPE[1])))
        error = float(off.max() / max(1.0, float(np.abs(expected).max())))
        if not error <= 4 * TOLERANCE[dtype]:
            return f"{name} is off by {error:.1e}, expected at most {4 * TOLERANCE[dtype]:.0e}"
    return "ok"
