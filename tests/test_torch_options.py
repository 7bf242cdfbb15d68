"""A layer's options, and what it refuses: checked when set, and whatever is refused has changed nothing."""

import copy
import warnings

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from torch import fx, nn  # noqa: E402

import sbncore as sbn  # noqa: E402
from sbncore.adapters.torch import SampledBatchNorm1d, SampledBatchNorm2d, VirtualBatch, refusals  # noqa: E402
from sbncore.adapters.torch.names import has_prior  # noqa: E402

FS = sbn.FeatureSampling(1 / 4)
BAD = {
    "eps": [-1.0, float("nan"), float("inf"), "1e-5", None, True],
    "momentum": [5.0, -0.1, float("nan"), "0.1", True, torch.tensor(0.1)],
    "sampler": [0.5, None, "full", sbn.Full],
    "gradient": ["detachd", None, 1, True],
    "activation": ["gelu", "ReLU", True, nn.ReLU],
    "seed": [0.5, None, "1", True],
    "layer": [1.0, None, "1", False],
    "skip_nonfinite": ["no", 0, None],
    "own_rows": ["no", 1, None],
    "process_group": ["worlds", 0, 1.5, []],
}
GOOD = {
    "eps": 1e-3, "momentum": None, "sampler": FS, "gradient": "detached", "activation": "relu", "seed": -3,
    "layer": 2**64, "skip_nonfinite": True, "own_rows": True, "process_group": "world",
}  # fmt: skip


def state_of(layer):
    plain = {name: value for name, value in vars(layer).items() if not isinstance(value, dict)}
    return (
        plain
        | {name: t.clone() for name, t in layer.state_dict().items()}
        | {"untracked": layer.untracked.clone()}
    )


def same(a, b):
    return a.keys() == b.keys() and all(
        torch.equal(a[key], b[key]) if isinstance(a[key], torch.Tensor) else a[key] is b[key] for key in a
    )


def refused(layer, *arguments):
    """Call it, twice: it raises the same, and nothing has moved."""
    before, said = state_of(layer), []
    dense = [a for a in arguments if a.layout is torch.strided and not a.is_meta]
    inputs = [a.clone() for a in dense]
    for _ in range(2):
        with pytest.raises((TypeError, ValueError, RuntimeError, NotImplementedError)) as complaint:
            layer(*arguments)
        said.append((complaint.type, str(complaint.value)))
        assert same(state_of(layer), before)
    assert said[0] == said[1]
    assert all(torch.equal(a, b) for a, b in zip(inputs, dense, strict=True))
    return said[0]


@pytest.mark.parametrize("name", BAD)
def test_options_are_checked_when_they_are_set_by_one_rule(name):
    layer = SampledBatchNorm2d(5)
    before = state_of(layer)
    for value in BAD[name]:
        said = []
        for change in (
            lambda value=value: setattr(layer, name, value),
            lambda value=value: SampledBatchNorm2d(5, **{name: value}),
        ):
            with pytest.raises((TypeError, ValueError), match=f"^{name}: expected") as complaint:
                change()
            said.append((complaint.type, str(complaint.value)))
        if name not in ("own_rows", "process_group"):
            arrays = np.ones((4, 5, 3, 3)), np.zeros(5), np.ones(5)
            options = {"training": True, name: value}
            if not (name == "momentum" and isinstance(value, torch.Tensor)):
                with pytest.raises((TypeError, ValueError), match=name) as complaint:
                    sbn.batch_norm(*arrays, **options)
                said.append((complaint.type, str(complaint.value)))
                assert (arrays[1] == 0).all() and (arrays[2] == 1).all()
        assert len({*said}) == 1, said
    assert same(state_of(layer), before)
    setattr(layer, name, GOOD[name])
    assert getattr(layer, name) == getattr(SampledBatchNorm2d(5, **{name: GOOD[name]}), name) == GOOD[name]


def test_an_option_set_later_is_as_one_given_first():
    x, dy = torch.randn(2, 4, 5, 6, 6)
    for name in ("eps", "momentum", "sampler", "gradient", "activation", "seed", "layer"):
        first = SampledBatchNorm2d(5, **{"sampler": FS, name: GOOD[name]})
        later = SampledBatchNorm2d(5, sampler=sbn.Full() if name == "sampler" else FS)
        setattr(later, name, GOOD[name])
        results = []
        for layer in (first, later):
            leaf = x.clone().requires_grad_()
            y = layer(leaf)
            y.backward(dy)
            results.append((y.detach(), leaf.grad, layer.running_var))
        for a, b in zip(*results, strict=True):
            assert torch.equal(a, b)


