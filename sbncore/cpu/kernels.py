"""The kernels as C functions: which there are, where their object code is, and loading it, without Numba."""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import hashlib
import os
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterable
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from sbncore.cpu import ahead

DTYPES = {"float64": "d", "float32": "f", "float16": "h", "bfloat16": "H"}  # with NumPy's letter as stored
MEMORIES = "channels_first", "short_maps", "channels_last"
DRAWS = "map_places", "whole_samples"
# files that the objects do not depend on; a new one left out here costs a compilation, no more
HOST = "__init__", "ahead", "call", "draws", "engine", "kernels", "threads"
# levels of x86-64 that a wheel has objects for, the best first, and what LLVM says of a CPU that has them
V3 = "avx2", "bmi", "bmi2", "f16c", "fma", "lzcnt", "movbe"
LEVELS = {"x86-64-v4": (*V3, "avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"), "x86-64-v3": V3}
SHIPPED = Path(__file__).with_name("objects")
_NAMES = {letter: name for name, letter in DTYPES.items()}
_SIGNATURE = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
Function = Callable[[int], None]  # of a record's address; releases the GIL
loaded: dict[str, Function] = {}
# One for each object: functions of two that were compiled in two processes may bear the same name.
_linkers: dict[str, Any] = {}
_lock = threading.RLock()


class Kernel(NamedTuple):
    """What a kernel is compiled for; ``residual`` is in backward whether its gradient is written."""

    memory: str
    direction: str
    dtype: str
    relu: bool = False
    residual: bool = False
    mask: bool = False

    def __str__(self) -> str:
        options = (name for name in ("relu", "residual", "mask") if getattr(self, name))
        return "-".join((self.memory, self.direction, self.dtype, *options))

    @classmethod
    def named(cls, name: str) -> Kernel:
        """Return the kernel of a name."""
        memory, direction, dtype, *options = name.split("-")
        return cls(memory, direction, dtype, *(o in options for o in ("relu", "residual", "mask")))


def names(memories: Iterable[str] = MEMORIES, dtypes: Iterable[str] = tuple(DTYPES)) -> list[str]:
    """Return the names of all functions, or of those for some layouts of memory and some dtypes."""
    found = [*DRAWS]
    for memory, dtype in product(memories, dtypes):
        for relu, residual, mask in product((False, True), repeat=3):
            if not mask or (relu and residual):
                found.append(str(Kernel(memory, "forward", dtype, relu, residual, mask)))
        for relu, residual, mask in product((False, True), repeat=3):
            if mask <= relu and residual <= mask:
                found.append(str(Kernel(memory, "backward", dtype, relu, residual, mask)))
    return found


@cache
def kernel(
    memory: str, direction: str, letter: str, relu: bool, residual: bool, mask: bool, trains: bool
) -> Function:
    """Return a kernel over arrays whose storage type has that letter.

    With a forward that ``trains`` come its backward and the draws, so that what is missing of them is
    compiled at the same time.
    """
    kind = Kernel(memory, direction, _NAMES[letter], relu, residual, mask)
    if not trains:
        return functions(str(kind))[0]
    return functions(str(kind), *DRAWS, str(kind._replace(direction="backward", residual=mask)))[0]


def functions(*names: str) -> list[Function]:
    """Return the C functions of these names, compiled where nobody has yet."""
    with _lock:
        missing = [name for name in names if name not in loaded and _file(name) is None]
        if missing:
            ahead.fill(_writable(), missing, cpu())
        return [_load(name) for name in names]


def compiled(name: str) -> Function | None:
    """Return a C function, or None where nobody has compiled it yet."""
    return loaded.get(name) or (None if _file(name) is None else _load(name))


def _file(name: str) -> Path | None:
    found = (folder / f"{name}.o" for folder in places())
    return next((file for file in found if file.exists()), None)


def _load(name: str) -> Function:
    with _lock:
        if name not in loaded:
            file = _file(name)
            assert file is not None
            _linkers[name] = linker = _linker()
            linker.add_object_file(_llvm().ObjectFileRef.from_path(str(file)))
            linker.finalize_object()
            loaded[name] = _SIGNATURE(linker.get_function_address(name))
        return loaded[name]


@cache
def places() -> list[Path]:
    """Return where this CPU's objects may be: shipped with the package, or in the cache."""
    name, features = cpu()
    fit = [name]
    if "NUMBA_CPU_NAME" not in os.environ:
        fit += [level for level, needed in LEVELS.items() if has(features, needed)]
    shipped = (SHIPPED / folder_name(each) for each in fit)
    return [*(folder for folder in shipped if folder.is_dir()), cache_folder() / folder_name(name, features)]


@cache
def _writable() -> Path:
    """Where what is missing is compiled to: the cache, or a folder of this process's."""
    folder = places()[-1]
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            return folder
    warnings.warn(f"sbncore: no writable cache at {folder}, kernels compile anew", stacklevel=2)
    temporary = tempfile.TemporaryDirectory(prefix="sbncore-")
    atexit.register(temporary.cleanup)
    places().append(Path(temporary.name))
    return places()[-1]


def cache_folder() -> Path:
    """Return where folders of objects are kept: $SBNCORE_CACHE_DIR, or the user's cache."""
    place = os.environ.get("SBNCORE_CACHE_DIR")
    if place:
        return Path(place)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sbncore"


def has(features: str, needed: Iterable[str]) -> bool:
    """Return whether a CPU of such features has those needed."""
    return set(features.split(",")).issuperset(f"+{one}" for one in needed)


def folder_name(cpu_name: str, features: str = "") -> str:
    """Return the name of a folder of objects: for which system and CPU, of which sources."""
    what = hashlib.sha256(features.encode())
    for source in sorted(Path(__file__).parent.glob("*.py")):
        if source.stem not in HOST:
            what.update(source.read_bytes())
    return f"{sys.platform}-{cpu_name}-{what.hexdigest()[:12]}"


@cache
def cpu() -> tuple[str, str]:
    """Return the name and the features of the CPU that is compiled for; NUMBA_CPU_NAME names another."""
    llvm, name = _llvm(), os.environ.get("NUMBA_CPU_NAME")
    features = os.environ.get("NUMBA_CPU_FEATURES")
    if features is None:
        features = "" if name else llvm.get_host_cpu_features().flatten()
    return name or llvm.get_host_cpu_name(), features


@cache
def _llvm() -> Any:
    from llvmlite import binding

    return binding


def _linker() -> Any:
    llvm = _llvm()
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    machine = llvm.Target.from_default_triple().create_target_machine()
    return llvm.create_mcjit_compiler(llvm.parse_assembly(""), machine)


def _unlock() -> None:
    """In a forked child nobody is left to release the lock."""
    global _lock
    _lock = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_unlock)
