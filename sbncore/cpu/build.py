"""Compile kernels by Numba: ``python -m sbncore.cpu.build FOLDER NAME...``, of `sbncore.cpu.kernels`.

No kernel allocates, raises or counts references: none needs Numba's runtime. So what is compiled runs in
processes that never load Numba, and on threads that Python knows nothing of.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core.compiler_lock import global_compiler_lock

from sbncore.cpu import channels_first, channels_last, runs, short_maps
from sbncore.cpu.elements import array_at, loop, record_at
from sbncore.cpu.kernels import DRAWS, DTYPES, Kernel

MODULES = {"channels_first": channels_first, "short_maps": short_maps, "channels_last": channels_last}


def object_code(name: str) -> bytes:
    """Return the object code of the C function of a name in `sbncore.cpu.kernels`."""
    return c_object(name, getattr(runs, name) if name in DRAWS else entry(Kernel.named(name)))


@global_compiler_lock
def c_object(name: str, function: Callable[..., Any]) -> bytes:
    """Return the object code of ``void name(void *)``, which calls a function of one address.

    Numba's own `cfunc` reports exceptions to Python, for which it needs Numba's runtime.
    """
    dispatcher, kinds = loop()(function), (types.voidptr,)
    dispatcher.compile(kinds)
    compiled = dispatcher.overloads[kinds]
    context = dispatcher.targetctx
    library = context.codegen().create_library(name)
    library.enable_object_caching()
    module = library.create_ir_module(name)
    entry = ir.Function(module, ir.FunctionType(ir.VoidType(), [ir.IntType(8).as_pointer()]), name)
    builder = ir.IRBuilder(entry.append_basic_block())
    context.call_internal_no_propagate(builder, compiled.fndesc, compiled.signature, entry.args)
    builder.ret_void()
    library.add_ir_module(module)
    library.add_linking_library(compiled.library)
    library.finalize()
    library.get_pointer_to_function(name)  # compiles it
    return bytes(library._get_compiled_object())


def entry(kernel: Kernel) -> Callable[[Any], None]:
    """Return the function of a record's address that calls a kernel with the record and its arrays.

    An array's last argument to ``array_at`` is a scalar of its type; None leaves the array out of what is
    compiled.
    """
    body = getattr(MODULES[kernel.memory], kernel.direction)
    element = np.dtype(DTYPES[kernel.dtype]).type(0)
    residual, bits = element if kernel.residual else None, np.uint8(0) if kernel.mask else None
    relu = True if kernel.relu else None

    def forward(address):
        r = record_at(address)
        size = (r.N * r.C * r.S,)
        mask = array_at(r.mask, (r.mask_size,), bits)
        y, x = array_at(r.y, size, element), array_at(r.x, size, element)
        body(r, y, mask, x, array_at(r.residual, size, residual), relu)

    def backward(address):
        r = record_at(address)
        size = (r.N * r.C * r.S,)
        mask = array_at(r.mask, (r.mask_size,), bits)
        dx, dy, x = array_at(r.dx, size, element), array_at(r.dy, size, element), array_at(r.x, size, element)
        body(r, dx, array_at(r.dresidual, size, residual), dy, x, mask, relu)

    return {"forward": forward, "backward": backward}[kernel.direction]


def write(folder: Path, name: str) -> None:
    """Compile a function into a file, for other processes to find, whole or not at all."""
    code = object_code(name)
    with tempfile.NamedTemporaryFile(dir=folder, delete=False) as file:
        file.write(code)
    os.chmod(file.name, 0o644)
    os.replace(file.name, folder / f"{name}.o")


if __name__ == "__main__":
    for name in sys.argv[2:]:
        write(Path(sys.argv[1]), name)
