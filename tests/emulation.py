"""The CUDA kernels without a GPU: sbncore/cuda through g++, launched by the real engine on NumPy arrays."""

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import pytest

from bench.kernels import instances
from sbncore import arguments, arrays, layout, run
from sbncore.cuda import call, device, record

if platform.machine() not in ("x86_64", "AMD64") or shutil.which("g++") is None:
    pytest.skip("the emulator needs g++ and an x86-64 processor", allow_module_level=True)

EMULATOR = Path(__file__).parent / "emulator"
UNWRITTEN = 0xAB


def build(kinds, source=None, optimize=True):
    """Compile the kernels of some element types, kept by their text; returns the library's path."""
    text = device.source().partition("// A call's arguments")[1:]
    text = "".join(text) if source is None else source
    names = [name for name in instances(types=kinds)]
    table = "\n".join(f'{{"{name}", [](void* call) {{ {name}(*(const Call*)call); }}}},' for name in names)
    before, behind = ((EMULATOR / name).read_text() for name in ("device.h", "host.h"))
    behind = behind.replace('#include "instances.inc"', table)
    return library(f"{before}\n{text}\n{behind}", "-O1" if optimize else "-O0", "-ffp-contract=off")


def library(source, *options):
    """Compile a library from C++, kept by its text; return its path."""
    digest = hashlib.sha256("\n".join([source, *options]).encode()).hexdigest()[:16]
    folder = Path(tempfile.gettempdir()) / f"sbncore-emulator-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    kept = folder / f"{digest}.so"
    if not kept.exists():
        with tempfile.TemporaryDirectory(dir=folder) as work:
            unit, made = Path(work, "unit.cpp"), Path(work, "made.so")
            unit.write_text(source)
            subprocess.run(
                ["g++", "-std=c++17", "-w", *options, "-fPIC", "-shared", str(unit), "-o", str(made)],
                check=True, capture_output=True, text=True,
            )  # fmt: skip
            made.rename(kept)
    return kept


class EmulatedDevice:
    """Stands in for `sbncore.cuda.device.Device`; memory it hands out, and what it is shown, is watched."""

    def __init__(self, libraries, multiprocessors=3, seed=0):
        self._libraries = [ctypes.CDLL(str(library)) for library in libraries]
        for library in self._libraries:
            library.launch.restype = ctypes.c_char_p
            library.call_size.restype = ctypes.c_longlong
            assert library.call_size() == record.SIZE
        self.multiprocessors, self.seed = multiprocessors, seed
        self.launches = []
        self._named = {}

    def empty(self, shape, dtype):
        array = np.empty(shape, dtype)
        array.view(np.uint8).fill(UNWRITTEN) if array.size else None
        self.name(array, written=False)
        return array

    def step(self, array):
        return array

    def launch(self, launches, packed, stream=None):
        for each in launches:
            self.launches.append(each)
            self._launch(*each, packed)

    def _launch(self, name, grid, threads, packed):
        memory = ctypes.create_string_buffer(packed, len(packed))
        for library in self._libraries:
            library.forget_arrays()
            for begin, (size, written, array) in self._named.items():
                if not written.all():  # elements that the host wrote itself
                    bits = array.reshape(-1).view(np.uint8).reshape(-1, array.itemsize)
                    written |= np.repeat((bits != UNWRITTEN).any(axis=1), array.itemsize)
                library.name_array(
                    ctypes.c_void_p(begin), ctypes.c_longlong(size), ctypes.c_void_p(written.ctypes.data)
                )
            self.seed += 1
            sizes, seed = [*map(ctypes.c_uint, (*grid, threads))], ctypes.c_ulonglong(self.seed)
            wrong = library.launch(name.encode(), *sizes, memory, seed)
            if wrong != b"no such kernel was compiled":
                break
        if wrong:
            raise AssertionError(f"{name}, grid {grid} of {threads} threads: {wrong.decode()}")

    def traffic(self):
        """Return bytes loaded, bytes stored, accesses of 16 bytes, and narrower ones, since the last time."""
        total = np.zeros(4, np.int64)
        for library in self._libraries:
            counts = np.zeros(4, np.int64)
            library.traffic(ctypes.c_void_p(counts.ctypes.data))
            total += counts
        return total

    def name(self, array, written=True):
        """Let the kernels touch an array: those bytes, and no others."""
        begin, nbytes = array.__array_interface__["data"][0], array.nbytes
        if nbytes and self._named.get(begin, (0,))[0] < nbytes:
            self._named[begin] = (nbytes, np.full(nbytes, written, np.uint8), array)

    def forget(self, begin):
        """Let the kernels no longer touch what begins there."""
        self._named.pop(begin, None)

    def mark(self, begin, nbytes):
        """Count bytes of named arrays as written, by other than kernels."""
        for first, (size, written, _) in self._named.items():
            if begin < first + size and first < begin + nbytes:
                written[max(begin - first, 0) : begin + nbytes - first] = 1


@contextlib.contextmanager
def emulated(emulator):
    """Within, `sbncore`'s functions take NumPy arrays to the CUDA engine, on an EmulatedDevice."""

    def watched(array):
        emulator.name(array)
        return array.__array_interface__["data"][0]

    def look(view):
        return view.shape, view.strides, view.dtype.char, watched(view) % 16

    with pytest.MonkeyPatch.context() as patched:
        calls = functools.cache(lambda signature: call.Call(signature._replace(device=0)))
        patched.setattr(call, "device_at", lambda index: emulator)
        patched.setattr(arguments, "call_for", calls)
        patched.setattr(arguments, "_prepared", {})
        patched.setattr(arguments, "look", look)
        for module in (layout, arrays):
            patched.setattr(module, "aligned", lambda view: watched(view) % 16 == 0)
        patched.setattr(run, "address", watched)
        patched.setattr(run, "new", lambda view, size, dtype: emulator.empty(size, dtype))
        yield emulator
