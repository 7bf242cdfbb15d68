"""The GPU engine: CUDA C++ kernels, and their launch through CuPy."""
