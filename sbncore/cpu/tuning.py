"""Constants of the CPU engine that were chosen by measurement: effect, unit, figure, machine, command.

"Measured" gives the figure and the day; where it names no machine or no command, that is not on record. The
benchmark results of those days (bench/results/*-cpu.md) come from a two-core AMD EPYC. "Compare" is the
command that shows another value's effect: run it with the old value and the new in one session, since the
same code's ratios move by a fifth from machine to machine of one processor (docs/cpu.md). SHAPES stands for
``python -m bench layer --out FOLDER --shapes``, TARGETS for ``python -m bench targets``, over all shapes.

*Bits*: the value decides which terms are summed in float32, or in which order, or where a product is rounded,
so that another changes the last bits of results. A change of this file gives the kernels' object code another
folder: they are compiled anew.
"""

from __future__ import annotations

# --- Sums in float32 (float64 for float64), before they are flushed to float64

# Terms that one lane adds up. Bits. Measured: not on record; chosen for accuracy.
LANE_TERMS = 256  # terms

# Values of a channel, at most, whose mean is its shift: several, against outliers. Bits. Measured: not on
# record; chosen for accuracy.
PILOTS = 16  # values

# What a run of channels-last memory adds up between two flushes: so many elements, but so many places at
# least, which share the work of a flush. Bits. Measured: flushing cost more than summing at 2048 channels
# (2026-11-23); the machine, the command and the elements are not on record. Compare: SHAPES 32x2048x7x7.
FLUSH_ELEMENTS = 16384  # elements
FLUSH_PLACES = 64  # places

# --- Tasks that the engine divides a call into

# Elements worth a task of their own, and the tasks that a call has at most (channels-last; a quarter of
# them are blocks of channels, channels-first). Bits. Measured: not on record. Compare: TARGETS.
TASK_ELEMENTS = 16384  # elements
MAX_TASKS = 64  # tasks

# Tasks, at most, that share the runs of channels-last memory. Bits. Measured: not on record. Compare:
# TARGETS.
RUN_TASKS = 32  # tasks

# Elements of one sample that a task of channels-first memory goes over. Bits. Measured: not on record; it was
# 16384 until 2026-11-25. Compare: TARGETS.
SEGMENT_ELEMENTS = 65536  # elements

# The same of maps of fewer than 16 positions. Measured: not on record; it was 4096 until 2026-11-24. Compare:
# SHAPES 64x512x3x3 --layouts first.
SHORT_MAPS_ELEMENTS = 2048  # elements

# Values of a channel, at least, that a sweep's task adds up. Bits. Measured: not on record. Compare: TARGETS.
SWEEP_VALUES = 512  # values

# Elements of a row of channels-last memory, at least: a few channels are repeated. Bits. Measured: not on
# record. Compare: SHAPES 32x3x224x224 --layouts last.
ROW_ELEMENTS = 256  # elements

# Size of an array of which most is drawn up to which it takes two sweeps, rather than blocks of channels,
# which jump from sample to sample. Bits. Measured: Full() at 1 to 4 MB takes 0.65 to 0.8 of the time
# (2026-11-25); the machine and the command are not on record. Compare: SHAPES 16x64x28x28 --samplers full.
TWO_SWEEPS_ELEMENTS = 1 << 20  # elements

# Size of an array from which on a call takes more than one thread. Measured: below, two threads were slower
# than one, and to start them takes 50 to 100 us (2026-11-23); the machine and the command are not on record.
# Compare: SHAPES 16x64x28x28 --threads 1, and --threads 2.
PARALLEL_ELEMENTS = 1 << 20  # elements

# So many times smaller an array is worth OpenMP's threads, which spin between PyTorch's calls and so are
# awake. Measured: not on record. Compare: as PARALLEL_ELEMENTS, with --against torch.
OPENMP_ADVANTAGE = 8  # times

# --- Tasks that the kernels divide their phases into

# Channels of channels-last memory whose sums are one task. Measured: not on record. Compare: SHAPES
# 32x2048x7x7 --layouts last.
CHANNEL_BLOCK = 128  # channels

# Elements of a channel that are read twice in the time that the repair of one run takes (channels-first):
# where so many runs are drawn that it is quicker, all of dx is written after the sums. Bits. Measured: not on
# record (2026-11-24). Compare: SHAPES 128x64x14x14 --samplers fs/16 --layouts first.
RUN_REPAIR_ELEMENTS = 100  # elements

# Reads of a counter before a waiting thread yields its core: there may be more threads than cores. Measured:
# not on record. Compare: SHAPES 16x320x20x20 with more --threads than cores.
SPINS = 1000  # reads

# --- Memory

# What is prefetched lies so far ahead of what a pass over a row or a segment computes. Measured: not on
# record (2026-11-25), but that channels-last outputs which stay in the caches are better not prefetched: 0.9
# of the time of a pass over 8 MB. Compare: TARGETS.
PREFETCH_DISTANCE = 512  # elements

# The same of a pass over runs, rounded up to whole runs of the next channels. Measured: not on record; it was
# 128 until 2026-11-25. Compare: TARGETS.
RUN_PREFETCH_DISTANCE = 512  # elements

# A cache line of x86-64 and of most ARM: where arrays begin that are written past the caches, so that whole
# lines are. Measured: a line of which one half is written past the caches and the other is not takes 150 ns
# (2026-11-25); the machine and the command are not on record.
CACHE_LINE = 64  # bytes

# The last cache where the system tells of none so large. Not measured: an assumption.
LAST_CACHE_BYTES = 32 << 20  # bytes

# A gradient is written past the caches from this fraction of the last cache on (SBNCORE_STREAM, in bytes,
# overrides it). Measured: not on record. Compare: TARGETS with SBNCORE_STREAM=0 and without.
NONTEMPORAL_FRACTION = 8  # the last cache over it

# An output so many times larger is: a forward has fewer arrays in the cache. Measured: outputs of 6 to 17 MB
# are 10 to 30 % faster than with 1 (2026-11-24); the machine and the command are not on record. Compare: as
# NONTEMPORAL_FRACTION.
NONTEMPORAL_OUTPUT_FACTOR = 3  # times

# --- Compilation

# What a kernel takes to compile on one core, for the message that says so. Measured: about that (2026-11-26);
# the machine is not on record. Compare: ``python -m sbncore warmup`` with an empty SBNCORE_CACHE_DIR.
COMPILE_SECONDS = 12  # seconds
