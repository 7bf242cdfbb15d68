"""Activation checkpointing, eager and compiled: a recomputation draws what its forward drew."""

import copy
import functools

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402
from torch.utils.checkpoint import (  # noqa: E402
    CheckpointPolicy,
    checkpoint,
    checkpoint_sequential,
    create_selective_checkpoint_contexts,
)

import sbncore as sbn  # noqa: E402
from sbncore.adapters.torch import (  # noqa: E402
    SampledBatchNorm2d,
    VirtualBatch,
    checkpoint_contexts,
    ops,
    replay,
)

FS = sbn.FeatureSampling(1 / 4)
LAYERS = {
    "number": {},
    "cumulative": {"momentum": None},
    "untracked": {"track_running_stats": False},
    "prior": {"sampler": sbn.Prior(0.25, FS)},
    "scattered": {"sampler": sbn.NaiveSampling(1 / 4)},
}


def block(**options):
    torch.manual_seed(0)
    options = {"sampler": FS} | options
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), SampledBatchNorm2d(4, activation="relu", **options),
        nn.Conv2d(4, 4, 3), SampledBatchNorm2d(4, layer=1, **options),
    ).double()  # fmt: skip


kept = functools.partial(checkpoint, use_reentrant=False)
remembering = functools.partial(kept, context_fn=checkpoint_contexts)


def selective(saved):
    def policy(context, operator, *arguments, **options):
        return CheckpointPolicy.MUST_SAVE if operator in saved else CheckpointPolicy.PREFER_RECOMPUTE

    return functools.partial(kept, context_fn=functools.partial(create_selective_checkpoint_contexts, policy))


convolutions = selective([torch.ops.aten.convolution.default])
normalizations = selective([ops.FORWARD])
RUNS = {
    "whole": lambda model, x: kept(model, x),
    "halves": lambda model, x: kept(model[2:], kept(model[:2], x)),
    "nested": lambda model, x: kept(lambda x: model[2:](kept(model[:2], x)), x),
    "selective": lambda model, x: convolutions(model, x),
    "selective, ours saved": lambda model, x: normalizations(model, x),
    "contexts": lambda model, x: remembering(model, x),
    "nested contexts": lambda model, x: remembering(lambda x: model[2:](remembering(model[:2], x)), x),
}


def training(model, run, forwards):
    """Three steps' gradients and buffers, each of several forwards before the backwards."""
    results = []
    for step in range(3):
        model.zero_grad()
        generator = torch.Generator().manual_seed(step)
        xs = torch.randn(forwards, 4, 3, 10, 10, generator=generator, dtype=torch.float64).unbind()
        leaves = [x.clone().requires_grad_() for x in xs]
        for y in [run(model, x) for x in leaves]:
            y.pow(3).sum().backward()
        results += [x.grad for x in leaves] + [p.grad.clone() for p in model.parameters()]
        results += [buffer.clone() for buffer in model.buffers()]
        layers = (layer for layer in model.modules() if isinstance(layer, SampledBatchNorm2d))
        results += [layer.untracked.clone() for layer in layers]
    return results


def check(run, backend, forwards, **options):
    expected = training(block(**options), lambda model, x: model(x), forwards)
    if backend is not None:
        torch._dynamo.reset()
        run = torch.compile(run, backend=backend, fullgraph=True)
    for a, b in zip(training(block(**options), run, forwards), expected, strict=True):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("layer, name", [
    *(("number", name) for name in RUNS),
    *((layer, name) for layer in list(LAYERS)[1:] for name in ("whole", "selective")),
])  # fmt: skip
def test_a_recomputation_draws_the_same_and_counts_nothing(layer, name):
    check(RUNS[name], None, 2, **LAYERS[layer])
    check(RUNS[name], "aot_eager", 2, **LAYERS[layer])


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # of Dynamo's own looking
@pytest.mark.parametrize("backend", [None, "aot_eager"])
def test_checkpoint_sequential(backend):
    """Dynamo does not trace it: compiled are its segments."""
    run = functools.partial(checkpoint_sequential, segments=2, use_reentrant=False)
    expected = training(block(), lambda model, x: model(x), 2)
    model = block()
    if backend is not None:
        torch._dynamo.reset()
        model.forward = torch.compile(lambda x: run(model, input=x), backend=backend)
    got = training(model, lambda model, x: model(x) if backend else run(model, input=x), 2)
    for a, b in zip(got, expected, strict=True):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("layer, reentrant", [
    ("number", False), ("number", True), ("cumulative", False), ("untracked", False), ("prior", False),
])  # fmt: skip
def test_a_compiled_block_in_an_eager_checkpoint(layer, reentrant):
    """The recomputation runs the compiled forward again: it must neither draw anew nor count."""
    options, forwards = LAYERS[layer], 1 if reentrant else 2
    torch._dynamo.reset()
    model = block(**options)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    got = training(model, lambda _, x: checkpoint(compiled, x, use_reentrant=reentrant), forwards)
    for a, b in zip(got, training(block(**options), lambda model, x: model(x), forwards), strict=True):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # of Dynamo's own looking
