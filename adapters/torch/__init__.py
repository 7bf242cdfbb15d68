"""Sampled batch normalization for PyTorch: layers, a converter for models, virtual samples."""

try:
    import torch as _  # noqa: F401
except ImportError as missing:
    raise ImportError(
        f"sbncore.adapters.torch needs PyTorch ({missing}): pip install 'sbncore[torch]'"
    ) from missing

from sbncore.adapters.torch import exchange
from sbncore.adapters.torch.convert import convert_sampled_batchnorm, revert_sampled_batchnorm
from sbncore.adapters.torch.layers import (
    SampledBatchNorm,
    SampledBatchNorm1d,
    SampledBatchNorm2d,
    SampledBatchNorm3d,
)
from sbncore.adapters.torch.replay import checkpoint_contexts
from sbncore.adapters.torch.suggest import Suggested, suggest_samplers
from sbncore.adapters.torch.virtual import VirtualBatch

__all__ = [
    "SampledBatchNorm", "SampledBatchNorm1d", "SampledBatchNorm2d", "SampledBatchNorm3d",
    "convert_sampled_batchnorm", "revert_sampled_batchnorm", "checkpoint_contexts",
    "VirtualBatch", "suggest_samplers", "Suggested",
]  # fmt: skip

exchange.register()
