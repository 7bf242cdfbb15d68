"""Any CPU array that speaks DLPack: the caller's own type back, without a copy."""

import os
import subprocess
import sys

import array_api_strict as xp
import foreign
import ml_dtypes
import numpy as np
import pytest

import sbncore as sbn


def test_array_api_strict_in_and_out(rng):
    x, dy = rng.normal(size=(2, 8, 3, 5)).astype(np.float32)
    weight = np.linspace(1, 2, 3, dtype=np.float32)
    mean, var = xp.zeros(3, dtype=xp.float32), xp.ones(3, dtype=xp.float32)
    y, saved = sbn.batch_norm(xp.asarray(x), mean, var, xp.asarray(weight), training=True)
    grads = sbn.backward(xp.asarray(dy), saved)
    expected, expected_saved = sbn.forward(x, weight)
    expected_grads = sbn.backward(dy, expected_saved)
    for got, numpys in (
        (y, expected), (grads.x, expected_grads.x), (grads.weight, expected_grads.weight),
        (saved.statistics.mean, expected_saved.statistics.mean),
    ):  # fmt: skip
        assert type(got) is type(mean)
        assert (np.from_dlpack(got) == numpys).all()
    assert np.abs(np.from_dlpack(mean)).max() > 0  # moved in place
    out = xp.zeros((8, 3, 5), dtype=xp.float32)
    assert sbn.forward(xp.asarray(x), xp.asarray(weight), out=out)[0] is out
    assert (np.from_dlpack(out) == expected).all()


def test_numpys_own_views_share_memory(rng):
    x = rng.normal(size=(8, 5, 5, 3)).astype(np.float32)
    _, saved = sbn.forward(x, channel_axis=-1)
    assert np.shares_memory(saved.x, x)
    _, saved = sbn.forward(np.moveaxis(x, -1, 1))
    assert np.shares_memory(saved.x, x)


def test_bfloat16_is_stored_as_it_is(rng):
    x = rng.normal(size=(8, 3, 5)).astype(ml_dtypes.bfloat16)
    y, saved = sbn.forward(x, np.ones(3, ml_dtypes.bfloat16))
    grads = sbn.backward(y, saved)
    assert y.dtype == x.dtype == grads.x.dtype == grads.weight.dtype
    assert saved.statistics.mean.dtype == np.float32 and np.shares_memory(saved.x, x)


ARGUMENTS = "x", "weight", "residual", "out", "running_mean", "dy"


def called_with(name, kind, x):
    """Call with one argument of a foreign kind; return what must not have changed."""
    arrays = {
        "x": x, "weight": np.ones(3, x.dtype), "residual": x.copy(), "out": x.copy(),
        "running_mean": np.zeros(3, x.dtype), "running_var": np.ones(3, x.dtype),
    }  # fmt: skip
    if name == "dy":
        saved = sbn.forward(x)[1]
        return arrays, lambda: sbn.backward(kind(x), saved)
    given = arrays | {name: kind(arrays[name])}
    return arrays, lambda: sbn.batch_norm(**given, training=True)


@pytest.mark.parametrize("name", ARGUMENTS)
@pytest.mark.parametrize(("kind", "message"), [
    (foreign.Deviceless, r"Deviceless without __dlpack_device__: pass numpy\.asarray\({name}\), outside"),
    (foreign.Tracer, r"Tracer without __dlpack_device__: pass numpy\.asarray\({name}\), outside"),
    (foreign.Typeless, r"Typeless without dtype; pass one .* numpy\.asarray\({name}\)"),
    (foreign.Deleted, r"Array has been deleted; pass one with its values in memory"),
    (list, "list"),
])  # fmt: skip
def test_what_is_no_array_is_named(rng, name, kind, message):
    x = rng.normal(size=(8, 3, 5)).astype(np.float32)
    arrays, call = called_with(name, kind, x)
    before = {each: array.copy() for each, array in arrays.items()}
    message = message.replace("{name}", name)
    with pytest.raises(TypeError, match=f"^{name}: expected an array .* got:? {message}"):
        call()
    assert all((arrays[each] == array).all() for each, array in before.items())


