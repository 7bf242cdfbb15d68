"""Batch normalization on the CPU: Numba kernels and their launch.

What is compiled, each file importing only those above it::

    record          the argument of every kernel; counters, flags (loaded without Numba)
    tuning          constants that were chosen by measurement (loaded without Numba)
    elements        arrays and elements in memory, how float16 and bfloat16 are stored
    vectors         16 elements in registers: loads, stores, arithmetic
    tasks           how threads share a call's tasks
    runs            the sample: drawn, split
    per_channel     moments, coefficients, running statistics, dweight and dbias
    rows            what is computed of 16 elements; passes with a coefficient for each element
    segments        passes with a coefficient for each channel: channels-first
    channels_first, short_maps, channels_last    the kernels, by memory layout
    build           their object code
"""
