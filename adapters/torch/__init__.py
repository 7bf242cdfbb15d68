"""PyTorch layers, a converter for models, virtual samples: sampled batch normalization in torch's own terms."""

from sbncore.adapters.torch.layers import (
    SampledBatchNorm,
    SampledBatchNorm1d,
    SampledBatchNorm2d,
    SampledBatchNorm3d,
)
from sbncore.adapters.torch.replay import checkpoint_contexts

__all__ = [
    "SampledBatchNorm", "SampledBatchNorm1d", "SampledBatchNorm2d", "SampledBatchNorm3d",
    "checkpoint_contexts",
]  # fmt: skip
