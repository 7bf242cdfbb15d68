"""Any CPU array that speaks DLPack: the caller's own type back, without a copy."""

import array_api_strict as xp
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
        y, saved = sbn.batch_norm(x, mean, var, weight, bias, training=True, momentum=0.3)
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
            with pytest.raises(TypeError, match="x: expected an array that DLPack can export, got: "):
                sbn.forward(exportless)

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