def test_options_that_do_not_agree():
    layer = SampledBatchNorm2d(5, gradient="sampled", sampler=FS)
    with pytest.raises(ValueError, match="gradient: 'sampled' expects a sample of the batch"):
        layer.sampler = sbn.VirtualSamples(2)
    assert layer.sampler == FS
    layer = SampledBatchNorm2d(5, sampler=sbn.VirtualSamples(2))
    with pytest.raises(ValueError, match="gradient: 'sampled' expects a sample of the batch"):
        layer.gradient = "sampled"
    assert layer.gradient == "exact"
    layer.configure(**GOOD | {"gradient": "sampled"})
    assert layer.sampler == FS and layer.gradient == "sampled"


def test_options_are_what_kernels_take():
    layer = SampledBatchNorm2d(5, eps=np.float32(1), momentum=1)
    assert type(layer.eps) is type(layer.momentum) is float
    layer.eps = 1
    assert type(layer.eps) is float
    assert [has_prior(s) for s in (FS, sbn.Prior(0.5), sbn.Mixture([(1.0, sbn.Prior(0.5))]))] == [
        False, True, True,
    ]  # fmt: skip


# --- virtual samples without virtual rows ---


def test_virtual_samples_expect_a_virtual_batch():
    """Four real images were taken for synthetic ones."""
    layer = SampledBatchNorm2d(5, sampler=sbn.VirtualSamples(4))
    x = torch.randn(8, 5, 4, 4)
    kind, text = refused(layer, x)
    assert kind is ValueError and "expects a VirtualBatch around the model" in text and "own_rows" in text
    model = VirtualBatch(layer, 4)
    assert model(x).shape == x.shape and layer.num_batches_tracked == 1
    refused(layer, x)  # its inner model alone
    layer.own_rows = True
    layer(x)
    assert layer.num_batches_tracked == 2
    untracked = SampledBatchNorm2d(5, sampler=sbn.VirtualSamples(4), track_running_stats=False)
    assert refused(untracked.eval(), x)[0] is ValueError  # nobody appends virtual rows in evaluation


