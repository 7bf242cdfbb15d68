"""Sampled batch normalization: forward and backward functions over raw arrays.

``import sbncore as sbn`` loads NumPy and nothing heavier; engines are loaded when first called.
"""

from sbncore.cpu.threads import get_num_threads, set_num_threads
from sbncore.drawing import Sampler
from sbncore.estimates import Fidelity, fidelity, suggest
from sbncore.functional import Grads, Saved, backward, forward, moments, normalize, repair
from sbncore.gradients import GradientReport, check_gradients
from sbncore.noise import white_noise
from sbncore.plans import Plan, Recipe
from sbncore.residuals import Residuals
from sbncore.samplers import (
    BatchSampling,
    FeatureSampling,
    Full,
    Mixture,
    NaiveSampling,
    Prior,
    VirtualSamples,
)
from sbncore.statistics import Statistics, merge
from sbncore.training import batch_norm

__version__ = "0.1.0"

__all__ = [
    "Full", "BatchSampling", "FeatureSampling", "NaiveSampling", "VirtualSamples", "Mixture", "Prior",
    "Sampler", "Plan", "Recipe", "forward", "backward", "Saved", "Grads", "Residuals",
    "batch_norm", "moments", "merge", "normalize", "repair", "white_noise", "Statistics",
    "check_gradients", "GradientReport", "fidelity", "Fidelity", "suggest",
    "get_num_threads", "set_num_threads",
]  # fmt: skip


def __dir__() -> list[str]:
    return sorted(__all__)
