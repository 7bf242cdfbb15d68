"""Kernels run by the OpenMP threads that PyTorch brought: its own spin on the cores that ours would want.

GNU's entry point, ``GOMP_parallel(function, data, threads, flags)``, is called by address; LLVM's and Intel's
OpenMP have it too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from sbncore.cpu import channels_first, channels_last
from sbncore.cpu.compiled import jit

I8P, I32 = ir.IntType(8).as_pointer(), ir.IntType(32)


@intrinsic
def launch(
    typingctx: Any, entry: Any, threads: Any, kernel: Any, arguments: Any
) -> tuple[Any, Callable[..., Any]]:
    """Call ``kernel(*arguments)`` on every thread of a team, and wait for them."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        kinds = tuple(arguments.types)
        kernel.dispatcher.compile(kinds)
        compiled = kernel.dispatcher.overloads[kinds]
        context.active_code_library.add_linking_library(compiled.library)
        data = cgutils.alloca_once_value(builder, args[3])
        kind = ir.FunctionType(ir.VoidType(), [I8P])
        body = ir.Function(builder.module, kind, builder.module.get_unique_name("team"))
        body.linkage = "internal"
        inner = ir.IRBuilder(body.append_basic_block())
        value = inner.load(inner.bitcast(body.args[0], data.type))
        each = [inner.extract_value(value, k) for k in range(len(kinds))]
        context.call_internal_no_propagate(inner, compiled.fndesc, compiled.signature, each)
        inner.ret_void()
        parallel = ir.FunctionType(ir.VoidType(), [kind.as_pointer(), I8P, I32, I32])
        function = builder.inttoptr(args[0], parallel.as_pointer())
        count = builder.trunc(args[1], I32)
        builder.call(function, [body, builder.bitcast(data, I8P), count, ir.Constant(I32, 0)])
        return context.get_dummy_value()

    return types.void(types.intp, types.intp, kernel, arguments), codegen


forward_kernel, backward_kernel = channels_first.forward, channels_first.backward
sums_kernel, normalize_kernel = channels_last.sums, channels_last.normalize
repair_kernel = channels_last.repair


@jit()
def forward(entry, threads, arguments):
    launch(entry, threads, forward_kernel, arguments)


@jit()
def backward(entry, threads, arguments):
    launch(entry, threads, backward_kernel, arguments)


@jit()
def sums(entry, threads, arguments):
    launch(entry, threads, sums_kernel, arguments)


@jit()
def normalize(entry, threads, arguments):
    launch(entry, threads, normalize_kernel, arguments)


@jit()
def repair(entry, threads, arguments):
    launch(entry, threads, repair_kernel, arguments)


TEAMS = {
    forward_kernel: forward, backward_kernel: backward, sums_kernel: sums, normalize_kernel: normalize,
    repair_kernel: repair,
}  # fmt: skip
