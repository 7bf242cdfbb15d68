"""What is compiled, and when: nothing at import, few kernels by a first call, none by odd memory after it."""

import itertools
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import sbncore as sbn
from sbncore.cpu.kernels import DRAWS

ROOT = Path(__file__).parents[1]
DTYPES = ("float64", "float32", "float16")
OPTIONS = {"plain": (None, False), "ReLU": ("relu", False), "residual + ReLU": ("relu", True)}
LONG, SHORT, TINY = (6, 5, 20, 16), (6, 5, 7, 7), (6, 5, 3, 3)
SAMPLERS = (
    sbn.FeatureSampling(1 / 4), sbn.Full(), sbn.BatchSampling(2), sbn.NaiveSampling(1 / 4),
    sbn.Mixture([(0.5, sbn.FeatureSampling(1 / 4, "rows")), (0.5, sbn.VirtualSamples(2))]),
)  # fmt: skip


def python(code, cwd=ROOT, **env):
    """Run `code` in an interpreter of its own and return what it printed."""
    paths = os.pathsep.join([str(cwd), str(ROOT / "tests")])
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, env=os.environ | {"PYTHONPATH": paths} | env,
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def kernels():
    """The names of all compiled functions that this process has loaded."""
    from sbncore.cpu.kernels import loaded

    return set(loaded)


def arranged(array, last):
    """A copy that lies in this layout, the channels second."""
    return np.moveaxis(np.moveaxis(array, 1, -1).copy(order="C"), -1, 1) if last else array.copy(order="C")


def drawn(dtype, last, shape, seed=0):
    """x, dy and a residual."""
    values = np.random.default_rng(seed).normal(1, 2, (3, *shape)).astype(dtype)
    return [arranged(array, last) for array in values]


def call(x, dy, residual, option, weight=True, sampler=SAMPLERS[0], gradient="exact"):
    """A forward and a backward: y, the gradients."""
    activation, added = OPTIONS[option]
    weight = np.ones(x.shape[1], "float64" if x.dtype == "float64" else "float32") if weight else None
    y, saved = sbn.forward(
        x, weight, weight, plan=sampler.plan(x.shape), activation=activation, gradient=gradient,
        residual=residual if added else None,
    )  # fmt: skip
    return [y, *(each for each in sbn.backward(dy, saved) if each is not None)]


def odd(array, last):
    """Views of the same shape and layout, by what is odd about their memory."""
    memory = np.moveaxis(array, 1, -1) if last else array
    room = np.zeros(memory.size + 1, memory.dtype)[1:].reshape(memory.shape)
    raw = np.zeros(memory.nbytes + 1, np.uint8)[1:].view(memory.dtype).reshape(memory.shape)
    room[...] = raw[...] = memory
    views = {
        "read-only": memory.copy(),
        "behind another sample": np.concatenate([memory[:1], memory])[1:],
        "an element off": room,
        "a byte off": raw,
        "reversed": memory[::-1],
        "every other sample": np.repeat(memory, 2, axis=0)[::2],
        "every other position": np.repeat(memory, 2, axis=2)[:, :, ::2],
        "padded": np.pad(memory, 1)[(slice(1, -1),) * memory.ndim],
        "expanded": np.broadcast_to(memory[:1], memory.shape),
    }
    views["read-only"].flags.writeable = False
    return {name: np.moveaxis(view, -1, 1) if last else view for name, view in views.items()}


