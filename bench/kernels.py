"""python -m bench kernels: compile every CUDA kernel, without a GPU, and print what each needs.

NVRTC (on PyPI: nvidia-cuda-nvrtc) compiles to machine code for each architecture, no driver wanted.
"""

from __future__ import annotations

import argparse
import ctypes
import glob
import json
import multiprocessing
import os
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from typing import NamedTuple

from sbncore.cuda.device import OPTIONS, source

ARCHITECTURES = ("sm_75", "sm_80", "sm_90", "sm_100")
TYPES = {"double": 2, "float": 4, "float16": 8, "bfloat16": 8}  # elements of 16 bytes
REGISTERS = 65536  # of a multiprocessor
SHARED = {"sm_75": 65536, "sm_80": 167936, "sm_90": 233472, "sm_100": 233472}  # bytes, likewise
THREADS = {"sm_75": 1024}  # likewise; 2048 elsewhere
BLOCK = 256
ENDS = ("FIRST", "LAST")  # layouts that any width of access has
CUPYS = ("-ftz=true",)  # what CuPy adds: float32 subnormals are 0


class Kernel(NamedTuple):
    """What the assembler says of one kernel, in bytes but for the registers."""

    name: str
    registers: int
    shared: int
    stack: int
    spilled: int

    def occupancy(self, architecture: str) -> float:
        """Return the share of the threads a multiprocessor can hold, in blocks of 256."""
        threads = THREADS.get(architecture, 2048)
        each = -(-self.registers // 8) * 8 * BLOCK
        blocks = min(REGISTERS // each, SHARED[architecture] // (self.shared + 1024), threads // BLOCK)
        return blocks * BLOCK / threads


def instances(types: Iterable[str] = tuple(TYPES)) -> list[str]:
    """Return every kernel that the engine can ask for, as its template's instance."""
    names = ["draw"]
    flags = ("false", "true")
    gradients = ("PLAIN", "RELU", "MASKED")
    for kind in types:
        names += [f"finish_{which}<{kind},{layout}>" for which in ("forward", "backward") for layout in ENDS]
        columns = [(TYPES[kind], layout) for layout in ("FIRST", "SEAMED", "LAST")]
        for V, layout in (*columns, *((1, layout) for layout in ENDS)):
            instance = f"{kind},{V},{layout}"
            names += [f"sums<{instance},MOMENTS,true>"]
            names += [f"sums<{instance},{mode},{flag}>" for mode in gradients for flag in flags]
            names += [f"normalize<{instance},{a},{b}>" for a in flags for b in flags]
            names += [f"repair<{instance},{mode}>" for mode in gradients]
        for V, layout in (*columns[::2], *((1, layout) for layout in ENDS)):
            instance = f"{kind},{V},{layout}"
            names += [f"sums_of_places<{instance},{mode}>" for mode in ("MOMENTS", *gradients)]
            names += [f"repair_places<{instance},{mode}>" for mode in gradients]
    return names


class NVRTC:
    """The compiler's library, where PyPI or a toolkit has put it."""

    def __init__(self) -> None:
        folders = [os.path.join(path, "nvidia", "*", "lib") for path in sys.path]
        found = [path for folder in folders for path in glob.glob(os.path.join(folder, "libnvrtc.so.*"))]
        self._library = ctypes.CDLL(found[0] if found else "libnvrtc.so")

    def compile(self, names: list[str], architecture: str) -> tuple[str, str, dict[str, str]]:
        """Return the assembler's log, the PTX, and the instances' names as the linker knows them.

        Raises:
            RuntimeError: with the compiler's log, if it fails.
        """
        call, program = self._library, ctypes.c_void_p()
        text = source().encode()
        call.nvrtcCreateProgram(ctypes.byref(program), text, b"sbn.cu", 0, None, None)
        for name in names:
            call.nvrtcAddNameExpression(program, name.encode())
        options = [f"--gpu-architecture={architecture}", *OPTIONS, *CUPYS, "--ptxas-options=-v"]
        encoded = (ctypes.c_char_p * len(options))(*[option.encode() for option in options])
        failed = call.nvrtcCompileProgram(program, len(options), encoded)
        log = self._text(program, "ProgramLog")
        if failed:
            raise RuntimeError(log)
        lowered = {}
        for name in names:
            symbol = ctypes.c_char_p()
            call.nvrtcGetLoweredName(program, name.encode(), ctypes.byref(symbol))
            lowered[(symbol.value or b"").decode()] = name
        ptx = self._text(program, "PTX")
        call.nvrtcDestroyProgram(ctypes.byref(program))
        return log, ptx, lowered

    def _text(self, program: ctypes.c_void_p, what: str) -> str:
        size = ctypes.c_size_t()
        getattr(self._library, f"nvrtcGet{what}Size")(program, ctypes.byref(size))
        buffer = ctypes.create_string_buffer(size.value)
        getattr(self._library, f"nvrtcGet{what}")(program, buffer)
        return buffer.value.decode(errors="replace")


def compiled(names: list[str], architecture: str) -> tuple[list[Kernel], dict[str, str]]:
    """Compile some kernels; return what each needs and the PTX of each."""
    log, ptx, lowered = NVRTC().compile(names, architecture)
    return list(_needs(log, lowered)), _texts(ptx, lowered)


def _needs(log: str, lowered: dict[str, str]) -> Iterator[Kernel]:
    name, stack, spilled = "", 0, 0
    for line in log.splitlines():
        if entry := re.search(r"Compiling entry function '(\w+)'", line):
            name = lowered.get(entry[1], "draw")  # no template: compiled every time
        if frame := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+)", line):
            stack, spilled = int(frame[1]), int(frame[2]) + int(frame[3])
        if used := re.search(r"Used (\d+) registers", line):
            shared = re.search(r"(\d+) bytes smem", line)
            yield Kernel(name, int(used[1]), int(shared[1]) if shared else 0, stack, spilled)


def _texts(ptx: str, lowered: dict[str, str]) -> dict[str, str]:
    pieces = re.split(r"\.entry (\w+)\(", ptx)
    entries = zip(pieces[1::2], pieces[2::2], strict=True)
    return {lowered.get(symbol, "draw"): text for symbol, text in entries}


def table(kernels: Iterable[Kernel], architecture: str) -> str:
    """Return a Markdown table of what kernels need."""
    lines = [
        f"| kernel, {architecture} | registers | shared memory, bytes | stack | spilled | occupancy |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    lines += [
        f"| `{k.name}` | {k.registers} | {k.shared} | {k.stack} | {k.spilled} "
        f"| {k.occupancy(architecture):.0%} |"
        for k in kernels
    ]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m bench kernels", description=__doc__.splitlines()[0])
    parser.add_argument("--arch", nargs="+", default=["sm_90"], help=f"of {', '.join(ARCHITECTURES)}")
    parser.add_argument("--types", nargs="+", default=list(TYPES), choices=list(TYPES))
    parser.add_argument("--cache", action="store_true", help="compile all into CuPy's cache, for its GPU")
    chosen = parser.parse_args(arguments)
    if chosen.cache:
        fill_cache()
        return 0
    jobs = [(kind, architecture) for architecture in chosen.arch for kind in chosen.types]
    for (_, architecture), kernels in zip(jobs, compile_all(jobs), strict=True):
        print(table(kernels, architecture), flush=True)
    return 0


def fill_cache(workers: int | None = None) -> None:
    """Compile every kernel for this machine's GPU into CuPy's cache, in processes of their own."""
    names, count = instances(), workers or os.cpu_count() or 1
    with ProcessPoolExecutor(count, mp_context=multiprocessing.get_context("spawn")) as pool:
        list(pool.map(_fill, [names[k::count] for k in range(count)]))
    print(f"{len(names)} kernels compiled, or found in CuPy's cache")


def _fill(names: list[str]) -> None:
    from sbncore.cuda.device import device_at

    device_at(0).compile(names)


def compile_all(jobs: list[tuple[str, str]]) -> Iterator[list[Kernel]]:
    """Compile (type, architecture) after (type, architecture), one on each core."""

    def compile_one(job: tuple[str, str]) -> list[Kernel]:
        code = "import sys; from bench import kernels; kernels.compile_and_tell(*sys.argv[1:])"
        done = subprocess.run([sys.executable, "-c", code, *job], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{job}: {done.stderr}")
        return [Kernel(*each) for each in json.loads(done.stdout)]

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield from pool.map(compile_one, jobs)


def compile_and_tell(kind: str, architecture: str) -> None:
    """Compile all kernels of a type and print what they need as JSON: the child's part of `compile_all`."""
    kernels, _ = compiled(instances([kind]), architecture)
    json.dump(kernels, sys.stdout)
