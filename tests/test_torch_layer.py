"""The PyTorch layers: with Full they are torch's own in all that a user sees; with a sampler, sbncore's."""

import copy
import io
import itertools
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import TOLERANCE
from product import SAMPLERS

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

import sbncore as sbn  # noqa: E402
from sbncore import arrays, layout  # noqa: E402
from sbncore.adapters import torch as sbn_torch  # noqa: E402
from sbncore.adapters.torch import exchange, tensors  # noqa: E402

PAIRS = {
    1: (nn.BatchNorm1d, sbn_torch.SampledBatchNorm1d),
    2: (nn.BatchNorm2d, sbn_torch.SampledBatchNorm2d),
    3: (nn.BatchNorm3d, sbn_torch.SampledBatchNorm3d),
}
SHAPES = {"NC": (1, (9, 5)), "NCL": (1, (4, 5, 7)), "NCHW": (2, (4, 5, 3, 6)), "NCDHW": (3, (3, 5, 2, 3, 4))}
KINDS = {name: getattr(torch, name) for name in TOLERANCE}
FS = sbn.FeatureSampling(1 / 4)


def parameter_of(dtype):
    return torch.float64 if dtype == "float64" else torch.float32


def twins(dims, channels=5, **options):
    """torch's layer in float64, the judge, and ours in another dtype with the same parameters."""
    theirs, ours = PAIRS[dims]
    dtype = options.pop("dtype", torch.float64)
    judge, layer = theirs(channels, dtype=torch.float64, **options), ours(channels, dtype=dtype, **options)
    with torch.no_grad():
        for name, parameter in judge.named_parameters():
            parameter.copy_(torch.randn(channels).to(dtype))
            getattr(layer, name).copy_(parameter)
    return judge, layer


def close(a, b, dtype):
    wrong = (a.detach().double() - b.detach()).abs().max().item() if b.numel() else 0
    assert wrong <= TOLERANCE[dtype] * max(1, b.abs().max().item() if b.numel() else 0)


def check(judge, layer, x, dtype, steps=2):
    """Outputs, gradients, running statistics and the counter, in training and then in evaluation."""
    for training in (*[True] * steps, False):
        judge.train(training)
        layer.train(training)
        leaf = x.detach().requires_grad_()
        leaf64 = x.detach().double().requires_grad_()
        y, y64 = layer(leaf), judge(leaf64)
        dy = torch.randn_like(y64).to(y.dtype)
        for each in (judge, layer):
            each.zero_grad()
        y.backward(dy)
        y64.backward(dy.double())
        assert y.dtype == x.dtype and y.shape == x.shape
        close(y, y64, dtype)
        close(leaf.grad, leaf64.grad, dtype)
        for (name, mine), (other, true) in zip(
            layer.named_parameters(), judge.named_parameters(), strict=True
        ):
            assert name == other and (mine.grad is None) == (true.grad is None)
            if true.grad is not None:
                close(mine.grad, true.grad, dtype)
        for (name, mine), (other, true) in zip(
            layer.state_dict().items(), judge.state_dict().items(), strict=True
        ):
            assert name == other
            close(mine, true.double(), dtype)
    return y


@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize("dims, shape", SHAPES.values(), ids=SHAPES)
def test_full_is_torchs_layer(dtype, dims, shape):
    torch.manual_seed(0)
    for options in (
        {"momentum": 0.3}, {"momentum": None}, {"affine": False}, {"track_running_stats": False}
    ):  # fmt: skip
        judge, layer = twins(dims, dtype=parameter_of(dtype), **options)
        check(judge, layer, (torch.randn(shape) * 2 + 1).to(KINDS[dtype]), dtype)


@pytest.mark.parametrize("dims, shape", [SHAPES["NCHW"], SHAPES["NCDHW"]])
def test_channels_last_is_preserved(dims, shape):
    memory = torch.channels_last if dims == 2 else torch.channels_last_3d
    x = torch.randn(shape).to(memory_format=memory)
    y = check(*twins(dims, dtype=torch.float32), x, "float32")
    assert y.is_contiguous(memory_format=memory)


