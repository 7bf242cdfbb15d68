"""Sampled batch normalization for JAX: a pure function."""

try:
    import jax as _  # noqa: F401
except ImportError as missing:
    raise ImportError(f"sbncore.adapters.jax needs JAX ({missing}): pip install 'sbncore[jax]'") from missing

from sbncore.adapters.jax.function import batch_norm

__all__ = ["batch_norm"]
