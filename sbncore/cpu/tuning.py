"""Constants of the CPU engine that were chosen by measurement: unit, effect, and what is on record of it.

Where a constant names no machine and no command, neither is on record: its commit gives a figure at most. The
benchmark results of the same days (bench/results/*-cpu.md) come from a two-core AMD EPYC. To judge another
value, compare ``python -m bench layer`` (--shapes and --layouts narrow it) or ``python -m bench targets``
with the old value and the new in one session: the same code's ratios move by a fifth from machine to machine
of one processor (docs/cpu.md).

*Bits*: the value decides which terms are summed in float32 or in which order, so that another changes the
results' last bits. A change of this file gives the kernels' object code another folder: they are compiled
anew.
"""

from __future__ import annotations

# --- What a kernel sums in float32 (float64 for float64); beyond it sums are float64

# Terms that one lane adds up. Bits. Chosen for accuracy; no measurement on record.
LANE_TERMS = 256

# Values of a channel whose mean is its shift: more than one against outliers. Bits. No measurement on record.
PILOTS = 16

# --- Tasks

# Channels of channels-last memory whose sums are one task. No measurement on record.
CHANNEL_BLOCK = 128

# Elements of a channel that are read twice in the time that the repair of one run takes (channels-first):
# where so many runs are drawn that this is quicker, all of dx is written after the sums. Figures not on
# record.
RUN_REPAIR_ELEMENTS = 100

# Reads of a counter before a waiting thread yields its core: there may be more threads than cores. No
# measurement on record.
SPINS = 1000

# --- Memory

# Elements between what a pass computes and what it prefetches, in a row or a segment. Figures not on record,
# but: channels-last outputs that stay in the caches are not prefetched, for 0.9 of the time of a pass over 8
# MB (25 November 2026).
PREFETCH_DISTANCE = 512

# The same over runs of each channel; further on by whole runs. Figures not on record.
RUN_PREFETCH_DISTANCE = 512

# Bytes of a cache line, on x86-64 and most ARM: where arrays begin that are written past the caches, so that
# whole lines are. A line of which one half is streamed and the other not takes 150 ns.
CACHE_LINE = 64

# Bytes from which on PyTorch's new arrays are asked for in huge pages, as NumPy does by itself. In small
# pages the memory took three times the kernels' time (23 November 2026).
HUGE_PAGES_FROM = 4 << 20