def test_strided_and_expanded_inputs():
    base = torch.randn(8, 10, 6, 6)
    for x in (
        base[::2, ::2], base.transpose(2, 3)[:, 5:], base[:1, :5].expand(6, 5, 6, 6), base[:, :5].flip(3),
        base[:, :5, :1, :1].expand(8, 5, 3, 3), base[:, :5, ::3, 1:], base.permute(0, 2, 1, 3)[:, :5],
    ):  # fmt: skip
        check(*twins(2, dtype=torch.float32), x, "float32")


def test_running_statistics_that_are_no_dense_vector():
    judge, layer = twins(2, dtype=torch.float32)
    for each in (judge, layer):
        for name in ("running_mean", "running_var"):
            setattr(each, name, torch.stack([getattr(each, name)] * 2, 1)[:, 0])
    assert not layer.running_mean.is_contiguous()
    check(judge, layer, torch.randn(4, 5, 3, 3), "float32")


def test_frozen_parameters_and_inputs():
    judge, layer = twins(2, dtype=torch.float32)
    for each in (judge, layer):
        each.weight.requires_grad_(False)
    check(judge, layer, torch.randn(4, 5, 3, 3), "float32")
    y = layer.train()(torch.randn(4, 5, 3, 3))
    y.sum().backward()
    assert layer.weight.grad is None and layer.bias.grad is not None
    for parameter in layer.parameters():
        parameter.requires_grad_(False)
    assert not layer(torch.randn(4, 5, 3, 3)).requires_grad


def test_an_empty_batch_moves_only_the_counter():
    judge, layer = twins(2, dtype=torch.float32)
    check(judge, layer, torch.randn(0, 5, 3, 3), "float32")
    assert layer.num_batches_tracked == 2 and (layer.running_var == 1).all()


def test_without_bias():
    made = sbn_torch.SampledBatchNorm2d(5, bias=False)
    assert made.bias is None and "bias" not in made.state_dict() and "bias=False" in repr(made)
    x = torch.randn(4, 5, 3, 3)
    assert torch.allclose(made(x), nn.BatchNorm2d(5)(x), atol=1e-5)


def test_state_dicts_are_exchanged_strictly():
    theirs, ours = nn.BatchNorm2d(5), sbn_torch.SampledBatchNorm2d(5, sampler=FS)
    theirs(torch.randn(4, 5, 3, 3))
    ours.load_state_dict(theirs.state_dict(), strict=True)
    assert ours.num_batches_tracked == 1 and torch.equal(ours.running_var, theirs.running_var)
    ours(torch.randn(4, 5, 8, 8))
    theirs.load_state_dict(ours.state_dict(), strict=True)
    assert theirs.num_batches_tracked == 2 and list(theirs.state_dict()) == list(ours.state_dict())
    untracked = sbn_torch.SampledBatchNorm2d(5, sampler=FS, track_running_stats=False)
    untracked(torch.randn(4, 5, 8, 8))
    assert list(untracked.state_dict()) == ["weight", "bias"] and untracked.untracked == 1


def test_copies_and_pickles_go_on_alike():
    sampler = sbn.Mixture([(0.5, sbn.BatchSampling(2)), (0.5, sbn.NaiveSampling(1 / 4))])
    layer = sbn_torch.SampledBatchNorm2d(5, sampler=sampler, layer=3, seed=2**64 - 1, activation="relu")
    x = torch.randn(4, 5, 8, 8)
    layer(x)
    stored = io.BytesIO()
    torch.save(layer, stored)
    stored.seek(0)
    twins = [copy.deepcopy(layer), torch.load(stored, weights_only=False)]
    y = layer(x)
    for twin in twins:
        assert twin.sampler == sampler and torch.equal(twin(x), y)
        assert torch.equal(twin.running_var, layer.running_var)


