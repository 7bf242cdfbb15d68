"""Memory that must not be touched is not: read-only, immutable, exported as a copy, aliased, freed."""

import sys

import array_api_strict as xp
import foreign
import numpy as np
import pytest

import sbncore as sbn

F32 = np.float32


def everything_written(x, target):
    """Return every call that would write to ``target``, an array as x."""
    saved = sbn.forward(np.array(x))[1]
    dy, ones, plan = np.ones_like(x), np.ones(3, F32), sbn.BatchSampling(2).plan(x.shape)
    return {
        "forward": lambda: sbn.forward(x, plan=plan, out=target),
        "batch_norm": lambda: sbn.batch_norm(x, None, None, training=True, out=target),
        "normalize": lambda: sbn.normalize(x, sbn.Statistics(ones, ones), out=target),
        "backward": lambda: sbn.backward(dy, saved, out=target),
        "repair": lambda: sbn.repair(target, dy, saved, ones, ones),
    }


WAYS = list(everything_written(np.random.default_rng(0).normal(size=(8, 3, 5)).astype(F32), None))


@pytest.fixture
def x(rng):
    return rng.normal(size=(8, 3, 5)).astype(F32)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", [foreign.Array, xp.asarray, foreign.of("jax"), foreign.of("tensorflow")])
def test_read_only_memory_is_not_written(x, way, kind):
    memory = foreign.read_only(x)
    target = kind(memory, copy=False) if kind is xp.asarray else kind(memory)
    with pytest.raises(ValueError, match=r"^(out|dx): expected a writeable array, got a read-only one"):
        everything_written(x, target)[way]()
    assert (memory == x).all()


@pytest.mark.parametrize("which", ["running_mean", "running_var"])
@pytest.mark.parametrize("kind", [foreign.Array, foreign.of("jaxlib"), foreign.of("jax", foreign.Older)])
def test_read_only_statistics_are_not_moved(x, which, kind):
    arrays = {"running_mean": np.zeros(3, F32), "running_var": np.ones(3, F32)}
    arguments = dict(arrays)
    if not issubclass(kind, foreign.Older):
        arguments[which] = kind(foreign.read_only(arrays[which]))
    else:
        arguments[which] = kind(arrays[which])
    with pytest.raises(ValueError, match=f"^{which}: expected a writeable array, got a read-only one"):
        sbn.batch_norm(x, **arguments, training=True)
    assert (arrays["running_mean"] == 0).all() and (arrays["running_var"] == 1).all()
    sbn.batch_norm(x, **arguments)  # evaluation reads them


def test_a_file_mapped_for_reading_is_not_written(tmp_path, x):
    path = tmp_path / "m.bin"
    x.tofile(path)
    out = xp.asarray(np.memmap(path, F32, "r", shape=x.shape), copy=False)
    with pytest.raises(ValueError, match=r"^out: expected a writeable array, got a read-only one"):
        sbn.forward(xp.asarray(x), out=out)
    y, saved = sbn.forward(out)  # it may be read
    assert (np.from_dlpack(y) == sbn.forward(x)[0]).all()
    assert (np.from_dlpack(sbn.backward(out, saved).x) == sbn.backward(x, sbn.forward(x)[1]).x).all()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("kind", "error", "message"), [
    (foreign.Copying, ValueError, "expected a writeable array, got a copy"),
    (foreign.Unwilling, TypeError, "expected an array that DLPack can export, got: the memory is elsewhere"),
])  # fmt: skip
def test_what_would_be_written_to_a_copy_is_refused(x, way, kind, error, message):
    before = x.copy()
    with pytest.raises(error, match=f"^(out|dx): {message}"):
        everything_written(x, kind(before))[way]()
    assert (sbn.forward(kind(x))[0] == sbn.forward(x)[0]).all()  # it may be read


@pytest.mark.parametrize("kind", [foreign.Array, foreign.Older])
def test_writeable_memory_is_written(x, kind):
    """NumPy takes all that comes in a capsule from before DLPack 1.0 for read-only."""
    out, mean, var = np.empty_like(x), np.zeros(3, F32), np.ones(3, F32)
    target = kind(out)
    y, _ = sbn.batch_norm(x, kind(mean), kind(var), training=True, out=target)
    expected = np.zeros(3, F32), np.ones(3, F32)
    assert y is target and (out == sbn.batch_norm(x, *expected, training=True)[0]).all()
    assert (mean == expected[0]).all() and (var == expected[1]).all()


