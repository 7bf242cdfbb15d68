"""Storing vectors of 16 lanes (`sbncore.cpu.lanes`), also past the caches.

Streamed (non-temporal) stores do not read first what they overwrite; they fill whole cache lines.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from llvmlite.ir import instructions
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from sbncore.cpu.elements import compute_type, narrow, pointer
from sbncore.cpu.lanes import FLOAT, I1, I32, I64, LANES, Vector

STREAMED = 64  # bytes, a cache line: where an array begins whose stores are streamed, whole lines at a time


@intrinsic
def store_lanes(
    typingctx: Any, array: Any, index: Any, value: Any, keep: Any, stream: Any
) -> tuple[Any, Callable[..., Any]]:
    """Round to nearest even and write as elements from ``index`` on, past the caches if ``stream``.

    A streamed store of all lanes begins at a multiple of its own size, or of STREAMED bytes. The lanes of a
    part are written one by one, that is quicker than a masked store, and not past the caches.
    """

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        value, size = narrow(builder, array, args[2], LANES), array.dtype.bitwidth // 8
        first = pointer(context, builder, array, *args[:2])

        def write(what: Any, place: Any, streamed: bool) -> None:
            place = builder.bitcast(place, what.type.as_pointer())
            if not streamed:
                builder.store(what, place).align = size
            else:
                if size == 2:
                    what = _fenced(builder, what)
                    place = builder.bitcast(place, what.type.as_pointer())
                store = _StreamedStore(builder.block, what, place)
                builder._insert(store)
                store.align = min(STREAMED, LANES * size)
                store.set_metadata("nontemporal", builder.module.add_metadata([ir.Constant(I32, 1)]))

        def write_all(streamed: bool) -> None:
            if not isinstance(keep, types.UniTuple):
                write(value, first, streamed)
                return
            lanes = cgutils.alloca_once(builder, value.type)
            builder.store(value, lanes)
            element = ir.IntType(8 * size)
            elements = builder.bitcast(lanes, element.as_pointer())
            begin, end = (builder.extract_value(args[3], k) for k in range(2))
            count = builder.sub(end, begin)
            with cgutils.for_range(builder, count) as loop:
                lane = builder.add(begin, loop.index)
                # atomic, or LLVM makes the loop a call of memcpy, for a few elements
                one = builder.load_atomic(builder.gep(elements, [lane]), "monotonic", size)
                write(one, cgutils.gep_inbounds(builder, first, lane), False)

        if isinstance(stream, types.Boolean) and not isinstance(keep, types.UniTuple):
            with builder.if_else(args[4]) as (streamed, cached):
                with streamed:
                    write_all(True)
                with cached:
                    write_all(False)
        else:
            write_all(False)
        return context.get_dummy_value()

    return types.void(array, types.intp, Vector(compute_type(array)), keep, stream), codegen


@intrinsic
def aligned(typingctx: Any, array: Any) -> tuple[Any, Callable[..., Any]]:
    """Whether an array begins where a store may be streamed; None does."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        if not isinstance(array, types.Array):
            return ir.Constant(I1, 1)
        zero = ir.Constant(context.get_value_type(types.intp), 0)
        begin = builder.ptrtoint(pointer(context, builder, array, args[0], zero), I64)
        rest = builder.and_(begin, ir.Constant(I64, STREAMED - 1))
        return builder.icmp_unsigned("==", rest, ir.Constant(I64, 0))

    return types.boolean(array), codegen


@intrinsic
def fence(typingctx: Any) -> tuple[Any, Callable[..., Any]]:
    """Have streamed stores done before anything that follows."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), codegen


def _fenced(builder: Any, value: Any) -> Any:
    """The bits of 16 halves as floats, narrowed already: what narrows and stores in one does not stream."""
    kind = ir.VectorType(FLOAT, LANES // 2)
    fence = cgutils.get_or_insert_function(
        builder.module, ir.FunctionType(kind, [kind]), f"llvm.arithmetic.fence.v{LANES // 2}f32"
    )
    return builder.call(fence, [builder.bitcast(value, kind)])


class _StreamedStore(instructions.StoreInstr):
    """A volatile store, or LLVM makes one of it and of an ordinary one, which is not streamed.

    Half a line that is streamed beside half a line that is not takes 150 ns.
    """

    def descr(self, buf: list[str]) -> None:
        value, place = self.operands
        metadata = self._stringify_metadata(leading_comma=True)
        buf.append(
            f"store volatile {value.type} {value.get_reference()}, {place.type} {place.get_reference()}"
            f", align {self.align}{metadata}\n"
        )
