"""Beside PyTorch the kernels run on its OpenMP threads: the same bits as on our own, from anywhere."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import sbncore as sbn  # noqa: E402
from sbncore.cpu import threads, tuning  # noqa: E402

pytestmark = pytest.mark.skipif(not threads.openmp(), reason="no OpenMP library of PyTorch's in this process")


@pytest.fixture(autouse=True)
def _threads_for_everything(monkeypatch):
    monkeypatch.setattr(tuning, "PARALLEL_ELEMENTS", 1)
    before = sbn.get_num_threads()
    sbn.set_num_threads(3)
    yield
    sbn.set_num_threads(before)


def everything(x, dy, sampler, axis):
    y, saved = sbn.forward(
        x, plan=sampler.plan(x.shape, channel_axis=axis), channel_axis=axis, activation="relu", residual=dy
    )
    grads = sbn.backward(dy, saved)
    arrays = (y, grads.x, grads.residual, saved.statistics.mean, saved.statistics.var)
    return b"".join(np.ascontiguousarray(array).tobytes() for array in arrays)


@pytest.mark.parametrize("axis", [1, -1])
@pytest.mark.parametrize("sampler", [sbn.Full(), sbn.BatchSampling(2), sbn.FeatureSampling(1 / 16)], ids=str)
@pytest.mark.parametrize("shape", [(8, 30, 41, 37), (16, 64, 7, 7)])
def test_a_team_and_the_pool_give_the_same_bits(rng, monkeypatch, shape, sampler, axis):
    x, dy = rng.normal(1, 2, (2, *shape)).astype(np.float32)
    team = everything(x, dy, sampler, axis)
    monkeypatch.setattr(threads, "_entry", 0)
    assert everything(x, dy, sampler, axis) == team
    sbn.set_num_threads(1)
    assert everything(x, dy, sampler, axis) == team


def test_several_python_threads_at_once(rng):
    x, dy = rng.normal(size=(2, 16, 32, 20, 20)).astype(np.float32)
    expected = everything(x, dy, sbn.FeatureSampling(1 / 8), 1)
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda _: everything(x, dy, sbn.FeatureSampling(1 / 8), 1), range(16)))
    assert set(results) == {expected}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_forked_child_does_not_wait_for_threads_it_has_not():
    script = """
import os, warnings
import numpy as np, torch, sbncore as sbn
from sbncore.cpu import threads, tuning
tuning.PARALLEL_ELEMENTS = 1
warnings.simplefilter("ignore")
sbn.set_num_threads(3)
torch.randn(1 << 20).relu()
x = np.random.default_rng(0).normal(size=(16, 32, 20, 20)).astype(np.float32)
before = sbn.forward(x)[0]
assert threads.openmp()
child = os.fork()
if child == 0:
    os._exit(0 if threads.openmp() == 0 and (sbn.forward(x)[0] == before).all() else 1)
status = os.waitpid(child, 0)[1]
assert (sbn.forward(x)[0] == before).all()
raise SystemExit(os.waitstatus_to_exitcode(status))
"""
    done = subprocess.run([sys.executable, "-c", script], timeout=300, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
