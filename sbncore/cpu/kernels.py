"""The kernels as C functions: the cache of their object code, and loading it, without Numba."""

from __future__ import annotations

import ctypes
import hashlib
import os
import tempfile
import threading
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from sbncore.cpu.names import DTYPES, Kernel

# files that the objects do not depend on; a new one left out here costs a compilation, no more
HOST = "__init__", "calls", "draws", "engine", "kernels", "names", "pages", "phases", "threads"
_NAMES = {letter: name for name, letter in DTYPES.items()}
_SIGNATURE = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
_lock = threading.RLock()
Function = Callable[[int], None]  # of a record's address; releases the GIL
loaded: dict[str, Function] = {}
compiled: list[str] = []  # by this process


@cache
def kernel(
    memory: str, direction: str, letter: str, relu: bool, residual: bool, mask: bool
) -> Function:
    """Return a kernel over arrays whose storage type has that letter."""
    return function(str(Kernel(memory, direction, _NAMES[letter], relu, residual, mask)))


def function(name: str) -> Function:
    """Return the C function of that name, loaded, and before that compiled where nobody has yet."""
    with _lock:
        if name in loaded:
            return loaded[name]
        engine, file = _linker(), _folder() / f"{name}.o"
        try:
            code = file.read_bytes()
        except OSError:
            from sbncore.cpu.build import object_code

            code = object_code(name)
            compiled.append(name)
            _keep(file, code)
        engine.add_object_file(_llvm().ObjectFileRef.from_data(code))
        engine.finalize_object()
        loaded[name] = _SIGNATURE(engine.get_function_address(name))
        return loaded[name]


def _keep(file: Path, code: bytes) -> None:
    """Write the code for other processes to find, whole or not at all."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=file.parent, delete=False) as new:
            new.write(code)
        os.replace(new.name, file)
    except OSError:
        _warn_once()


@cache
def _warn_once() -> None:
    warnings.warn("sbncore: no writable cache, kernels compile anew", stacklevel=2)


@cache
def _folder() -> Path:
    """Where this CPU's objects are, of these sources."""
    llvm, place = _llvm(), os.environ.get("SBNCORE_CACHE_DIR")
    if not place:
        place = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    what = hashlib.sha256(f"{llvm.llvm_version_info} {cpu()}".encode())
    for source in sorted(Path(__file__).parent.glob("*.py")):
        if source.stem not in HOST:
            what.update(source.read_bytes())
    return Path(place) / "sbncore" / what.hexdigest()[:16]


@cache
def cpu() -> tuple[str, str]:
    """The name and the features of the CPU that is compiled for."""
    llvm, name = _llvm(), os.environ.get("NUMBA_CPU_NAME")
    features = os.environ.get("NUMBA_CPU_FEATURES")
    if features is None:
        features = "" if name else llvm.get_host_cpu_features().flatten()
    return name or llvm.get_host_cpu_name(), features


@cache
def _llvm() -> Any:
    from llvmlite import binding

    return binding


@cache
def _linker() -> Any:
    llvm = _llvm()
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    machine = llvm.Target.from_default_triple().create_target_machine()
    return llvm.create_mcjit_compiler(llvm.parse_assembly(""), machine)
