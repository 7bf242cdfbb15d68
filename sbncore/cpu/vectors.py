"""Vectors of 16 lanes in registers: loads, stores past the caches or not, arithmetic, bits of a mask.

Numba's loops leave it to LLVM how they are vectorized; here kernels say it. LLVM makes of 16 lanes what the
CPU has: one AVX-512 register, two of AVX2, four of NEON or SSE, else scalars. The lanes, and so the order
of sums, are the same everywhere. ``active`` is the lanes that take part, (first, end); None is all of them.

A load widens elements to the type they are computed in, a store rounds to nearest even. Non-temporal stores
do not read first what they overwrite; they fill whole cache lines.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from llvmlite.ir import instructions
from numba import types
from numba.core import cgutils
from numba.core.datamodel import models
from numba.core.typing.templates import AbstractTemplate, infer_global, signature
from numba.extending import intrinsic, lower_builtin, register_model

from sbncore.cpu.elements import compute_type, narrow, pointer, widen
from sbncore.cpu.record import LANES
from sbncore.cpu.tuning import CACHE_LINE

I1, I8, I16, I32, I64 = (ir.IntType(bits) for bits in (1, 8, 16, 32, 64))
FLOAT, DOUBLE = ir.FloatType(), ir.DoubleType()


class Vector(types.Type):
    """16 values of the type elements are computed in."""

    def __init__(self, dtype: types.Float) -> None:
        super().__init__(f"Vector({dtype})")
        self.dtype = dtype


class Bits(types.Type):
    """16 truth values."""

    def __init__(self) -> None:
        super().__init__("Bits")


def _vector(kind: Any) -> ir.VectorType:
    return ir.VectorType(DOUBLE if kind == types.float64 else FLOAT, LANES)


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager: Any, kind: Vector) -> None:
        super().__init__(manager, kind, _vector(kind.dtype))


@register_model(Bits)
class _BitsModel(models.PrimitiveModel):
    def __init__(self, manager: Any, kind: Bits) -> None:
        super().__init__(manager, kind, ir.VectorType(I1, LANES))


def _define(function: Any, instruction: str) -> None:
    class Operator(AbstractTemplate):
        def generic(self, args: Any, kws: Any) -> Any:
            if len(args) == 2 and isinstance(args[0], Vector) and args[0] == args[1]:
                return signature(args[0], *args)
            return None

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return getattr(builder, instruction)(*args)

    infer_global(function)(Operator)
    lower_builtin(function, Vector, Vector)(lower)


for _function, _instruction in ((operator.add, "fadd"), (operator.sub, "fsub"), (operator.mul, "fmul")):
    _define(_function, _instruction)


_SUFFIX = {I16: "i16", FLOAT: "f32", DOUBLE: "f64"}


def _within(builder: Any, active: Any) -> Any:
    # of 32 bits: half as many comparisons
    lanes = ir.Constant(ir.VectorType(I32, LANES), [ir.Constant(I32, k) for k in range(LANES)])
    ends = (builder.trunc(builder.extract_value(active, k), I32) for k in range(2))
    first, end = (_splat(builder, each) for each in ends)
    begun = builder.icmp_signed(">=", lanes, first)
    return builder.and_(begun, builder.icmp_signed("<", lanes, end))


def _load(context: Any, builder: Any, array: Any, value: Any, index: Any, active: Any) -> Any:
    vector = ir.VectorType(context.get_data_type(array.dtype), LANES)
    size = array.dtype.bitwidth // 8
    place = builder.bitcast(pointer(context, builder, array, value, index), vector.as_pointer())
    if isinstance(active.type, ir.ArrayType):
        align, blank = ir.Constant(I32, size), ir.Constant(vector, None)
        name = f"llvm.masked.load.v{LANES}{_SUFFIX[vector.element]}.p0"
        lanes = _within(builder, active)
        kind = ir.FunctionType(vector, [place.type, I32, lanes.type, vector])
        load = cgutils.get_or_insert_function(builder.module, kind, name)
        return builder.call(load, [place, align, lanes, blank])
    loaded = builder.load(place)
    loaded.align = size
    return loaded


@intrinsic
def load_lanes(typingctx: Any, array: Any, index: Any, active: Any) -> tuple[Any, Callable[..., Any]]:
    """Elements from ``index`` on, widened to the type they are computed in; 0 in inactive lanes."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return widen(builder, array, _load(context, builder, array, *args), LANES)

    return Vector(compute_type(array))(array, types.intp, active), codegen


