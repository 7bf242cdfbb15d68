"""Ranks that share statistics, real processes over gloo, against one process with the whole batch."""

import os
import sys

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import torch.distributed as dist  # noqa: E402
import torch.multiprocessing as mp  # noqa: E402
from torch import nn  # noqa: E402

import sbncore as sbn  # noqa: E402
from sbncore import reference  # noqa: E402
from sbncore.adapters.torch import SampledBatchNorm2d, convert_sampled_batchnorm  # noqa: E402
from sbncore.adapters.torch.ranks import RANK, merged, moved  # noqa: E402
from sbncore.statistics import unbiased  # noqa: E402

if not dist.is_available() or sys.platform == "win32":
    pytest.skip("needs torch.distributed with gloo", allow_module_level=True)

SAMPLERS = {
    "full": sbn.Full(),
    "run": sbn.FeatureSampling(1 / 4),
    "samples": sbn.BatchSampling(1),
    "prior": sbn.Prior(0.25, sbn.FeatureSampling(1 / 4)),
    "hybrid": sbn.Mixture([(0.5, sbn.FeatureSampling(1 / 2)), (0.5, sbn.VirtualSamples(1))]),
}


def spawn(function, ranks, *arguments):
    """Run function(rank, ranks, *arguments) in that many processes; any failure is raised here."""
    mp.spawn(_entered, (function, ranks, _free_port(), *arguments), nprocs=ranks)


def _free_port():
    import socket

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def _entered(rank, function, ranks, port, *arguments):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    sbn.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=ranks)
    try:
        function(rank, ranks, *arguments)
    finally:
        dist.destroy_process_group()


def data(ranks, sizes, kind=torch.float64):
    generator = torch.Generator().manual_seed(1)
    shape = (sum(sizes), 3, 4, 4)
    x, dy, residual = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(3))
    return [each.to(kind).split(sizes) for each in (x + 3, dy, residual)]


def layer(sampler, **options):
    options = {"seed": 5, "layer": 2, "own_rows": True} | options
    made = SampledBatchNorm2d(3, sampler=sampler, dtype=torch.float64, **options)
    with torch.no_grad():
        made.weight.copy_(torch.tensor([0.5, 1.0, 2.0]))
        made.bias.copy_(torch.tensor([0.1, 0.0, -1.0]))
    return made


def p_of_all(sampler, sizes, step):
    """The whole batch's p, by the ranks' own plans and their counts, and the prior's weight."""
    plans = [
        sampler.plan((n, 3, 4, 4), seed=5, layer=2 + RANK * r, step=step, fewest=1)
        for r, n in enumerate(sizes)
    ]
    counts = [plan.effective_count if n else 0 for plan, n in zip(plans, sizes, strict=True)]
    shares = [count / sum(counts) for count in counts]
    weights = [torch.from_numpy(plan.weights()) * s for plan, s in zip(plans, shares, strict=True)]
    return torch.cat(weights), max(plan.prior for plan in plans), sum(counts)


def check_against_one_process(rank, ranks, name, sizes, options):
    sampler, relu, add = SAMPLERS[name], options.get("relu", False), options.get("add", False)
    ours = layer(sampler, process_group="world", activation="relu" if relu else None)
    xs, dys, residuals = data(ranks, sizes)
    mean, var = torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
    for step in range(2):
        p, prior, count = p_of_all(sampler, sizes, step)
        x = xs[rank].clone().requires_grad_()
        residual = residuals[rank].clone().requires_grad_() if add else None
        y = ours(x, residual)
        ours.zero_grad()
        y.backward(dys[rank])
        sums = torch.stack([ours.weight.grad, ours.bias.grad])
        dist.all_reduce(sums)
        whole = [torch.cat(each) for each in (xs, dys, residuals)]
        y_true, saved = reference.forward(
            whole[0].numpy(), ours.weight.detach().numpy(), ours.bias.detach().numpy(), p=p.numpy(),
            prior=(prior, mean.numpy().copy(), var.numpy().copy()) if prior else None,
            activation="relu" if relu else None, residual=whole[2].numpy() if add else None,
        )  # fmt: skip
        true = reference.backward(whole[1].numpy(), saved)
        mine = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
        close(y, y_true[mine])
        close(x.grad, true["x"][mine])
        close(sums[0], true["weight"])
        close(sums[1], true["bias"])
        if add:
            close(residual.grad, true["residual"][mine])
        unbiased = saved.var * count / (count - 1)
        if not prior:
            mean += 0.1 * (torch.from_numpy(saved.mean) - mean)
            var += 0.1 * (torch.from_numpy(unbiased) - var)
            close(ours.running_mean, mean)
            close(ours.running_var, var)
        else:
            mean, var = ours.running_mean.clone(), ours.running_var.clone()
        everyones = [torch.empty_like(ours.running_var) for _ in range(ranks)]
        dist.all_gather(everyones, ours.running_var)
        assert all(torch.equal(one, ours.running_var) for one in everyones)
    assert ours.num_batches_tracked == 2


