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

from sbncore.cpu import channels_first, channels_last, short_maps
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


first_forward, first_backward = channels_first.forward, channels_first.backward
short_forward, short_backward = short_maps.forward, short_maps.backward
last_forward, last_backward = channels_last.forward, channels_last.backward


@jit()
def forward(entry, threads, arguments):
    launch(entry, threads, first_forward, arguments)


@jit()
def backward(entry, threads, arguments):
    launch(entry, threads, first_backward, arguments)


@jit()
def forward_short(entry, threads, arguments):
    launch(entry, threads, short_forward, arguments)


@jit()
def backward_short(entry, threads, arguments):
    launch(entry, threads, short_backward, arguments)


@jit()
def forward_last(entry, threads, arguments):
    launch(entry, threads, last_forward, arguments)


@jit()
def backward_last(entry, threads, arguments):
    launch(entry, threads, last_backward, arguments)


TEAMS = {
    first_forward: forward, first_backward: backward, short_forward: forward_short,
    short_backward: backward_short, last_forward: forward_last, last_backward: backward_last,
}  # fmt: skip
