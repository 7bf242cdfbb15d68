"""Fine-tuning: a small ResNet, trained with nn.BatchNorm2d, is converted and trains on.

Two epochs on scikit-learn's digits, then two more from the same weights, once as it is and once converted.
Prints test accuracy and time for each epoch; `revert_sampled_batchnorm` gives the model back as PyTorch
knows it. Run it: python examples/fine_tune_a_resnet.py
"""

import copy
import time

import torch
from sklearn.datasets import load_digits
from torch import nn

from sbncore.adapters.torch import convert_sampled_batchnorm, revert_sampled_batchnorm

torch.set_num_threads(1)
digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 8 - 1
x, labels = nn.functional.interpolate(images, scale_factor=2), torch.tensor(digits.target)
TRAINED, BATCH = 1500, 50


class Block(nn.Module):
    """Two convolutions beside a shortcut."""

    def __init__(self, channels, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(channels // stride, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut = nn.Conv2d(channels // stride, channels, 1, stride) if stride > 1 else nn.Identity()

    def forward(self, x):
        h = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(h)) + self.shortcut(x))


def epoch(model, number):
    """Train for an epoch; return the test accuracy and the seconds it took."""
    optimizer = torch.optim.SGD(model.parameters(), 0.02, 0.9)
    model.train()
    began = time.perf_counter()
    for chosen in torch.randperm(TRAINED, generator=torch.Generator().manual_seed(number)).split(BATCH):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[chosen]), labels[chosen]).backward()
        optimizer.step()
    took = time.perf_counter() - began
    model.eval()
    with torch.no_grad():
        right = model(x[TRAINED:]).argmax(1) == labels[TRAINED:]
    return right.float().mean().item(), took


torch.manual_seed(0)
model = nn.Sequential(
    nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(), Block(16, 1), Block(32, 2),
    nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10),
)  # fmt: skip
for number in (1, 2):
    print("epoch {}                    {:.1%}  {:.2f} s".format(number, *epoch(model, number)))

sampled = convert_sampled_batchnorm(copy.deepcopy(model), fuse=True)  # BN, addition and ReLU become one call
for number in (3, 4):
    for name, each in (("nn.BatchNorm2d", model), ("sampled", sampled)):
        print("epoch {}, {:<18}{:.1%}  {:.2f} s".format(number, name, *epoch(each, number)))

plain = revert_sampled_batchnorm(sampled)  # to save, to export, for a machine without sbncore
kinds = {type(module).__name__ for module in plain.modules() if "BatchNorm" in type(module).__name__}
print("reverted:", *kinds)