@intrinsic
def broadcast(typingctx: Any, coefficient: Any, index: Any, active: Any) -> tuple[Any, Callable[..., Any]]:
    """Return a channel's coefficient in all lanes, or an array's from ``index`` on; or the vector itself."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        if isinstance(coefficient, types.Array):
            return _load(context, builder, coefficient, *args)
        return args[0] if isinstance(coefficient, Vector) else _splat(builder, args[0])

    kind = coefficient.dtype if isinstance(coefficient, types.Array | Vector) else coefficient
    return Vector(kind)(coefficient, types.intp, active), codegen


@intrinsic
def blend(typingctx: Any, count: Any, first: Any, second: Any) -> tuple[Any, Callable[..., Any]]:
    """Return the first ``count`` lanes of one vector and the others of a second; None of two of those."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        if not isinstance(first, Vector):
            return context.get_dummy_value()
        lanes = ir.Constant(ir.VectorType(I32, LANES), [ir.Constant(I32, k) for k in range(LANES)])
        bound = _splat(builder, builder.trunc(args[0], I32))
        return builder.select(builder.icmp_signed("<", lanes, bound), args[1], args[2])

    return first(types.intp, first, second), codegen


@intrinsic
def zeros(typingctx: Any, array: Any) -> tuple[Any, Callable[..., Any]]:
    """0 in every lane, in the type an array's elements are computed in."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return ir.Constant(_vector(compute_type(array)), None)

    return Vector(compute_type(array))(array), codegen


@intrinsic
def select(typingctx: Any, bits: Any, value: Any) -> tuple[Any, Callable[..., Any]]:
    """Return the value in some lanes, told by bits or as ``active``, and 0 in the others."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        if isinstance(bits, types.NoneType):
            return args[1]
        lanes = args[0] if isinstance(bits, Bits) else _within(builder, args[0])
        return builder.select(lanes, args[1], ir.Constant(args[1].type, None))

    return value(bits, value), codegen


@intrinsic
def above_zero(typingctx: Any, value: Any) -> tuple[Any, Callable[..., Any]]:
    """Whether a value is greater than 0, or NaN."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.fcmp_unordered("ugt", args[0], ir.Constant(args[0].type, None))

    return Bits()(value), codegen


@intrinsic
def read_bits(typingctx: Any, mask: Any, bit: Any) -> tuple[Any, Callable[..., Any]]:
    """Return the 16 bits of a mask from ``bit`` on, lowest first."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        bit = args[1]
        size = context.make_array(mask)(context, builder, args[0]).nitems
        end = builder.sub(builder.ashr(size, ir.Constant(size.type, 1)), ir.Constant(size.type, 1))
        both = []
        for k in (0, LANES - 1):  # the words of the first bit and of the last, which may lie beyond the end
            word = builder.ashr(builder.add(bit, ir.Constant(bit.type, k)), ir.Constant(bit.type, 4))
            word = builder.select(builder.icmp_signed("<", word, end), word, end)
            loaded = builder.load(_word(context, builder, mask, args[0], word))
            loaded.align = 1
            both.append(builder.zext(loaded, I32))
        pair = builder.or_(both[0], builder.shl(both[1], ir.Constant(I32, LANES)))
        shift = builder.trunc(builder.and_(bit, ir.Constant(bit.type, LANES - 1)), I32)
        bits = builder.trunc(builder.lshr(pair, shift), I16)
        return builder.bitcast(bits, ir.VectorType(I1, LANES))

    return Bits()(mask, types.intp), codegen


@intrinsic
def write_bits(typingctx: Any, mask: Any, word: Any, bits: Any) -> tuple[Any, Callable[..., Any]]:
    """Set the 16 bits of a mask's ``word``."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        bits = builder.bitcast(args[2], I16)
        builder.store(bits, _word(context, builder, mask, *args[:2])).align = 1
        return context.get_dummy_value()

    return types.void(mask, types.intp, bits), codegen


@intrinsic
def sum_lanes(typingctx: Any, value: Any) -> tuple[Any, Callable[..., Any]]:
    """Return the sum of all lanes in float64: of halves, of their halves, and so on."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        value = args[0]
        if value.type.element != DOUBLE:
            value = builder.fpext(value, ir.VectorType(DOUBLE, LANES))
        size = LANES
        while size > 1:
            size //= 2
            upper, lower = (
                ir.Constant(ir.VectorType(I32, size), [ir.Constant(I32, k + first) for k in range(size)])
                for first in (size, 0)
            )
            blank = ir.Constant(value.type, ir.Undefined)
            value = builder.fadd(
                builder.shuffle_vector(value, blank, lower), builder.shuffle_vector(value, blank, upper)
            )
        return builder.extract_element(value, ir.Constant(I32, 0))

    return types.float64(value), codegen