def test_what_a_layer_says_of_itself():
    layer = sbn_torch.SampledBatchNorm2d(
        5, sampler=FS, layer=3, activation="relu", gradient="detached", seed=7
    )
    assert repr(layer).startswith("SampledBatchNorm2d(5, eps=1e-05, momentum=0.1, affine=True")
    assert repr(layer).endswith(
        "sampler=FeatureSampling(amount=0.25, pattern='run', place='sample', at_least=1), layer=3, seed=7, "
        "gradient='detached', activation='relu')"
    )
    assert isinstance(layer, nn.BatchNorm2d)


def test_reset_and_devices():
    layer = sbn_torch.SampledBatchNorm2d(5, sampler=FS)
    layer(torch.randn(4, 5, 8, 8) + 3)
    nn.init.zeros_(layer.weight)
    layer.reset_parameters()
    assert (layer.weight == 1).all() and layer.num_batches_tracked == 0 and (layer.running_mean == 0).all()
    meta = sbn_torch.SampledBatchNorm2d(5, sampler=FS, device="meta")
    assert meta(torch.empty(4, 5, 8, 8, device="meta")).shape == (4, 5, 8, 8)
    assert meta.to_empty(device="cpu").weight.device.type == "cpu"
    assert layer.double()(torch.randn(4, 5, 8, 8, dtype=torch.float64)).dtype == torch.float64


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("last", [False, True])
def test_a_sampler_draws_as_batch_norm_does(name, last):
    """Bit for bit: the layer adds nothing to the engine."""
    layer = sbn_torch.SampledBatchNorm2d(
        5, sampler=SAMPLERS[name], seed=4, layer=9, activation="relu", own_rows=True
    )
    mean, var = np.zeros(5, np.float32), np.ones(5, np.float32)
    for step in range(3):
        x, residual, dy = torch.randn(3, 8, 5, 6, 6)
        if last:
            x, residual, dy = (a.to(memory_format=torch.channels_last) for a in (x, residual, dy))
        leaf, other = x.clone().requires_grad_(), residual.clone().requires_grad_()
        y = layer(leaf, other)
        y.backward(dy)
        expected, saved = sbn.batch_norm(
            x.numpy(), mean, var, np.ones(5, np.float32), np.zeros(5, np.float32), True, 0.1, 1e-5,
            sampler=SAMPLERS[name], seed=4, layer=9, step=step, activation="relu", residual=residual.numpy(),
        )  # fmt: skip
        grads = sbn.backward(dy.numpy(), saved)
        for mine, true in ((y, expected), (leaf.grad, grads.x), (other.grad, grads.residual)):
            assert (mine.detach().numpy() == true).all()
        assert (layer.running_mean.numpy() == mean).all() and (layer.running_var.numpy() == var).all()


def test_layers_steps_and_seeds_draw_differently():
    x = torch.randn(8, 5, 16, 16)
    base = {"sampler": FS, "layer": 0, "seed": 0}
    others = ({}, {"layer": 1}, {"seed": 1})
    outputs = [sbn_torch.SampledBatchNorm2d(5, **base | other)(x) for other in others]
    layer = sbn_torch.SampledBatchNorm2d(5, **base)
    outputs += [layer(x), layer(x)]
    same = [torch.equal(a, b) for a, b in itertools.combinations(outputs, 2)]
    assert same == [i == 0 and j == 3 for i, j in itertools.combinations(range(5), 2)]


def test_a_sampler_may_be_set_at_any_time():
    layer = sbn_torch.SampledBatchNorm2d(5, sampler=FS)
    layer.sampler = sbn.Full()
    x = torch.randn(8, 5, 6, 6)
    assert torch.allclose(layer(x), nn.BatchNorm2d(5)(x), atol=1e-5)
    with pytest.raises(TypeError, match="sampler: expected a Sampler, got float"):
        layer.sampler = 0.5


