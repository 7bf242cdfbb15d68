"""The engine over tensors: the first call and later ones give the same bits; what is odd is copied."""

from dataclasses import dataclass

import numpy as np
import pytest
from conftest import TOLERANCE
from product import SAMPLERS
from strategies import runs_of

torch = pytest.importorskip("torch")

import sbncore as sbn  # noqa: E402
from sbncore import arguments, call  # noqa: E402
from sbncore.adapters.torch import SampledBatchNorm2d, engine, pages, tensors  # noqa: E402
from sbncore.cpu import draws, kernels  # noqa: E402
from sbncore.cpu.kernels import DRAWS  # noqa: E402
from sbncore.hashing import stream_key  # noqa: E402
from sbncore.signature import Scalars  # noqa: E402


def forget():
    """Empty every cache of calls."""
    arguments._prepared.clear()
    engine._prepared.clear()
    call.call_for.cache_clear()


def everything(sampler, dtype, last, relu, add, gradient, forgets):
    """Three steps' results, each of a first call if the caches are emptied in between."""
    torch.manual_seed(0)
    parameter = torch.float64 if dtype == "float64" else torch.float32
    layer = SampledBatchNorm2d(
        5, sampler=sampler, gradient=gradient, activation="relu" if relu else None, seed=-3, layer=2**63,
        dtype=parameter, skip_nonfinite=True, own_rows=True,
    )  # fmt: skip
    results = []
    for _ in range(3):
        x, residual, dy = torch.randn(3, 8, 5, 6, 7).to(getattr(torch, dtype))
        if last:
            x, residual, dy = (a.to(memory_format=torch.channels_last) for a in (x, residual, dy))
        leaves = [x.requires_grad_(), *([residual.requires_grad_()] if add else [])]
        layer.zero_grad()
        y = layer(*leaves)
        if forgets:
            forget()
        y.backward(dy)
        if forgets:
            forget()
        results += [y.detach(), *(a.grad for a in leaves), layer.weight.grad, layer.bias.grad]
        results += [b.clone() for b in layer.buffers()]
    return results


@pytest.mark.parametrize("name", [*SAMPLERS, "prior"])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_first_and_later_calls_give_the_same_bits(name, dtype):
    sampler = sbn.Prior(0.25, sbn.FeatureSampling(1 / 4)) if name == "prior" else SAMPLERS[name]
    cases = [(False, False, False), (True, True, False), (False, True, True), (True, True, True)]
    for (last, relu, add), gradient in zip(cases, ("exact", "detached", "exact", "sampled"), strict=True):
        if gradient == "sampled" and sampler.virtual:
            gradient = "exact"
        options = (sampler, dtype, last, relu, add, gradient)
        for a, b in zip(everything(*options, False), everything(*options, True), strict=True):
            assert a.dtype == b.dtype and a.stride() == b.stride() and torch.equal(a, b)


def test_compiled_draws_are_the_plans():
    kernels.functions(*DRAWS)
    for shape in [(16, 3, 7, 7), (5, 3, 9, 11), (6, 3)]:
        for step in range(20):
            draw = (-3, 2**62, step)
            for sampler in (
                sbn.FeatureSampling(1 / 8), sbn.FeatureSampling(1 / 3, "rows", "common"), sbn.Full(),
                sbn.BatchSampling(3), sbn.BatchSampling(2, "strided"),
            ):  # fmt: skip
                plan = sampler.plan(shape, seed=draw[0], layer=draw[1], step=step)
                assert stream_key(*draw, 0) == plan.parts[0].key
                compiled = runs_of(draws.drawing(plan.recipe)(plan.draw))
                for a, b in zip(compiled, plan.runs, strict=True):
                    assert a.dtype == b.dtype and (a == b).all()