@pytest.mark.parametrize("name", ["weight", "running_mean"])
def test_pyarrows_arrays_are_named(rng, name):
    pa = pytest.importorskip("pyarrow")
    x = rng.normal(size=(8, 3, 5)).astype(np.float32)
    _, call = called_with(name, lambda array: pa.array(array), x)
    with pytest.raises(TypeError, match=rf"^{name}: .* without dtype; pass one .* numpy\.asarray\({name}\)"):
        call()


def test_jaxs_arrays():
    jax = pytest.importorskip("jax")
    x = jax.numpy.asarray(np.random.default_rng(0).normal(size=(8, 3, 5)), "float32")
    y, saved = sbn.forward(x)
    assert type(y) is type(x) is type(sbn.backward(x, saved).x)
    for trace in (jax.jit, jax.grad):
        with pytest.raises(TypeError, match=r"^x: expected an array .* without __dlpack_device__"):
            trace(lambda x: sbn.forward(x)[0].sum())(x)
    with pytest.raises(ValueError, match=r"^out: expected a writeable array, got a read-only one"):
        sbn.forward(x, out=x + 1)
    x.delete()
    with pytest.raises(TypeError, match=r"^x: expected an array that DLPack can export, .* values in memory"):
        sbn.forward(x)


def test_numbas_switch_for_debugging_changes_nothing(tmp_path):
    """Kernels are compiled in processes of their own, whatever Numba does in this one."""
    code = """
import numpy as np, sbncore as sbn
mean, var = np.zeros(3), np.ones(3)
x = np.random.default_rng(0).normal(2, 1, (4, 3, 5))
sbn.batch_norm(x, mean, var, training=True, momentum=1.0)
assert abs(mean - x.mean((0, 2))).max() < 1e-12
"""
    environment = os.environ | {"NUMBA_DISABLE_JIT": "1", "SBNCORE_CACHE_DIR": str(tmp_path)}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)


