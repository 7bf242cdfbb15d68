"""How the kernels are compiled: functions of each other in Numba, and the C functions that Python calls.

Nothing here needs Numba's runtime: no function allocates, raises or counts references. So what is compiled
runs in processes that never load Numba, and on threads that Python knows nothing of.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import njit, types
from numba.core.compiler_lock import global_compiler_lock

I8P = ir.IntType(8).as_pointer()


def loop(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """Compile as a part of the C functions that call it."""

    def decorate(function: Callable[..., Any]) -> Any:
        compiler: Any = njit  # its types lack what leaves out the entries
        without = {"no_cpython_wrapper": True, "no_cfunc_wrapper": True, "_nrt": False}
        return compiler(error_model="numpy", **without, **options)(function)

    return decorate


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
    entry = ir.Function(module, ir.FunctionType(ir.VoidType(), [I8P]), name)
    builder = ir.IRBuilder(entry.append_basic_block())
    context.call_internal_no_propagate(builder, compiled.fndesc, compiled.signature, entry.args)
    builder.ret_void()
    library.add_ir_module(module)
    library.add_linking_library(compiled.library)
    library.finalize()
    library.get_pointer_to_function(name)  # compiles it
    return bytes(library._get_compiled_object())