@pytest.mark.parametrize("shape", [LONG, SHORT, TINY], ids=["long maps", "short maps", "tiny maps"])
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("last", [False, True], ids=["channels-first", "channels-last"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_odd_memory_compiles_nothing_new_and_changes_no_bit(dtype, last, option, shape):
    arrays = drawn(dtype, last, shape)
    call(*arrays, option)
    before = kernels()
    for views in zip(*(odd(array, last).items() for array in arrays), strict=True):
        name, given = views[0][0], [view for _, view in views]
        results = call(*given, option)
        assert kernels() == before, name
        expected = call(*(arranged(view, last) for view in given), option)
        assert all((a == b).all() for a, b in zip(results, expected, strict=True)), name


@pytest.mark.parametrize("last", [False, True], ids=["channels-first", "channels-last"])
def test_odd_outputs_and_parameters_compile_nothing_new(rng, last):
    x, dy, _ = drawn("float32", last, LONG)
    weight, bias = rng.normal(size=(2, 5)).astype(np.float32)
    plan = SAMPLERS[0].plan(x.shape)
    y, saved = sbn.forward(x, weight, bias, plan=plan, out=np.empty_like(x))
    dx = sbn.backward(dy, saved, out=np.empty_like(x)).x
    before = kernels()
    strided, frozen = np.repeat(weight, 2)[::2], bias.copy()
    frozen.flags.writeable = False
    for name, out in odd(np.zeros_like(x), last).items():
        if out.flags.writeable:
            got, saved = sbn.forward(x, strided, frozen, plan=plan, out=out)
            assert got is out and (got == y).all(), name
            assert (sbn.backward(dy, saved, out=out).x == dx).all(), name
            assert kernels() == before, name


# Every (dtype, layout, option) takes one kernel a direction and module, whatever the sampler and parameters.
MODULES = {False: ("channels_first", "short_maps"), True: ("channels_last",)}
SUFFIX = {"plain": "", "ReLU": "-relu", "residual + ReLU": "-relu-residual-mask"}


def name_kernels():
    for dtype, last, option in itertools.product(DTYPES, (False, True), OPTIONS):
        before = kernels() | set(DRAWS)
        choices = itertools.product((LONG, SHORT, TINY), SAMPLERS, ("exact", "detached"), (True, False))
        for shape, sampler, gradient, weight in choices:
            call(*drawn(dtype, last, shape), option, weight, sampler, gradient)
        both = itertools.product(MODULES[last], ("forward", "backward"))
        assert kernels() - before == {"-".join((*which, dtype)) + SUFFIX[option] for which in both}


def test_an_option_compiles_few_kernels():
    """In a new process, where nothing else asked for a kernel."""
    python("import test_start; test_start.name_kernels()")


def test_the_engines_import_compiles_nothing_and_loads_neither_numba_nor_llvm():
    code = "from sbncore.cpu import call; import sys, test_start; print(test_start.kernels()"
    assert python(f"{code}, {{'numba', 'llvmlite'}} & set(sys.modules))") == "set() set()"


def test_every_kernel_has_a_name_that_says_which_it_is():
    from sbncore.cpu.kernels import Kernel, names

    every = [name for name in names() if name not in DRAWS]
    assert len(set(every)) == 3 * 4 * (5 + 4) and all(str(Kernel.named(name)) == name for name in every)


UNWRITABLE = """
import warnings
import numpy as np
from conftest import error

with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import sbncore as sbn
    from sbncore import reference

    x, dy = np.random.default_rng(0).normal(size=(2, 6, 9, 9, 5))
    y, saved = sbn.forward(x, channel_axis=-1)
    dx = sbn.backward(dy, saved).x
x, dy, y, dx = (np.moveaxis(array, -1, 1) for array in (x, dy, y, dx))
y_true, saved = reference.forward(x, p=sbn.Full().plan(x.shape).weights())
assert error(y, y_true) < 1e-11 and error(dx, reference.backward(dy, saved)["x"]) < 1e-11
print(sbn.__file__, *(warning.message for warning in caught), sep="\\n")
"""


def test_without_a_writable_cache_one_warning_and_right_results(tmp_path):
    """A folder below a plain file can be made by nobody, root included."""
    package, file = tmp_path / "sbncore", tmp_path / "file"
    shutil.copytree(Path(sbn.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))
    file.touch()
    nowhere = str(file / "cache")
    where, *warned = python(UNWRITABLE, tmp_path, SBNCORE_CACHE_DIR=nowhere).splitlines()
    assert where == str(package / "__init__.py")
    assert len(warned) == 1 and warned[0].startswith(f"sbncore: no writable cache at {nowhere}")