def test_virtual_samples_expect_the_batchs_own_rows():
    class Folded(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = SampledBatchNorm1d(3, sampler=sbn.VirtualSamples(2))

        def forward(self, x):
            return self.norm(x.flatten(0, 1))

    model = VirtualBatch(Folded(), 2)
    with pytest.raises(ValueError, match="got one of 2 in 8 rows, and an input of 32"):
        model(torch.randn(6, 4, 3))
    assert model.model.norm.num_batches_tracked == model.num_batches_tracked == 0


def test_virtual_samples_are_refused_by_a_compiler_too():
    torch._dynamo.reset()
    layer = SampledBatchNorm2d(5, sampler=sbn.VirtualSamples(4))
    compiled = torch.compile(layer, backend="aot_eager")
    with pytest.raises(Exception, match="expects a VirtualBatch"):
        compiled(torch.randn(8, 5, 4, 4))
    assert layer.num_batches_tracked == 0


# --- memory ---


def test_negative_views_have_their_sign():
    z = torch.randn(4, 5, 3, 3, dtype=torch.complex128)
    x, dy = z.conj().imag, torch.randn(4, 5, 3, 3, dtype=torch.complex128).conj().imag
    assert x.is_neg() and dy.is_neg()
    vector = torch._neg_view(torch.arange(1.0, 6.0).double())
    for options in ({}, {"sampler": FS, "activation": "relu"}, {"sampler": sbn.NaiveSampling(1 / 2)}):
        results = []
        for resolved in (False, True):
            of = (lambda t: t.resolve_neg().clone()) if resolved else (lambda t: t)
            layer = SampledBatchNorm2d(5, **options).double()
            layer.weight = nn.Parameter(of(vector))
            layer.running_mean = of(torch._neg_view(torch.ones(5).double()))
            leaf, other = of(x).detach().requires_grad_(), of(dy).detach().requires_grad_()
            y = layer(leaf, other)
            y.backward(of(dy))
            results.append([y.detach(), leaf.grad, other.grad, layer.weight.grad, layer.bias.grad])
            results[-1] += [layer.running_mean.clone(), layer.running_var]
        for a, b in zip(*results, strict=True):
            assert torch.allclose(a, b, rtol=1e-12, atol=1e-12)


def test_storages_stay_resizable():
    for dtype, sampler in (
        (torch.float32, FS), (torch.bfloat16, FS), (torch.float32, sbn.NaiveSampling(1 / 2)),
    ):  # fmt: skip
        layer = SampledBatchNorm2d(5, sampler=sampler)
        base = torch.randn(4, 5, 6, 6).to(dtype)
        x = base.detach().requires_grad_()
        y = layer(x)
        y.sum().backward()
        layer.eval()(x.detach())
        for tensor in (base, x.grad, y, layer.weight, layer.weight.grad, layer.running_mean):
            assert tensor.untyped_storage().resizable()
        with torch.no_grad():
            y.untyped_storage().resize_(0)


def aliased():
    one = torch.ones(4)
    yield "running_var", "running_mean", {"running_mean": one, "running_var": one}
    both = torch.ones(7)
    yield "running_var", "running_mean", {"running_mean": both[:4], "running_var": both[3:]}
    yield "running_var", "running_mean", {"running_mean": both[::2], "running_var": both[:4]}
    weight = nn.Parameter(torch.ones(6))
    yield "running_mean", "weight", {"weight": nn.Parameter(weight[:4]), "running_mean": weight.detach()[2:]}
    yield "running_var", "bias", {"bias": nn.Parameter(weight[:4]), "running_var": weight.detach()[:4]}


@pytest.mark.parametrize("case", [*aliased()], ids=lambda case: "-".join(case[:2]))
def test_statistics_that_share_memory_are_refused(case):
    name, other, vectors = case
    for sampler in (sbn.Full(), sbn.NaiveSampling(1 / 2)):
        layer = SampledBatchNorm2d(4, sampler=sampler)
        for key, vector in vectors.items():
            setattr(layer, key, vector)
        kind, text = refused(layer, torch.randn(4, 4, 3, 3))
        assert kind is ValueError and text.startswith(f"{name}: expected memory apart from {other}'s")


def test_vectors_beside_one_another_are_welcome():
    for table in (torch.ones(4, 5).unbind(), torch.ones(5, 4).unbind(1)):
        layer = SampledBatchNorm2d(5)
        layer.weight, layer.bias = nn.Parameter(table[0]), nn.Parameter(table[1])
        layer.running_mean, layer.running_var = table[2:]
        plain = SampledBatchNorm2d(5)
        nn.init.ones_(plain.bias)
        nn.init.ones_(plain.running_mean)
        x = torch.randn(4, 5, 3, 3)
        assert torch.equal(layer(x), plain(x))
        assert torch.equal(layer.running_mean, plain.running_mean)


def test_dense_vectors_beside_one_another_are_told_apart_by_their_ends(monkeypatch):
    """An allocator packs them so. Element by element 2,048 channels took 6 ms a call."""
    monkeypatch.setattr(refusals, "_collide", lambda *_: pytest.fail("the elements were looked at"))
    table = torch.ones(4, 2048).unbind()
    layer = SampledBatchNorm2d(2048)
    layer.weight, layer.bias = nn.Parameter(table[3]), nn.Parameter(table[0])
    layer.running_var, layer.running_mean = table[1:3]
    layer(torch.randn(2, 2048, 2, 2))


# --- where torch's layer works ---


def test_the_memory_format_is_torchs_in_both_modes():
    wide = torch.randn(6, 8, 5, 7)
    last = wide.to(memory_format=torch.channels_last)
    for x in (
        wide, last, wide.transpose(2, 3), wide.transpose(0, 1), last[:, :4], last[:, :, ::2],
        wide[..., ::2], wide[:, :, :1, :1], wide[:1], wide[:, :1], last[:, :1], wide.permute(0, 3, 2, 1),
        last.transpose(2, 3),
    ):  # fmt: skip
        theirs, ours = nn.BatchNorm2d(x.shape[1]), SampledBatchNorm2d(x.shape[1])
        torch._dynamo.reset()
        compiled = torch.compile(copy.deepcopy(ours), backend="aot_eager", fullgraph=True)
        for training in (True, False):
            y, true = ours.train(training)(x), theirs.train(training)(x)
            assert y.stride() == true.stride() and torch.allclose(y, true, atol=1e-5)
            assert compiled.train(training)(x).stride() == true.stride()
    x = torch.randn(4, 7, 5).transpose(1, 2)
    for training in (True, False):
        y = SampledBatchNorm1d(5, sampler=FS).train(training)(x)
        assert y.view(4, -1).is_contiguous()


def test_a_layer_without_a_counter_trains():
    """Older checkpoints have none beside their running statistics."""
    x = torch.randn(8, 5, 6, 6)
    for momentum in (0.3, None):
        theirs, ours = nn.BatchNorm2d(5, momentum=momentum), SampledBatchNorm2d(5, momentum=momentum)
        for layer in (theirs, ours):
            layer.num_batches_tracked = None
            layer(x)
            layer(x)
        assert torch.allclose(ours.running_mean, theirs.running_mean, atol=1e-6)
        assert torch.allclose(ours.running_var, theirs.running_var, atol=1e-5)
        assert ours.untracked == 2 and list(ours.state_dict()) == list(theirs.state_dict())
    drawn = SampledBatchNorm2d(5, sampler=FS)
    drawn.num_batches_tracked = None
    assert not torch.equal(drawn(x), drawn(x))


def test_an_untracked_layer_is_torchs_to_all_who_look():
    layer = SampledBatchNorm2d(5, sampler=FS, track_running_stats=False)
    assert not list(layer.buffers()) and list(layer.state_dict()) == ["weight", "bias"]
    x = torch.randn(8, 5, 6, 6)
    with torch.inference_mode():
        layer(x)
    layer(x.requires_grad_()).sum().backward()
    assert layer.untracked == 2
    evaluated = [layer.eval()(x) for _ in range(2)]
    assert torch.equal(*evaluated) and layer.untracked == 2
    before = {**vars(layer)}
    exported = torch.export.export(layer, (x.detach(),))
    assert torch.allclose(exported.module()(x.detach()), evaluated[0])
    assert {**vars(layer)} == before and type(layer.untracked) is torch.Tensor
    for moved in (layer.half(), copy.deepcopy(layer), layer.to("meta")):
        assert moved.untracked.dtype == torch.int64
    assert layer.untracked.is_meta and layer.to_empty(device="cpu").untracked == 0


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ["weight", "bias", "running_mean", "running_var", "all"])
def test_vectors_of_another_length_are_refused_as_torch_does(name, training):
    x = torch.randn(4, 6, 3, 3)
    for channels, made in ((5, nn.BatchNorm2d), (5, SampledBatchNorm2d)):
        layer = made(channels).train(training)
        for one in ("weight", "bias", "running_mean", "running_var") if name == "all" else (name,):
            old = getattr(layer, one).detach()
            new = torch.ones(6) if name == "all" else torch.ones(4)
            setattr(layer, one, nn.Parameter(new) if isinstance(getattr(layer, one), nn.Parameter) else new)
            assert len(old) == 5
        if name == "all":  # num_features does not matter
            assert layer(x).shape == x.shape
        elif made is SampledBatchNorm2d:
            assert refused(layer, x[:, :5])[0] is RuntimeError
        else:
            with pytest.raises(RuntimeError):
                layer(x[:, :5])


