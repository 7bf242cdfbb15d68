"""The same bits from run to run, at any number of threads, from several Python threads and after a fork."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from strategies import DTYPES

import sbncore as sbn
from sbncore.cpu import tuning


@pytest.fixture(autouse=True)
def _threads_for_everything(monkeypatch):
    monkeypatch.setattr(tuning, "PARALLEL_ELEMENTS", 1)
    before = sbn.get_num_threads()
    yield
    sbn.set_num_threads(before)


def everything(x, dy, sampler, axis, gradient="exact"):
    y, saved = sbn.forward(
        x, np.ones(x.shape[axis], np.float32 if x.dtype != np.float64 else np.float64),
        plan=sampler.plan(x.shape, channel_axis=axis), channel_axis=axis, activation="relu", residual=dy,
        gradient=gradient,
    )  # fmt: skip
    grads = sbn.backward(dy, saved)
    statistics = saved.statistics
    arrays = (y, grads.x, grads.weight, grads.residual, statistics.mean, statistics.var)
    return b"".join(np.ascontiguousarray(array).tobytes() for array in arrays)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("axis", [1, -1])
@pytest.mark.parametrize("sampler", [sbn.Full(), sbn.BatchSampling(2), sbn.FeatureSampling(1 / 16)], ids=str)
@pytest.mark.parametrize("shape", [(8, 30, 41, 37), (64, 6200), (2, 1, 700, 400)])
def test_bit_identical_at_any_thread_count(rng, dtype, axis, sampler, shape):
    x, dy = rng.normal(1, 2, (2, *shape)).astype(DTYPES[dtype])
    results = set()
    for count in (1, 2, 3, 7):
        sbn.set_num_threads(count)
        results |= {everything(x, dy, sampler, axis) for _ in range(2)}
    assert len(results) == 1


def test_several_python_threads_at_once(rng):
    x, dy = rng.normal(size=(2, 16, 32, 40, 40)).astype(np.float32)
    sbn.set_num_threads(3)
    expected = everything(x, dy, sbn.FeatureSampling(1 / 8), 1)
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda _: everything(x, dy, sbn.FeatureSampling(1 / 8), 1), range(16)))
    assert set(results) == {expected}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_forked_child_computes_the_same():
    """In a subprocess of its own: forking a process with threads draws a warning from Python 3.12 on."""
    script = """
import os, warnings
import numpy as np, sbncore as sbn
from sbncore.cpu import tuning
tuning.PARALLEL_ELEMENTS = 1
warnings.simplefilter("ignore")
sbn.set_num_threads(3)
x = np.random.default_rng(0).normal(size=(16, 32, 40, 40)).astype(np.float32)
before = sbn.forward(x)[0]
child = os.fork()
if child == 0:
    os._exit(0 if (sbn.forward(x)[0] == before).all() else 1)
status = os.waitpid(child, 0)[1]
assert (sbn.forward(x)[0] == before).all()
raise SystemExit(os.waitstatus_to_exitcode(status))
"""
    done = subprocess.run([sys.executable, "-c", script], timeout=300, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_call_while_python_exits_does_without_the_pool():
    script = """
import atexit
import numpy as np, sbncore as sbn
from sbncore.cpu import tuning
tuning.PARALLEL_ELEMENTS = 1
sbn.set_num_threads(3)
x = np.random.default_rng(0).normal(size=(16, 32, 40, 40)).astype(np.float32)
before = sbn.forward(x)[0]
atexit.register(lambda: print((sbn.forward(x)[0] == before).all()))
"""
    done = subprocess.run([sys.executable, "-c", script], timeout=300, capture_output=True, text=True)
    assert done.stdout.strip() == "True", done.stderr


def test_the_environment_sets_the_number():
    script = "import sbncore; print(sbncore.get_num_threads())"
    environment = {**os.environ, "SBNCORE_NUM_THREADS": "5", "OMP_NUM_THREADS": "4"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == "5"


@pytest.mark.parametrize(("count", "error"), [(0, ValueError), (1.5, TypeError), (True, TypeError)])
def test_a_bad_number_of_threads(count, error):
    with pytest.raises(error, match="count: expected"):
        sbn.set_num_threads(count)
