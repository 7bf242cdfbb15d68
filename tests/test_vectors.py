"""The CPU's kernels at every vector width, past the caches or not, wherever the memory lies."""

import hashlib
import os
import platform
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from numpy.testing import assert_allclose

import sbncore as sbn
from sbncore import reference
from sbncore.cpu import engine

ROOT = Path(__file__).parents[1]
SHAPES = [
    (3, 17, 15), (2, 1, 257), (4, 5, 7, 7), (3, 16, 4, 4), (2, 3, 16, 16), (2, 2, 33, 31), (5, 4, 1), (6, 3),
]  # fmt: skip
SAMPLERS = [sbn.Full(), sbn.BatchSampling(2), sbn.FeatureSampling(1 / 4, at_least=2)]
WIDTHS = {"SSE2": "x86-64", "AVX2": "haswell"}
FLAGS = {"SSE2": "sse2", "AVX2": "avx2"}


def place(values, last, offset):
    """The values in memory of the layout, ``offset`` bytes behind a multiple of 64, within a guard."""
    ordered = np.moveaxis(values, 1, -1) if last else values
    raw = np.full(ordered.nbytes + 512, 0xA5, np.uint8)
    begin = -raw.ctypes.data % 64 + 64 + offset
    memory = raw[begin : begin + ordered.nbytes].view(values.dtype).reshape(ordered.shape)
    memory[...] = ordered
    return (np.moveaxis(memory, -1, 1) if last else memory), raw, slice(begin, begin + ordered.nbytes)


def run(shape, dtype, last, sampler, activation, add, offset=0):
    """All results of a forward and a backward into memory of the caller's, whose surroundings stay."""
    rng = np.random.default_rng(0)
    x, dy, residual = (place(rng.normal(1, 2, shape).astype(dtype), last, offset)[0] for _ in range(3))
    (y, *around_y), (dx, *around_dx) = (place(np.zeros(shape, dtype), last, offset) for _ in range(2))
    weight, bias = rng.normal(1, 0.1, (2, shape[1])).astype(x.dtype if dtype == "float64" else np.float32)
    plan = sampler.plan(shape, step=3)
    _, saved = sbn.forward(
        x, weight, bias, plan=plan, activation=activation, residual=residual if add else None, out=y
    )
    grads = sbn.backward(dy, saved, out=dx)
    for raw, inside in (around_y, around_dx):
        assert (raw[: inside.start] == 0xA5).all() and (raw[inside.stop :] == 0xA5).all()
    truth, kept = reference.forward(
        x, weight, bias, p=plan.weights(), activation=activation, residual=residual if add else None
    )
    expected = reference.backward(dy, kept)
    tolerance = {"float64": 1e-10, "float32": 1e-4, "float16": 2e-2}[dtype]
    for got, wanted in ((y, truth), (dx, expected["x"]), (grads.weight, expected["weight"])):
        scale = max(1, np.abs(wanted).max())
        assert_allclose(np.asarray(got, np.float64) / scale, wanted / scale, rtol=0, atol=tolerance)
    results = [y, dx, grads.weight, grads.bias] + ([grads.residual] if add else [])
    return b"".join(np.ascontiguousarray(result).tobytes() for result in results)


def cases(dtypes):
    for dtype in dtypes:
        for shape in SHAPES:
            for last in (False, True):
                for sampler in SAMPLERS:
                    yield shape, dtype, last, sampler, None, False
                    yield shape, dtype, last, sampler, "relu", True


def digest():
    """Of float32 with everything fused: what is compiled anew for each width takes most of a minute."""
    whole = hashlib.sha256()
    for case in cases(("float32",)):
        if case[-1]:
            whole.update(run(*case))
    return whole.hexdigest()


def runs_here(name):
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return False
    return platform.machine() == "x86_64" and FLAGS[name] in flags


def test_every_width_gives_the_same_bits(tmp_path):
    """LLVM makes of 16 lanes what the CPU named has; the cache knows them apart."""
    found = {"here": digest()}
    for name, cpu in WIDTHS.items():
        if runs_here(name):
            environment = os.environ | {
                "NUMBA_CPU_NAME": cpu, "NUMBA_CPU_FEATURES": "", "SBNCORE_CACHE_DIR": str(tmp_path),
                "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
            }  # fmt: skip
            done = subprocess.run(
                [sys.executable, "-c", "import test_vectors; print(test_vectors.digest())"], env=environment,
                capture_output=True, text=True, timeout=900,
            )  # fmt: skip
            assert done.returncode == 0, done.stderr
            found[name] = done.stdout.strip()
    if len(found) == 1:
        pytest.skip("not an x86-64 Linux: no other width can be forced")
    assert len(set(found.values())) == 1, found


@pytest.mark.parametrize("offset", [0, 16, 4, 8])
def test_streamed_or_not_and_wherever_it_lies_results_are_the_same_bits(monkeypatch, offset):
    for case in cases(("float32", "float16")):
        monkeypatch.setattr(engine, "NONTEMPORAL_BYTES", 1 << 60)
        expected = run(*case)
        assert run(*case, offset=offset) == expected
        monkeypatch.setattr(engine, "NONTEMPORAL_BYTES", 0)
        assert run(*case, offset=offset) == expected


def test_a_result_may_take_the_place_of_its_input(monkeypatch):
    for stream in (0, 1 << 60):
        monkeypatch.setattr(engine, "NONTEMPORAL_BYTES", stream)
        for shape in SHAPES:
            x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
            statistics = sbn.moments(x)
            expected = sbn.normalize(x, statistics, activation="relu")
            assert sbn.normalize(x, statistics, activation="relu", out=x) is x
            assert (x == expected).all()
