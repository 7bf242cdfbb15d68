"""Batch normalization on the CPU: Numba kernels and their launch."""