def test_one_running_statistic_alone_is_refused():
    layer = SampledBatchNorm2d(5)
    layer.running_var = None
    assert refused(layer, torch.randn(4, 5, 3, 3))[0] is RuntimeError


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), SampledBatchNorm2d(4, sampler=FS, activation="relu")
        last = SampledBatchNorm2d(4, sampler=FS, layer=1)
        self.features = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), last)

    def forward(self, x):
        x = self.norm(self.conv(x))
        return self.norm(self.features(x), x)


def test_a_layer_is_a_leaf_to_torch_fx():
    model = Model()
    traced = fx.symbolic_trace(model)
    called = [node.target for node in traced.graph.nodes if node.op == "call_module"]
    assert called == ["conv", "norm", "features.0", "features.1", "norm"]
    x = torch.randn(4, 3, 9, 9)
    twin = copy.deepcopy(model)
    for _ in range(2):
        assert torch.equal(traced(x), twin(x))
    assert model.norm.num_batches_tracked == twin.norm.num_batches_tracked == 4
    with pytest.raises(fx.proxy.TraceError, match="trace a module that calls it"):
        fx.symbolic_trace(model.norm)


def test_jit_trace_records_an_evaluation_and_refuses_a_training():
    layer, x = SampledBatchNorm2d(4, sampler=FS), torch.randn(4, 4, 9, 9)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        before = state_of(layer)
        with pytest.raises(RuntimeError, match=r"does not support torch.jit.trace.*in evaluation mode"):
            torch.jit.trace(layer, x)
        assert same(state_of(layer), before)
        traced = torch.jit.trace(layer.eval(), x)
    assert torch.equal(traced(x), layer(x))