def test_skip_nonfinite_keeps_a_channel():
    layer = sbn_torch.SampledBatchNorm2d(5, skip_nonfinite=True)
    x = torch.randn(8, 5, 6, 6)
    x[0, 2] = torch.inf
    layer(x)
    assert layer.running_mean[2] == 0 and layer.running_var[2] == 1 and (layer.running_var != 1).sum() == 4


BAD = {
    "dimensions": lambda: torch.randn(4, 5),
    "channels": lambda: torch.randn(4, 6, 3, 3),
    "a single value": lambda: torch.randn(1, 5, 1, 1),
    "dtype": lambda: torch.randn(4, 5, 3, 3, dtype=torch.float64),
    "integers": lambda: torch.ones(4, 5, 3, 3, dtype=torch.int64),
    "complex": lambda: torch.ones(4, 5, 3, 3, dtype=torch.complex64),
    "no tensor": lambda: np.ones((4, 5, 3, 3), np.float32),
    "none": lambda: None,
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_as_torchs_layer_does_and_moves_nothing(name, training):
    theirs, ours = nn.BatchNorm2d(5).train(training), sbn_torch.SampledBatchNorm2d(5).train(training)
    raised = []
    for layer in (theirs, ours):
        try:
            layer(BAD[name]())
        except Exception as complaint:
            raised.append(complaint)
        else:
            raised.append(None)
    assert type(raised[0]) is type(raised[1]), raised
    if raised[1] is not None:
        fresh = sbn_torch.SampledBatchNorm2d(5).state_dict()
        assert all(torch.equal(a, b) for a, b in zip(ours.state_dict().values(), fresh.values(), strict=True))


def test_further_refusals():
    layer = sbn_torch.SampledBatchNorm2d(5)
    with pytest.raises(ValueError, match=r"residual: expected shape \(4, 5, 3, 3\) as input"):
        layer(torch.randn(4, 5, 3, 3), torch.randn(1, 5, 3, 3))
    with pytest.raises(RuntimeError, match="residual: expected dtype float32 as x, got float64"):
        layer(torch.randn(4, 5, 3, 3), torch.randn(4, 5, 3, 3).double())
    with pytest.raises(RuntimeError, match=r"input: expected 5 channels, got shape \(4, 6, 3, 3\)"):
        layer(torch.randn(4, 6, 3, 3))
    with pytest.raises(ValueError, match="BatchSampling: expected a count of at most the 4 samples"):
        sbn_torch.SampledBatchNorm2d(5, sampler=sbn.BatchSampling(8))(torch.randn(4, 5, 3, 3))
    assert layer.num_batches_tracked == 0
    for complaint, kind, options in (
        ("sampler: expected a Sampler, got str", TypeError, {"sampler": "full"}),
        ("gradient: expected one of .*, got 'none'", ValueError, {"gradient": "none"}),
        ("activation: expected one of .*, got 'gelu'", ValueError, {"activation": "gelu"}),
        ("seed: expected an integer, got 0.5", TypeError, {"seed": 0.5}),
        ("layer: expected an integer, got None", TypeError, {"layer": None}),
    ):
        with pytest.raises(kind, match=complaint):
            sbn_torch.SampledBatchNorm2d(5, **options)
    with pytest.raises(ValueError, match="gradient: 'sampled' expects a sample of the batch"):
        virtual = sbn_torch.SampledBatchNorm2d(5, sampler=sbn.VirtualSamples(2), gradient="sampled")
        virtual(torch.randn(4, 5, 3, 3))


# The short way to the engine and DLPack's.


@pytest.mark.parametrize("dtype", KINDS)
def test_the_short_way_is_dlpacks(dtype, monkeypatch):
    tensors = [torch.randn(4, 6, 8), torch.randn(4, 6, 8)[::2, :, 1::3], torch.randn(4, 1).expand(4, 6)]
    tensors += [torch.randn(0, 3), nn.Parameter(torch.randn(5)), torch.randn(3, 4).t()]
    for tensor in tensors:
        given = tensor.detach().to(KINDS[dtype])
        given = nn.Parameter(given) if isinstance(tensor, nn.Parameter) else given
        given.requires_grad_(False)
        short = arrays.borrow(given, "x")
        assert exchange.view_of(given) is not None
        back = arrays.give(short, given)
        with monkeypatch.context() as without:
            without.setattr(arrays, "FRAMEWORKS", {})
            long = arrays.borrow(given, "x")
            long_back = arrays.give(long.copy(), given)
        assert short.dtype == long.dtype and short.shape == long.shape
        assert arrays.address(short) == arrays.address(long) or not given.numel()
        assert not given.numel() or short.strides == long.strides
        assert back.dtype == long_back.dtype == given.dtype and torch.equal(back, long_back)
        assert back.data_ptr() == given.data_ptr()


def test_what_has_no_short_way_is_refused_alike():
    for tensor in (torch.ones(4, 3).to_sparse(), torch.ones(4, 3, dtype=torch.int64)):
        assert exchange.view_of(tensor) is None
        with pytest.raises(TypeError, match="x: expected"):
            sbn.forward(tensor)


def test_a_compilers_layout_is_the_engines():
    base = torch.randn(4, 6, 8, 10)
    last = base.to(memory_format=torch.channels_last)
    views = [
        base, base[:, :, :1, :1], base[:, :1], base[:1], last, base[:, ::2], base.permute(0, 2, 3, 1),
        base[:, :, ::2], base.transpose(1, 3), base[..., :1], base[:0], base.expand(4, 6, 8, 10),
        base[:1].expand(3, 6, 8, 10), base[:, :1].expand(4, 5, 8, 10), base[:, :, 0, 0], last[:, :4],
        base.permute(3, 2, 1, 0), base[:, :, :1, :1].expand(4, 6, 2, 2),
    ]  # fmt: skip
    for view in views:
        assert tensors.layout_of(view) == layout.layout_of(view.numpy(), 1), (view.shape, view.stride())


def test_eps_must_be_positive_in_training():
    for eps in (0.0, -1.0):
        with pytest.raises(ValueError, match="eps: expected a positive number"):
            sbn_torch.SampledBatchNorm2d(5, eps=eps)(torch.randn(4, 5, 3, 3))


def test_inference_mode_and_no_grad():
    for context in (torch.inference_mode, torch.no_grad):
        x, (judge, layer) = torch.randn(4, 5, 3, 3), twins(2)
        with context():
            x = x.double()
            assert torch.allclose(layer(x), judge(x)) and not layer(x).requires_grad
            judge(x)
            assert torch.allclose(layer.running_var, judge.running_var)


@pytest.mark.parametrize("backend", [None, "aot_eager"])
def test_an_evaluations_gradient_is_right_though_training_moved_the_statistics(backend):
    """Torch's own layer gets this wrong without a word."""
    layer = sbn_torch.SampledBatchNorm2d(5).eval()
    torch._dynamo.reset()
    call = layer if backend is None else torch.compile(layer, backend=backend)
    x = torch.randn(4, 5, 3, 3, requires_grad=True)
    dy = torch.randn(4, 5, 3, 3)
    layer.running_var += 3
    (expected,) = torch.autograd.grad(layer(x), x, dy)
    y = call(x)
    trained = layer.train()(x)
    (x.grad,) = torch.autograd.grad((y, trained), x, (dy, torch.zeros_like(dy)))
    assert torch.allclose(x.grad, expected, atol=1e-6)


def test_the_adapter_loads_llvm_only_with_a_call_on_the_cpu():
    code = (
        "import sys, torch; from sbncore.adapters.torch import SampledBatchNorm2d as L;"
        "assert 'llvmlite' not in sys.modules; L(3)(torch.randn(2, 3, 4, 4));"
        "assert 'llvmlite' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])