def test_a_block_whose_graph_breaks_in_a_checkpoint():
    """Its layer is called from what Dynamo left in Python."""

    class Broken(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = block()

        def forward(self, x):
            x = self.block[:2](x)
            torch._dynamo.graph_break()
            return self.block[2:](x)

    expected = training(Broken(), lambda model, x: model(x), 2)
    torch._dynamo.reset()
    for a, b in zip(training(Broken(), torch.compile(kept, backend="aot_eager"), 2), expected, strict=True):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("layer", LAYERS)
def test_a_reentrant_checkpoint_draws_as_its_last_forward(layer):
    run = lambda model, x: checkpoint(model, x, use_reentrant=True)  # noqa: E731
    check(run, None, 1, **LAYERS[layer])


@pytest.mark.parametrize("name", ["eager", "compiled", "compiled in a checkpoint", "reentrant"])
def test_an_evaluation_in_a_checkpoint_keeps_its_statistics(name):
    """Between it and its backward, training moves them."""
    torch._dynamo.reset()
    model = block().eval()
    compiled = torch.compile(model, backend="aot_eager")
    run = {
        "eager": lambda x: kept(model, x),
        "compiled": torch.compile(lambda x: kept(model, x), backend="aot_eager"),
        "compiled in a checkpoint": lambda x: kept(compiled, x),
        "reentrant": lambda x: checkpoint(compiled, x, use_reentrant=True),
    }[name]
    x = torch.randn(4, 3, 10, 10).double().requires_grad_()
    dy = torch.randn(4, 4, 6, 6).double()
    (expected,) = torch.autograd.grad(model(x), x, dy)
    y = run(x)
    if name != "reentrant":  # that reads what it finds
        model.train()(x.detach())
        model.eval()
    y.backward(dy)
    assert torch.allclose(x.grad, expected, rtol=1e-12, atol=1e-12)


def test_a_recomputation_may_be_repeated_beside_other_hooks():
    results = []
    for run in (lambda f, x: f(x), kept):
        model = block(sampler=sbn.Prior(0.25, FS))
        x, other = torch.randn(2, 4, 3, 10, 10, generator=torch.Generator().manual_seed(1)).double()
        with torch.autograd.graph.save_on_cpu():
            y = run(model, x.requires_grad_())
        run(model, other)
        results.append([torch.autograd.grad(y.pow(3).sum(), x, retain_graph=True)[0] for _ in range(2)])
        with torch.no_grad():
            kept(model, other)
        assert model[1].num_batches_tracked == 3
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_a_checkpoint_that_is_not_known_is_an_error():
    def pack(x):
        return x

    pack.__module__ = "torch.utils.checkpoint"
    with torch.autograd.graph.saved_tensors_hooks(pack, pack):
        layer = block()[1]
        with pytest.raises(RuntimeError, match="its hooks have no frame"):
            layer(torch.randn(4, 4, 3, 3).double())
    assert layer.num_batches_tracked == 0


def test_a_partitioner_that_recomputes_of_its_own_accord_saves_the_draw():
    """It may run the forward again, for whatever it recomputes."""
    config = torch._functorch.config.patch(activation_memory_budget=0.05)
    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch.aot_autograd import make_boxed_func
    from torch._functorch.partitioners import min_cut_rematerialization_partition

    recomputed = []

    def partition(joint, *arguments, **options):
        forward, backward = min_cut_rematerialization_partition(joint, *arguments, **options)
        recomputed.extend(node for node in backward.graph.nodes if node.target is ops.FORWARD)
        return forward, backward

    backend = aot_autograd(fw_compiler=lambda graph, _: make_boxed_func(graph), partition_fn=partition)
    with config:
        check(lambda model, x: model(x), backend, 2, sampler=sbn.Prior(0.25, FS))
    assert recomputed


def test_a_compiled_virtual_batch_recomputes_its_noise():
    sampler = sbn.Mixture([(0.5, FS), (0.5, sbn.VirtualSamples(3))])
    expected, got = (
        training(VirtualBatch(block(sampler=sampler), 3), run, 2)
        for run in (
            lambda model, x: model(x),
            torch.compile(RUNS["whole"], backend="aot_eager", fullgraph=True),
        )
    )
    for a, b in zip(got, expected, strict=True):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-9)


def test_the_contexts_of_a_copy_and_of_a_twice_called_layer():
    """A layer called twice in a block: its reads are replayed in order."""
    plain = block()
    lean = copy.deepcopy(plain)
    gradients = []
    for model, run in ((plain, lambda f, x: f(x)), (lean, remembering)):
        xs = torch.randn(2, 4, 3, 10, 10, generator=torch.Generator().manual_seed(1)).double().unbind()
        losses = [run(lambda x, m=model: m[3](m[3](m[:3](x)) * 2), x).square().sum() for x in xs]
        for loss in reversed(losses):
            loss.backward()
        gradients.append([p.grad for p in model.parameters()])
    for a, b in zip(*gradients, strict=True):
        assert torch.equal(a, b)


def test_torchs_own_checks_of_the_operator():
    state = [torch.tensor(3), torch.randn(4), torch.rand(4)]
    for keeps, counted in ((False, True), (True, True), (True, False)):
        torch.library.opcheck(replay._operator, (state, keeps, counted))
        counts, *values = replay._operator(state, keeps, counted)
        assert counts == 1 and all(torch.equal(a, b) for a, b in zip(values, state, strict=True))