@intrinsic
def prefetch(typingctx: Any, array: Any, index: Any) -> tuple[Any, Callable[..., Any]]:
    """Begin to read the memory at an element; past an array's end nothing happens."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        memory = context.make_array(array)(context, builder, args[0]).data
        place = builder.bitcast(builder.gep(memory, [args[1]]), I8.as_pointer())
        kind = ir.FunctionType(ir.VoidType(), [I8.as_pointer(), I32, I32, I32])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        builder.call(function, [place, *(ir.Constant(I32, k) for k in (0, 3, 1))])
        return context.get_dummy_value()

    return types.void(array, types.intp), codegen


def _word(context: Any, builder: Any, mask: Any, value: Any, word: Any) -> Any:
    place = pointer(context, builder, mask, value, builder.mul(word, ir.Constant(word.type, 2)))
    return builder.bitcast(place, I16.as_pointer())


def _splat(builder: Any, scalar: Any) -> Any:
    vector = ir.VectorType(scalar.type, LANES)
    blank = ir.Constant(vector, ir.Undefined)
    one = builder.insert_element(blank, scalar, ir.Constant(I32, 0))
    return builder.shuffle_vector(one, blank, ir.Constant(ir.VectorType(I32, LANES), None))


@intrinsic
def store_lanes(
    typingctx: Any, array: Any, index: Any, value: Any, active: Any, nontemporal: Any
) -> tuple[Any, Callable[..., Any]]:
    """Round to nearest even and write as elements from ``index`` on, past the caches if ``nontemporal``.

    A non-temporal store begins at a multiple of its own size, or of CACHE_LINE bytes. The lanes of a partial
    vector are written one by one, which is quicker than a masked store, and not past the caches.
    """

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        value, size = narrow(builder, array, args[2], LANES), array.dtype.bitwidth // 8
        first = pointer(context, builder, array, *args[:2])

        def write(what: Any, place: Any, past_caches: bool) -> None:
            place = builder.bitcast(place, what.type.as_pointer())
            if not past_caches:
                builder.store(what, place).align = size
            else:
                if size == 2:
                    what = _fenced(builder, what)
                    place = builder.bitcast(place, what.type.as_pointer())
                store = _NontemporalStore(builder.block, what, place)
                builder._insert(store)
                store.align = min(CACHE_LINE, LANES * size)
                store.set_metadata("nontemporal", builder.module.add_metadata([ir.Constant(I32, 1)]))

        def write_all(past_caches: bool) -> None:
            if not isinstance(active, types.UniTuple):
                write(value, first, past_caches)
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

        if isinstance(nontemporal, types.Boolean) and not isinstance(active, types.UniTuple):
            with builder.if_else(args[4]) as (past_caches, ordinary):
                with past_caches:
                    write_all(True)
                with ordinary:
                    write_all(False)
        else:
            write_all(False)
        return context.get_dummy_value()

    return types.void(array, types.intp, Vector(compute_type(array)), active, nontemporal), codegen


@intrinsic
def aligned(typingctx: Any, array: Any) -> tuple[Any, Callable[..., Any]]:
    """Whether an array begins where a store may be non-temporal; None does."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        if not isinstance(array, types.Array):
            return ir.Constant(I1, 1)
        zero = ir.Constant(context.get_value_type(types.intp), 0)
        begin = builder.ptrtoint(pointer(context, builder, array, args[0], zero), I64)
        misaligned = builder.and_(begin, ir.Constant(I64, CACHE_LINE - 1))
        return builder.icmp_unsigned("==", misaligned, ir.Constant(I64, 0))

    return types.boolean(array), codegen


@intrinsic
def fence(typingctx: Any) -> tuple[Any, Callable[..., Any]]:
    """Complete all non-temporal stores before anything that follows."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), codegen


def _fenced(builder: Any, value: Any) -> Any:
    """Return the bits of 16 halves as floats: what narrows and stores in one is not non-temporal."""
    kind = ir.VectorType(FLOAT, LANES // 2)
    fence = cgutils.get_or_insert_function(
        builder.module, ir.FunctionType(kind, [kind]), f"llvm.arithmetic.fence.v{LANES // 2}f32"
    )
    return builder.call(fence, [builder.bitcast(value, kind)])


class _NontemporalStore(instructions.StoreInstr):
    """A volatile store: LLVM would merge it with an ordinary one, and the result is not non-temporal."""

    def descr(self, buf: list[str]) -> None:
        value, place = self.operands
        metadata = self._stringify_metadata(leading_comma=True)
        buf.append(
            f"store volatile {value.type} {value.get_reference()}, {place.type} {place.get_reference()}"
            f", align {self.align}{metadata}\n"
        )