@pytest.mark.parametrize("transform", ["grad", "vjp", "jacrev", "vmap", "jvp"])
def test_functional_transforms_of_a_training_are_refused_in_one_sentence(transform):
    layer, x = SampledBatchNorm2d(3, sampler=FS), torch.randn(2, 3, 4, 4)
    calls = {
        "grad": lambda: torch.func.grad(lambda x: layer(x).sum())(x),
        "vjp": lambda: torch.func.vjp(layer, x),
        "jacrev": lambda: torch.func.jacrev(lambda x: layer(x).sum())(x),
        "vmap": lambda: torch.func.vmap(layer)(x.expand(2, 2, 3, 4, 4)),
        "jvp": lambda: torch.func.jvp(layer, (x,), (x,)),
    }
    before = state_of(layer)
    with pytest.raises(RuntimeError, match=r"does not support torch.func's transforms.*torch.autograd.grad"):
        calls[transform]()
    assert same(state_of(layer), before)
    layer.eval()
    calls[transform]()


# --- whatever is refused has changed nothing ---


def inputs():
    """Inputs, dense and not, that a layer of 4 channels refuses."""
    good = torch.randn(4, 4, 6, 6)
    yield "rank", good[0]
    yield "channels", good[:, :3]
    for dtype in (torch.int32, torch.bool, torch.complex64, torch.float8_e5m2):
        yield str(dtype), good.to(dtype)
    yield "parameters' dtype", good.double()
    yield "a single value", good[:1, :, :1, :1]
    yield "sparse", good.to_sparse()
    yield "device", good.to("meta")


STRIDES = {
    "contiguous": lambda t: t,
    "channels last": lambda t: t.to(memory_format=torch.channels_last) if t.ndim == 4 else t,
    "strided": lambda t: t.repeat_interleave(2, 0)[::2],
    "expanded": lambda t: t[:1].expand(4, *t.shape[1:]) if len(t) > 1 else t,
}


@pytest.mark.parametrize("name, x", [*inputs()], ids=lambda v: v if isinstance(v, str) else "")
@pytest.mark.parametrize("sampler", [sbn.Full(), FS, sbn.NaiveSampling(1 / 4), sbn.Prior(0.5, FS)], ids=str)
def test_refused_inputs_change_nothing_on_the_first_call_and_later(name, x, sampler):
    if name == "a single value" and has_prior(sampler):
        pytest.skip("a prior makes do with one value")
    for options in ({}, {"momentum": None}, {"track_running_stats": False}, {"activation": "relu"}):
        layer = SampledBatchNorm2d(4, sampler=sampler, **options)
        strides = [lambda t: t] if name in ("sparse", "device") else STRIDES.values()
        for view in strides:
            if options == {"track_running_stats": False} and has_prior(sampler):
                continue
            first = refused(layer, view(x))
            layer(torch.randn(4, 4, 6, 6))  # from here on a cached call
            assert refused(layer, view(x)) == first


@pytest.mark.parametrize("sampler", [sbn.Full(), FS, sbn.NaiveSampling(1 / 4)], ids=str)
def test_refused_residuals_change_nothing(sampler):
    layer, x = SampledBatchNorm2d(4, sampler=sampler, activation="relu"), torch.randn(4, 4, 6, 6)
    kinds = x.double(), x.to(torch.int32), x.to(torch.complex64)
    for residual in (x[:1], *kinds, x.to_sparse(), x.to("meta")):
        first = refused(layer, x, residual)
        layer(x, x)
        assert refused(layer, x, residual) == first


def test_first_and_later_calls_give_the_same_bits():
    for view in STRIDES.values():
        x, dy = view(torch.randn(4, 4, 6, 6)), torch.randn(4, 4, 6, 6)
        fresh = SampledBatchNorm2d(4, sampler=FS)
        used = copy.deepcopy(fresh)
        for _ in range(3):
            used(x)
        used.load_state_dict(fresh.state_dict())
        results = []
        for layer in (fresh, used):
            leaf = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
            y = layer(leaf)
            y.backward(dy)
            results.append((y.detach(), leaf.grad, layer.weight.grad, layer.running_mean, layer.running_var))
        for a, b in zip(*results, strict=True):
            assert torch.equal(a, b) and a.stride() == b.stride()