class TestTorch:
    torch = None

    @pytest.fixture(autouse=True)
    def _torch(self):
        type(self).torch = pytest.importorskip("torch")

    @pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
    @pytest.mark.parametrize("channels_last", [False, True])
    def test_tensors_in_and_out(self, dtype, channels_last):
        torch = self.torch
        generator = torch.Generator().manual_seed(0)
        kind = getattr(torch, dtype)
        parameter = torch.float64 if dtype == "float64" else torch.float32
        x = torch.randn(8, 3, 5, 6, generator=generator).to(kind)
        if channels_last:
            x = x.to(memory_format=torch.channels_last)
        x.requires_grad_()
        weight, bias = torch.rand(2, 3, generator=generator, dtype=torch.float64).to(parameter)
        mean, var = torch.zeros(3, dtype=parameter), torch.ones(3, dtype=parameter)
        with torch.no_grad():
            y, saved = sbn.batch_norm(x, mean, var, weight, bias, training=True, momentum=0.3)
            assert sbn.backward(torch.ones_like(x), saved).x.dtype == kind
        x = x.detach()
        true = torch.nn.BatchNorm2d(3, momentum=0.3, dtype=torch.float64)
        with torch.no_grad():
            true.weight.copy_(weight)
            true.bias.copy_(bias)
        leaf = x.detach().double().requires_grad_()
        y64 = true(leaf)
        dy = torch.randn(8, 3, 5, 6, generator=generator).to(kind)
        y64.backward(dy.double())
        grads = sbn.backward(dy, saved)
        tolerance = {"float64": 1e-11, "float32": 2e-5, "float16": 4e-3, "bfloat16": 3e-2}[dtype]

        def close(a, b, kind):
            assert isinstance(a, torch.Tensor) and a.dtype == kind
            assert (a.double() - b).abs().max() <= tolerance * max(1, b.abs().max())

        close(y, y64, kind)
        close(grads.x, leaf.grad, kind)
        close(grads.weight, true.weight.grad, parameter)
        close(grads.bias, true.bias.grad, parameter)
        close(mean, true.running_mean, parameter)
        close(var, true.running_var, parameter)
        assert y.stride() == x.stride() == grads.x.stride()
        out = torch.empty_like(x)
        assert sbn.forward(x, weight, bias, out=out)[0] is out and torch.equal(out, y)
        evaluated, saved = sbn.batch_norm(x, mean, var, weight, bias)
        true.eval()
        leaf.grad = None
        y64 = true(leaf)
        y64.backward(dy.double())
        close(evaluated, y64, kind)
        close(sbn.backward(dy, saved).x, leaf.grad, kind)

    def test_odd_tensors(self):
        torch = self.torch
        x = torch.randn(8, 3, 10)
        for view in (x[::2], x[:, :, ::3], x.transpose(0, 2), x[:1].expand(4, 3, 10), x[:, 1:2]):
            # another layout may order its sums otherwise
            assert torch.allclose(sbn.forward(view)[0], sbn.forward(view.contiguous())[0], atol=1e-5)
        with pytest.raises(ValueError, match="out: expected distinct elements"):
            sbn.forward(x, out=torch.empty(1, 3, 10).expand(8, 3, 10))
        with pytest.raises(TypeError, match="x: expected dtype"):
            sbn.forward(torch.ones(4, 3, dtype=torch.int64))
        with pytest.raises(TypeError, match="x: expected dtype"):
            sbn.forward(torch.ones(4, 3, dtype=torch.complex64))
        for exportless in (torch.ones(4, 3).to_sparse(), torch.ones(4, 3, device="meta")):
            with pytest.raises(TypeError, match=r"x: expected an array that DLPack can export, got: "):
                sbn.forward(exportless)

    def test_negative_and_conjugate_views(self):
        torch = self.torch
        z = torch.randn(8, 3, 5, dtype=torch.complex64)
        negative = z.conj().imag
        assert negative.is_neg()
        expected, saved = sbn.forward(negative.clone())
        assert torch.equal(sbn.forward(negative)[0], expected)
        assert torch.equal(sbn.forward(z.real, residual=negative)[0], sbn.forward(z.real)[0] + negative)
        dx = sbn.backward(negative.clone(), saved).x
        assert torch.equal(sbn.backward(negative, sbn.forward(negative)[1]).x, dx)
        vector = torch.randn(3, dtype=torch.complex64).conj().imag
        y = sbn.forward(negative, vector, vector)[0]
        assert torch.equal(y, sbn.forward(negative, vector.clone(), vector.clone())[0])
        assert torch.equal(sbn.moments(negative).mean, sbn.moments(negative.clone()).mean)
        statistics = sbn.Statistics(vector, vector.abs())
        plain = sbn.normalize(negative.clone(), sbn.Statistics(vector.clone(), vector.abs()))
        assert torch.equal(sbn.normalize(negative, statistics), plain)
        before = z.clone()
        for call in (
            lambda: sbn.forward(z.real.clone(), out=negative),
            lambda: sbn.backward(z.real.clone(), saved, out=negative),
            lambda: sbn.batch_norm(z.real, vector, torch.ones(3), training=True),
        ):
            with pytest.raises(ValueError, match="expected memory as it is read, got a negative"):
                call()
        assert torch.equal(z, before)
        with pytest.raises(TypeError, match=r"x: expected dtype .* got complex64"):
            sbn.forward(z.conj())

    def test_what_autograd_follows_is_refused(self):
        torch = self.torch
        x, weight = torch.randn(8, 3, 5), torch.nn.Parameter(torch.ones(3))
        leaf, ones, mean, var = x.clone().requires_grad_(), torch.ones(3), torch.zeros(3), torch.ones(3)
        saved, plan = sbn.forward(x)[1], sbn.Prior(0.5).plan(x.shape)
        calls = {
            "x": lambda: sbn.forward(leaf),
            "weight": lambda: sbn.batch_norm(x, mean, var, weight, training=True),
            "bias": lambda: sbn.forward(x, bias=weight),
            "residual": lambda: sbn.forward(x, residual=leaf),
            "out": lambda: sbn.forward(x, out=leaf),
            "dy": lambda: sbn.backward(leaf, saved),
            "running_mean": lambda: sbn.batch_norm(x, weight, var, training=True),
            "running_var": lambda: sbn.batch_norm(x, mean, weight),
            "mean": lambda: sbn.forward(x, plan=plan, prior=sbn.Statistics(weight, ones)),
            "var": lambda: sbn.normalize(x, sbn.Statistics(ones, weight)),
            "dx": lambda: sbn.repair(leaf, x, saved, ones, ones),
            "dweight": lambda: sbn.repair(torch.empty(8, 3, 5), x, saved, weight, ones),
        }
        for name, call in calls.items():
            expected = rf"^{name}: .* a layer of sbncore\.adapters\.torch, or pass {name}\.detach\(\)"
            with pytest.raises(TypeError, match=expected):
                call()
            assert torch.equal(mean, torch.zeros(3)) and torch.equal(var, torch.ones(3))
        y = sbn.forward(leaf.detach(), weight.detach())[0]
        with torch.no_grad():
            assert torch.equal(sbn.forward(leaf, weight)[0], y)
        with torch.inference_mode():
            assert torch.equal(sbn.forward(leaf, weight)[0], y)
            assert torch.equal(sbn.forward(leaf + 0, weight)[0], y)

    def test_tensors_without_memory_of_their_own(self):
        torch = self.torch
        from torch._subclasses import FakeTensorMode

        x = torch.randn(8, 3, 5)
        fake = FakeTensorMode().from_tensor(x)
        mean, var = torch.zeros(3), torch.ones(3)
        for call in (
            lambda: sbn.forward(fake),
            lambda: sbn.forward(x, FakeTensorMode().from_tensor(mean)),
            lambda: sbn.batch_norm(x, mean, var, training=True, out=fake),
            lambda: sbn.moments(fake),
        ):
            with pytest.raises(TypeError, match="expected a tensor with memory of its own, got FakeTensor"):
                call()
        assert not mean.any()
        for transform in (
            torch.func.functionalize, torch.func.vmap, lambda f: lambda t: torch.func.jvp(f, (t,), (t,)),
            torch.func.grad,
        ):  # fmt: skip
            with pytest.raises(TypeError, match=r"^x: expected"):
                transform(lambda t: sbn.forward(t)[0].sum())(x)
        zero = torch._efficientzerotensor((8, 3, 5))
        with pytest.raises(TypeError, match=r"x: expected an array that DLPack can export, got: "):
            sbn.forward(zero)

    @pytest.mark.parametrize("shape", [(0, 3, 4), (3, 3), (1, 3, 4)])
    def test_full_is_torchs_batch_norm_in_float64(self, shape):
        torch = self.torch
        x = torch.randn(*shape, dtype=torch.float64)
        ours, theirs = (torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)), None
        theirs = tuple(t.clone() for t in ours)
        for training in (True, False):
            y, _ = sbn.batch_norm(x, *ours, None, None, training, 0.1, 1e-5)
            expected = torch.nn.functional.batch_norm(x, *theirs, None, None, training, 0.1, 1e-5)
            assert torch.allclose(y, expected, rtol=1e-12, atol=1e-12)
            for a, b in zip(ours, theirs, strict=True):
                assert torch.allclose(a, b, rtol=1e-13, atol=1e-13)


def test_large_results_begin_at_a_cache_line(rng):
    """Else no store into them could be streamed: NumPy's own begin 16 bytes behind one."""
    for shape, axis in (((8, 64, 40, 40), 1), ((8, 40, 40, 64), -1)):
        for dtype in (np.float32, np.float16):
            x = rng.normal(size=shape).astype(dtype)
            y, saved = sbn.forward(x, channel_axis=axis)
            dx = sbn.backward(x, saved).x
            for result in (y, dx):
                assert result.ctypes.data % 64 == 0 and result.flags.c_contiguous and result.flags.writeable