# The way back.


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16])
def test_a_type_without_a_way_back_gets_numpys_arrays(x, dtype):
    x = x.astype(dtype)
    wide = np.float64 if dtype == np.float64 else F32
    mean, var, weight = np.zeros(3, wide), np.ones(3, wide), np.ones(3, wide)
    y, saved = sbn.batch_norm(foreign.Array(x), mean, var, foreign.Array(weight), training=True)
    moved = np.zeros(3, wide), np.ones(3, wide)
    expected, expected_saved = sbn.batch_norm(x, *moved, weight, training=True)
    assert type(y) is np.ndarray and y.dtype == dtype and (y == expected).all()
    assert (mean == moved[0]).all() and (var == moved[1]).all()
    grads, expected_grads = sbn.backward(foreign.Array(x), saved), sbn.backward(x, expected_saved)
    assert type(grads.x) is type(grads.weight) is np.ndarray and (grads.x == expected_grads.x).all()
    assert type(saved.statistics.mean) is np.ndarray


def test_a_framework_that_cannot_take_a_dtype_is_found_out_before_anything_is_written(x, monkeypatch):
    class Framework:
        @staticmethod
        def from_dlpack(array):
            seen.append(mean.copy())
            if array.dtype == np.float16:
                raise TypeError("no halves")
            return foreign.Array(np.from_dlpack(array))

    seen = []
    monkeypatch.setitem(sys.modules, "elsewhere", Framework)
    kind = foreign.of("elsewhere")
    mean, var = np.zeros(3, F32), np.ones(3, F32)
    y, _ = sbn.batch_norm(kind(x.astype(np.float16)), mean, var, training=True)
    assert type(y) is np.ndarray and y.dtype == np.float16 and mean.any()
    assert len(seen) == 1 and not seen[0].any()
    assert type(sbn.forward(kind(x))[0]) is foreign.Array


# Statistics that overlap.


@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize("case", ["itself", "shifted", "weight", "bias", "x", "residual"])
def test_running_statistics_have_memory_of_their_own(x, case, times):
    buffer = np.arange(4, dtype=F32)
    mean, var, weight, bias = (np.ones(3, F32) for _ in range(4))
    residual = x.copy()
    arguments = {"weight": weight, "bias": bias, "residual": residual}
    if times == 2:  # with what a first call remembers
        for _ in range(2):
            sbn.batch_norm(x, mean.copy(), var.copy(), **arguments, training=True)
    if case == "itself":
        mean = var
    elif case == "shifted":
        mean, var = buffer[:3], buffer[1:]
    else:
        mean = {"x": x[0, 0, :3], "residual": residual[0, 0, :3], **arguments}[case]
        mean = mean[0, 0, :3] if mean.ndim == 3 else mean
    before = [array.copy() for array in (x, mean, var, weight, bias, residual)]
    with pytest.raises(ValueError, match=r"^running_mean, running_var: expected memory of their own"):
        sbn.batch_norm(x, mean, var, **arguments, training=True)
    for array, old in zip((x, mean, var, weight, bias, residual), before, strict=True):
        assert (array == old).all()
    sbn.batch_norm(x, mean, var, **arguments)  # evaluation only reads


# PyTorch's storages, which their owners resize: FSDP2, and whoever frees activations.


def with_and_without_the_adapter(code):
    """Run code with sbncore's own view of tensors, and with the adapter's."""
    from sbncore import arrays
    from sbncore.adapters.torch import exchange

    assert arrays.FRAMEWORKS[exchange.torch.Tensor].view is exchange.view_of
    code()
    with pytest.MonkeyPatch.context() as without:
        without.setattr(arrays, "FRAMEWORKS", {})
        code()


def test_storages_stay_resizable():
    torch = pytest.importorskip("torch")

    def functions():
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            x, residual, dy, out, dx = (torch.randn(8, 3, 5).to(dtype) for _ in range(5))
            mean, var, weight, bias = torch.zeros(3), torch.ones(3), torch.ones(3), torch.zeros(3)
            _, saved = sbn.batch_norm(
                x, mean, var, weight, bias, True, residual=residual, out=out, activation="relu"
            )
            sbn.backward(dy, saved, out=dx)
            for tensor in (x, residual, dy, out, dx, mean, var, weight, bias):
                tensor.untyped_storage().resize_(0)

    with_and_without_the_adapter(functions)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("last", [False, True])
def test_layers_leave_storages_resizable(dtype, last):
    torch = pytest.importorskip("torch")
    from sbncore.adapters.torch import SampledBatchNorm2d

    layer = SampledBatchNorm2d(3, sampler=sbn.FeatureSampling(1 / 4), activation="relu")
    x = torch.randn(8, 3, 6, 5).to(getattr(torch, dtype))
    x = x.to(memory_format=torch.channels_last) if last else x
    x.requires_grad_()
    residual = torch.randn_like(x)
    y = layer(x, residual)
    size = x.untyped_storage().size()
    keep = x.detach().clone()
    x.untyped_storage().resize_(0)  # freed till backward, as FSDP2 and offloading do
    with torch.no_grad(), torch.autograd._unsafe_preserve_version_counter(x):
        x.untyped_storage().resize_(size)
        x.copy_(keep)
    y.backward(torch.randn_like(y))
    for tensor in (x, residual, y, x.grad, layer.weight, layer.weight.grad, layer.running_mean):
        tensor.untyped_storage().resize_(0)


