"""Every CUDA kernel compiles for every architecture, without a GPU, and as the assembler should leave it."""

import functools
import re

import pytest

from bench import kernels

pytest.importorskip("nvidia", reason="needs nvidia-cuda-nvrtc from PyPI")
JOBS = [(kind, architecture) for architecture in kernels.ARCHITECTURES for kind in kernels.TYPES]


@functools.cache
def everything():
    return dict(zip(JOBS, kernels.compile_all(JOBS), strict=True))


@pytest.mark.parametrize(("kind", "architecture"), JOBS)
def test_every_kernel_compiles_and_keeps_to_its_registers(kind, architecture):
    needs = everything()[kind, architecture]
    assert {k.name for k in needs} == set(kernels.instances([kind]))
    for kernel in needs:
        assert kernel.stack == kernel.spilled == 0, kernel
        assert kernel.shared <= 49152, kernel
        # 512 threads with 4 loads of 16 bytes each in flight: 32 KB, over what the latency of memory asks
        assert kernel.occupancy(architecture) >= 0.25, kernel


# What a pass over everything reads and writes for UNROLL rows of a column.
ACCESSES = {
    "normalize<float16,8,SEAMED,true,true>": (8, 4),
    "normalize<float,4,FIRST,false,false>": (4, 4),
    "normalize<double,2,LAST,true,false>": (4, 4),
    "sums<bfloat16,8,LAST,MOMENTS,true>": (4, 0),
    "sums<float16,8,FIRST,RELU,true>": (8, 4),
    "sums<float,4,SEAMED,MASKED,true>": (8, 8),
    "sums<float,4,SEAMED,PLAIN,false>": (4, 4),  # without its sums, x is not read
    "repair<float16,8,LAST,PLAIN>": (8, 4),
    "sums_of_places<float16,8,FIRST,MOMENTS>": (4, 0),
    "repair_places<bfloat16,8,FIRST,RELU>": (8, 4),
}
WIDE = r"{}\.global(?:\.\w+)*\.v4\.(?:u|b|f)32|{}\.global(?:\.\w+)*\.v2\.(?:u|b|f)64"


def test_passes_over_everything_use_accesses_of_16_bytes():
    """In the PTX: a load and a store for each of the rows and arrays that a thread takes at a time."""
    _, texts = kernels.compiled(list(ACCESSES), "sm_90")
    for name, (loads, stores) in ACCESSES.items():
        text = texts[name]
        assert len(re.findall(WIDE.format("ld", "ld"), text)) >= loads, name
        assert len(re.findall(WIDE.format("st", "st"), text)) >= stores, name


def test_kernels_are_compiled_without_any_header_and_without_local_memory():
    assert "#include" not in kernels.source()
    _, texts = kernels.compiled(["normalize<float,4,SEAMED,true,true>"], "sm_80")
    assert ".local" not in texts["normalize<float,4,SEAMED,true,true>"]


def test_the_table_is_printed(capsys):
    some = [kernels.Kernel("sums<float,4,LAST,PLAIN,true>", 94, 17824, 0, 0)]
    assert "| `sums<float,4,LAST,PLAIN,true>` | 94 | 17824 | 0 | 0 | 25% |" in kernels.table(some, "sm_90")
