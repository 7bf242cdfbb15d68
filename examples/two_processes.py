"""Two processes, DistributedDataParallel: each draws its own sample, statistics are of both.

As SyncBatchNorm does, the layers of a process group merge their moments (`process_group=`), here of a
sixteenth of each process's data. Beside it, without a group, every process normalizes by its own sample.
Run it: python examples/two_processes.py
"""

import os
import socket

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from sbncore.adapters.torch import convert_sampled_batchnorm

RANKS, STEPS = 2, 20


def network():
    torch.manual_seed(0)  # the same weights everywhere
    return nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.BatchNorm2d(16),
        nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 2),
    )  # fmt: skip


def take_part(rank, port):
    """Be one process of the group, which outlives the models that hold it.

    A DistributedDataParallel that outlived its group would end it while it keeps the interpreter's lock, for
    which the group's own threads may wait: PyTorch hangs then, now and again.
    """
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=RANKS)
    torch.set_num_threads(1)
    for together in (True, False):
        train(rank, together)
    dist.destroy_process_group()


def train(rank, together):
    """Train one process's share: two kinds of images, bright in a channel or in another."""
    group = {"process_group": dist.group.WORLD} if together else {}
    model = DistributedDataParallel(convert_sampled_batchnorm(network(), fuse=True, **group))
    optimizer = torch.optim.SGD(model.parameters(), 0.1, 0.9)
    random = torch.Generator().manual_seed(rank)  # other images in each
    for _ in range(STEPS):
        labels = torch.randint(0, 2, (16,), generator=random)
        x = torch.randn(16, 3, 16, 16, generator=random)
        x[torch.arange(16), labels] += 0.5
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), labels)
        loss.backward()
        optimizer.step()
    means = [torch.empty(16) for _ in range(RANKS)]
    dist.all_gather(means, model.module[1].running_mean)
    if rank == 0:
        equal = all(torch.equal(means[0], mean) for mean in means)
        print(f"{'one group' if together else 'each alone'}: loss {loss.item():.3f},", end=" ")
        print(f"running statistics {'equal' if equal else 'differ'} between the processes")


if __name__ == "__main__":
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(take_part, (port,), RANKS)