def test_freed_memory_is_not_read():
    torch = pytest.importorskip("torch")

    def functions():
        x = torch.randn(8, 3, 5)
        keep, dy = x.clone(), torch.randn(8, 3, 5)
        _, saved = sbn.forward(x)
        expected = sbn.backward(dy, saved).x
        size = x.untyped_storage().size()
        x.untyped_storage().resize_(0)
        for call in (lambda: sbn.forward(x), lambda: sbn.backward(dy, saved)):
            with pytest.raises(TypeError, match="x: expected an array that DLPack can export, got: a tensor"):
                call()
        x.untyped_storage().resize_(size)
        x.copy_(keep)
        assert torch.equal(sbn.backward(dy, saved).x, expected)
        x.data = torch.empty(0)
        with pytest.raises(ValueError, match="saved: expected x of shape"):
            sbn.backward(dy, saved)

    with_and_without_the_adapter(functions)


def test_a_layer_does_not_read_freed_memory():
    torch = pytest.importorskip("torch")
    from sbncore.adapters.torch import SampledBatchNorm2d

    x = torch.randn(8, 3, 6, 5).requires_grad_()
    layer = SampledBatchNorm2d(3, sampler=sbn.FeatureSampling(1 / 4))
    for dy in (torch.ones(8, 3, 6, 5), torch.ones(()).expand(8, 3, 6, 5)):
        y = layer(x + 0)
        y.grad_fn.saved_tensors[0].untyped_storage().resize_(0)
        with pytest.raises((RuntimeError, TypeError), match="a tensor without memory"):
            y.backward(dy)


@pytest.mark.parametrize("which", ["running_mean", "running_var"])
def test_running_statistics_that_repeat_their_memory_are_refused(which):
    """Each channel would be written over the others'."""
    x = np.random.default_rng(0).normal(size=(8, 3, 5)).astype(np.float32)
    running = {"running_mean": np.zeros(3, np.float32), "running_var": np.ones(3, np.float32)}
    running[which] = np.lib.stride_tricks.as_strided(np.full(1, 7, np.float32), (3,), (0,))
    for _ in range(2):
        with pytest.raises(ValueError, match="memory of their own, got arrays that repeat it"):
            sbn.batch_norm(x, **running, training=True)
    assert (running[which] == 7).all()


class TestTorchsLayer:
    torch = None

    @pytest.fixture(autouse=True)
    def _torch(self):
        type(self).torch = pytest.importorskip("torch")

    @pytest.mark.parametrize("which", ["running_mean", "running_var"])
    def test_freed_and_repeated_running_statistics(self, which):
        from sbncore.adapters.torch import SampledBatchNorm2d

        torch = self.torch
        layer, x = SampledBatchNorm2d(3), torch.randn(8, 3, 5, 5)
        setattr(layer, which, torch.ones(1).expand(3))
        before = [buffer.clone() for buffer in layer.buffers()]
        with pytest.raises(ValueError, match=f"{which}: expected distinct elements"):
            layer(x)
        assert all((a == b).all() for a, b in zip(layer.buffers(), before, strict=True))
        freed = torch.ones(3)
        freed.untyped_storage().resize_(0)
        setattr(layer.eval(), which, freed)
        with pytest.raises(RuntimeError, match=f"{which}: expected a tensor with memory"):
            layer(x)

    def test_forward_mode_and_tracing_are_refused_before_anything_moves(self):
        from sbncore.adapters.torch import SampledBatchNorm2d

        torch = self.torch
        layer, x = SampledBatchNorm2d(3), torch.randn(8, 3, 5, 5)
        before = [buffer.clone() for buffer in layer.buffers()]
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(x, x)
            with pytest.raises(RuntimeError, match="does not support forward mode"):
                layer(dual)
            with pytest.raises(TypeError, match="x: expected a tensor that neither forward mode"):
                sbn.forward(dual)
            with pytest.raises(TypeError, match="weight: expected a tensor that neither forward mode"):
                sbn.forward(x, torch.autograd.forward_ad.make_dual(torch.ones(3), torch.ones(3)))
        with pytest.raises(TypeError, match="x: expected a tensor that neither forward mode"):
            torch.jit.trace(lambda x: sbn.forward(x)[0], x, check_trace=False)
        assert all((a == b).all() for a, b in zip(layer.buffers(), before, strict=True))
