"""The rest of a trainer's day: mixed precision, checkpoints, workers, threads, averages, folding."""

import copy
import threading

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402
from torch.utils.checkpoint import checkpoint  # noqa: E402

import sbncore as sbn  # noqa: E402
from sbncore.adapters.torch import (  # noqa: E402
    SampledBatchNorm2d,
    checkpoint_contexts,
    convert_sampled_batchnorm,
)

FS = sbn.FeatureSampling(1 / 4)


def block(**options):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), SampledBatchNorm2d(4, sampler=FS, activation="relu", **options),
        nn.Conv2d(4, 4, 3), SampledBatchNorm2d(4, sampler=FS, layer=1, **options),
    )  # fmt: skip


def buffers(model):
    return {name: buffer.clone() for name, buffer in model.named_buffers()}


def test_autocast_in_bfloat16():
    model = block()
    x = torch.randn(4, 3, 10, 10)
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x)
    y.float().square().sum().backward()
    assert y.dtype == torch.bfloat16 and model[1].running_var.dtype == torch.float32
    assert model[1].weight.grad.dtype == torch.float32 and model[0].weight.grad.isfinite().all()
    exact = block()(x)
    assert (y - exact).abs().max() < 0.1


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpointed_block_draws_the_same_again_and_counts_once(reentrant):
    plain, lean = block(), block()
    for step in range(3):
        x = torch.randn(4, 3, 10, 10, generator=torch.Generator().manual_seed(step))
        leaves = [x.clone().requires_grad_(), x.clone().requires_grad_()]
        y, again = plain(leaves[0]), checkpoint(lean, leaves[1], use_reentrant=reentrant)
        assert torch.equal(y, again)
        for each in (y, again):
            each.square().sum().backward()
        assert torch.equal(leaves[0].grad, leaves[1].grad)
        for a, b in zip(plain.parameters(), lean.parameters(), strict=True):
            assert torch.equal(a.grad, b.grad)
        for a, b in zip(plain.buffers(), lean.buffers(), strict=True):
            assert torch.equal(a, b)
    assert lean[1].num_batches_tracked == 3


def test_checkpoint_contexts_replay_any_order_of_backwards():
    """Several forwards before a backward, a layer called twice in a block."""
    plain, lean = block(), block()
    gradients = []
    for model, run in (
        (plain, lambda x: plain[1](plain(x)[:, :, :3, :3])),
        (lean, lambda x: checkpoint(
            lambda x: lean[1](lean(x)[:, :, :3, :3]), x, use_reentrant=False, context_fn=checkpoint_contexts,
        )),
    ):  # fmt: skip
        xs = torch.randn(3, 4, 3, 10, 10, generator=torch.Generator().manual_seed(1)).unbind()
        losses = [run(x).square().sum() for x in xs]
        before = buffers(model)
        for k in (1, 0, 2):
            losses[k].backward()
        gradients.append([p.grad for p in model.parameters()])
        assert all(torch.equal(before[name], buffer) for name, buffer in model.named_buffers())
        assert model[1].num_batches_tracked == 6
    for a, b in zip(*gradients, strict=True):
        assert torch.equal(a, b)


def test_a_scaler_skips_an_overflow_and_statistics_stay_finite():
    for skip, finite in ((True, True), (False, False)):
        model = block(skip_nonfinite=skip)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
        for step in range(3):
            x = torch.randn(4, 3, 10, 10)
            if step == 1:
                x[0] = torch.inf
            before = copy.deepcopy(list(model.parameters()))
            scaler.scale(model(x).square().sum()).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            moved = any(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
            assert moved == (step != 1) or not finite
            if step == 1:
                assert bool(model[1].running_var.isfinite().all()) == finite
        assert model[1].num_batches_tracked == 3


class Noise(torch.utils.data.Dataset):
    """Items that a worker makes with the layer, behind a fork."""

    def __init__(self, layer):
        self.layer = layer

    def __len__(self):
        return 4

    def __getitem__(self, index):
        torch.set_num_threads(1)
        with torch.no_grad():
            return self.layer(torch.full((8, 4, 160, 260), float(index)) + torch.arange(8.0).view(8, 1, 1, 1))


def test_loaders_fork_workers_after_the_engine_has_run():
    layer = SampledBatchNorm2d(4, sampler=FS)
    layer(torch.randn(8, 4, 160, 260))  # large enough for its threads
    loader = torch.utils.data.DataLoader(
        Noise(layer), batch_size=None, num_workers=2, multiprocessing_context="fork"
    )
    made = list(loader)
    assert len(made) == 4 and all(y.isfinite().all() for y in made)


def test_several_threads_train_models_of_their_own():
    def train(model, results):
        for step in range(8):
            x = torch.randn(4, 3, 10, 10, generator=torch.Generator().manual_seed(step))
            model.zero_grad()
            model(x).square().sum().backward()
        results.append([p.grad.clone() for p in model.parameters()])

    alone: list = []
    train(block(), alone)
    together: list = []
    models = [block() for _ in range(4)]
    threads = [threading.Thread(target=train, args=(model, together)) for model in models]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(together) == 4
    for result in together:
        for a, b in zip(result, alone[0], strict=True):
            assert torch.allclose(a, b, rtol=1e-4, atol=1e-5)


def test_averaged_models_get_their_statistics():
    model = block()
    average = torch.optim.swa_utils.AveragedModel(model)
    batches = torch.randn(5, 4, 3, 10, 10).unbind()
    for x in batches:
        model(x).square().sum().backward()
        average.update_parameters(model)
    torch.optim.swa_utils.update_bn(batches, average)
    layer = average.module[1]
    assert layer.momentum == 0.1 and layer.num_batches_tracked == 5
    plain = convert_sampled_batchnorm(copy.deepcopy(average), sbn.Full())
    torch.optim.swa_utils.update_bn(batches, plain)
    with torch.no_grad():
        z = torch.stack([average.module[0](x) for x in batches])
    assert torch.allclose(plain.module[1].running_mean, z.mean((0, 1, 3, 4)), atol=1e-6)
    assert torch.allclose(layer.running_mean, z.mean((0, 1, 3, 4)), atol=0.2)


def test_a_layer_folds_into_its_convolution():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), SampledBatchNorm2d(4, sampler=FS))
    x = torch.randn(4, 3, 10, 10)
    model(x)
    model.eval()
    folded = torch.nn.utils.fuse_conv_bn_eval(*model)
    assert torch.allclose(folded(x), model(x), atol=1e-5)


def test_functional_calls_and_deep_copies_leave_the_module_alone():
    model = block()
    x = torch.randn(4, 3, 10, 10)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    twin = copy.deepcopy(model)
    y = torch.func.functional_call(twin, state, x)
    assert twin[1].num_batches_tracked == 0 and state["1.num_batches_tracked"] == 1
    assert torch.equal(model(x), y)


def test_a_run_resumed_from_its_state_goes_on_as_it_would_have():
    xs = torch.randn(4, 4, 3, 10, 10).unbind()
    model, resumed = block(), block()
    for x in xs[:2]:
        model(x)
    resumed.load_state_dict(model.state_dict())
    for x in xs[2:]:
        assert torch.equal(model(x), resumed(x))