def close(a, b):
    b = torch.as_tensor(b)
    assert (a.detach() - b).abs().max().item() <= 1e-11 * max(1, b.abs().max().item()) if b.numel() else True


def check_all(rank, ranks, cases):
    for case in cases:
        try:
            check_against_one_process(rank, ranks, *case)
        except Exception as wrong:
            raise AssertionError(f"rank {rank} of {ranks}: {case}") from wrong


FUSED = {"relu": True, "add": True}


@pytest.mark.parametrize("counts", [(12, 20), (7, 0, 9), (1, 2, 4), (5,)], ids=str)
def test_ranks_merge_to_the_same_bits_as_merge(rng, counts):
    mean, var = rng.normal(3, 2, (len(counts), 33)), rng.uniform(0.1, 5, (len(counts), 33))
    table = torch.from_numpy(np.column_stack([mean, var, counts]))
    got = [each.numpy() for each in merged(table)]
    want = sbn.merge(*map(sbn.Statistics, mean, var, counts))
    assert got[0].tobytes() == want.mean.tobytes() and got[1].tobytes() == want.var.tobytes()
    assert got[2] == pytest.approx(want.count, rel=1e-15)
    assert got[3].tolist() == [count / sum(counts) for count in counts]


@pytest.mark.parametrize("kind", [np.float64, np.float32])
def test_ranks_move_running_statistics_to_the_same_bits_as_the_engine(rng, kind):
    x = rng.normal(3, 2, (8, 5, 4, 4)).astype(kind)
    before = rng.uniform(0.5, 2, (2, 5)).astype(kind)
    mean, var = before.copy()
    new_mean, new_var, count = sbn.batch_norm(x, mean, var, training=True, momentum=0.1)[1].state.moments
    news, keep = (new_mean, new_var * unbiased(count)), torch.zeros(5, dtype=torch.bool)
    for old, new, got in zip(before, news, (mean, var), strict=True):
        old, new = torch.from_numpy(old), torch.from_numpy(new)
        want = moved(old, new, keep, 0.1).numpy()
        assert want.dtype == kind and want.tobytes() == got.tobytes()
        assert torch.equal(moved(old, new, ~keep, 0.1), old)


def test_two_ranks_are_one_process():
    spawn(check_all, 2, [(name, [5, 3], {}) for name in SAMPLERS])


def test_four_ranks_uneven_and_empty_are_one_process():
    cases = [(name, [4, 2, 6, 3], {"relu": True}) for name in ("full", "run", "hybrid")]
    cases += [("full", sizes, FUSED) for sizes in ([4, 2, 6, 3], [4, 0, 6, 3], [1, 0, 0, 0])]
    spawn(check_all, 4, cases)


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 3), nn.BatchNorm2d(2),
        nn.Flatten(), nn.Linear(8, 2),
    ).double()  # fmt: skip


def train_in_parallel(rank, ranks, static):
    """DistributedDataParallel, gradients accumulated over two batches: the single process with all of it."""
    from torch.nn.parallel import DistributedDataParallel

    single = network()
    model = convert_sampled_batchnorm(network(), sbn.Full(), process_group="world")
    parallel = DistributedDataParallel(model, static_graph=static)
    both = [torch.optim.SGD(each.parameters(), 0.1) for each in (single, parallel)]
    for step in range(3):
        generator = torch.Generator().manual_seed(step)
        batches = torch.randn(2, 4 * ranks, 3, 4, 4, generator=generator, dtype=torch.float64)
        for batch in batches:
            single(batch).square().mean().backward()
        if static:  # which gradient accumulation under no_sync is not
            for batch in batches:
                parallel(batch.chunk(ranks)[rank]).square().mean().backward()
        else:
            with parallel.no_sync():
                parallel(batches[0].chunk(ranks)[rank]).square().mean().backward()
            parallel(batches[1].chunk(ranks)[rank]).square().mean().backward()
        for optimizer in both:
            optimizer.step()
            optimizer.zero_grad()
    for a, b in zip(model.state_dict().values(), single.state_dict().values(), strict=True):
        close(a, b) if a.dtype == torch.float64 else None


def train_both_ways(rank, ranks):
    for static in (False, True):
        train_in_parallel(rank, ranks, static)


def test_distributed_data_parallel_is_one_process():
    spawn(train_both_ways, 2)


def refuse(rank, ranks):
    ours = SampledBatchNorm2d(3, process_group="world")
    with pytest.raises(ValueError, match="got one over all ranks"):
        ours(torch.ones(1 if rank == 0 else 0, 3, 1, 1))
    assert ours.num_batches_tracked == 0
    x = torch.randn(2, 3, 2, 2, requires_grad=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        torch.autograd.grad(ours(x).square().sum(), x, create_graph=True)


def test_what_ranks_refuse():
    spawn(refuse, 2)


def test_a_group_of_one_process_needs_none():
    x = torch.randn(4, 3, 2, 2)
    assert torch.equal(SampledBatchNorm2d(3, process_group="world")(x), SampledBatchNorm2d(3)(x))
