"""Choosing samplers: how near each layer's statistics come, asked of one's own data.

A network that has trained a little is asked what its layers can do with; what is printed says for each its
share of the memory, the choice with its error in standard deviations, and what was too far off. Run it:
python examples/choose_samplers.py
"""

import torch
from sklearn.datasets import load_digits
from torch import nn

from sbncore.adapters.torch import convert_sampled_batchnorm, suggest_samplers

torch.set_num_threads(1)
torch.manual_seed(0)
digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 8 - 1
x, labels = nn.functional.interpolate(images, scale_factor=4, mode="bilinear"), torch.tensor(digits.target)

model = nn.Sequential(
    nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
    nn.Conv2d(16, 32, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(),
    nn.Conv2d(32, 32, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(),
    nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10),
)  # fmt: skip


def train(model, batches):
    """Train for some batches; return the mean loss of the last ten."""
    optimizer, losses = torch.optim.SGD(model.parameters(), 0.05, 0.9), []
    for k in range(batches):
        chosen = torch.arange(k * 64, k * 64 + 64) % len(x)
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x[chosen]), labels[chosen])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return sum(losses[-10:]) / 10


print(f"with nn.BatchNorm2d, loss {train(model, 28):.3f}\n")
chosen = suggest_samplers(model, x[:128], tolerance=0.05)
print(chosen)
model = convert_sampled_batchnorm(model, chosen, fuse=True)
print(f"\nsampled, loss {train(model, 28):.3f}")