def test_what_is_odd_is_copied():
    x = torch.randn(8, 5, 6, 7)
    for view in (x[::2], x[:, ::2], x.expand(8, 5, 6, 7)[..., ::2], x[:1].expand(8, 5, 6, 7)):
        copy, layout = tensors.dense(view)
        assert torch.equal(copy, view) and (copy.data_ptr() != view.data_ptr() or copy.is_contiguous())
        assert copy.stride() == torch.nn.functional.batch_norm(view, None, None, training=True).stride()
        assert layout.lies(copy.numpy())
    for view in (x, x.to(memory_format=torch.channels_last), x[:, :, 0, 0].clone(), x[2:]):
        same, layout = tensors.dense(view)
        assert same is view and layout.lies(view.numpy())
        negative, _ = tensors.dense(torch._neg_view(view))
        assert not negative.is_neg() and torch.equal(negative, -view)
        assert tensors.dense_as(view, view) is view
        assert torch.equal(tensors.dense_as(torch._neg_view(view), view), -view)
    some = torch.ones(5)
    assert tensors.vector(some, torch.float32) is some and tensors.vector(None, torch.float32) is None
    for odd in (some.double(), some.half(), torch.ones(10)[::2], torch._neg_view(-some)):
        copy = tensors.vector(odd, torch.float32)
        assert copy.is_contiguous() and torch.equal(copy, some) and not copy.is_neg()


def test_large_outputs_are_torchs_own_memory():
    x = torch.randn(2, 5, 600, 800)  # of more bytes than what is asked for in large pages
    assert x.nbytes >= pages.HUGE_PAGES_FROM
    y = SampledBatchNorm2d(5)(x.requires_grad_())
    y.backward(torch.ones_like(y))
    assert torch.allclose(y, torch.nn.BatchNorm2d(5)(x), atol=1e-5) and x.grad.isfinite().all()
    pages.advise(y.data_ptr() + 1, 5000)
    pages.advise(y.data_ptr(), 0)
    assert y.isfinite().all()


def test_a_prior_wants_statistics_and_options_are_floats():
    x = torch.randn(8, 5, 6, 7)
    for sampler in (sbn.Prior(0.5, sbn.Full()), sbn.Prior(0.5, sbn.NaiveSampling(1 / 2))):
        layer = SampledBatchNorm2d(5, track_running_stats=False, sampler=sampler)
        with pytest.raises(ValueError, match="prior: expected Statistics"):
            layer(x)
    expected = SampledBatchNorm2d(5, momentum=1.0, eps=1.0)(x)
    from sbncore.cpu.kernels import loaded

    compiled = set(loaded)
    assert torch.equal(SampledBatchNorm2d(5, momentum=1, eps=np.float32(1))(x), expected)
    assert set(loaded) == compiled
    with pytest.raises(ValueError, match="eps"):
        SampledBatchNorm2d(5, eps=float("inf"))(x)


def test_samplers_of_one_repr_are_told_apart():
    def made(k):
        @dataclass(frozen=True)
        class Some(sbn.Sampler):
            def draw(self, batch, real):
                return sbn.BatchSampling(k).draw(batch, real)

        return Some()

    x = torch.randn(8, 5, 6, 7)
    results = [SampledBatchNorm2d(5, sampler=made(k))(x) for k in (1, 4)]
    for k, y in zip((1, 4), results, strict=True):
        assert torch.equal(y, SampledBatchNorm2d(5, sampler=sbn.BatchSampling(k))(x))


def test_a_negative_view_is_not_taken_for_one_that_was_seen_without_its_sign():
    """Nor where the other was unaligned, as only a GPU's memory can be."""
    x, weight = torch.randn(8, 5, 6, 7), torch.rand(5) + 0.5
    looks = {engine._look(one) for one in (weight, torch._neg_view(-weight))}
    assert len(looks) == 2
    plan = sbn.Full().plan(x.shape)
    for _ in range(2):
        ys = []
        for one in (weight, torch._neg_view(-weight)):
            vectors = (one, None, None, None, None, None)
            ys.append(engine.forward(x, vectors, None, plan, Scalars(1e-5), False)[0])
        assert torch.equal(*ys)
