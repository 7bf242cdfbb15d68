"""Elements in memory and in arithmetic: the only place that knows how a half or a bfloat16 is stored.

NumPy has no bfloat16 and Numba no float16 on the CPU, so the engine sees both as integers of their
bits: int16 is float16, uint16 is bfloat16. They are computed in float32, rounded to nearest even.

The metadata tells LLVM that outputs and accumulators never alias inputs (`sbncore.checks` refuses
overlaps, but for the same element of the same array, which is read before it is written); without it
the loops with many arrays are not vectorized.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, overload

FLOAT16, BFLOAT16 = types.int16, types.uint16
I16, I32, HALF, FLOAT = ir.IntType(16), ir.IntType(32), ir.HalfType(), ir.FloatType()


def _pointer(context: Any, builder: Any, sig: Any, args: Any) -> Any:
    array = context.make_array(sig.args[0])(context, builder, args[0])
    return cgutils.gep_inbounds(builder, array.data, args[1])


def _mark(builder: Any, instruction: Any, kind: str, *scopes: str) -> None:
    module = builder.module
    domain = module.add_metadata(["sbncore"])
    marks = [module.add_metadata([scope, domain]) for scope in scopes]
    instruction.set_metadata(kind, module.add_metadata(marks))


def _compute_type(array: types.Array) -> types.Float:
    return types.float64 if array.dtype == types.float64 else types.float32


def _widen(builder: Any, array: types.Array, value: Any) -> Any:
    if array.dtype == FLOAT16:
        return builder.fpext(builder.bitcast(value, HALF), FLOAT)
    if array.dtype == BFLOAT16:
        return builder.bitcast(builder.shl(builder.zext(value, I32), ir.Constant(I32, 16)), FLOAT)
    return value


@intrinsic
def load(typingctx: Any, array: Any, index: Any) -> tuple[Any, Callable[..., Any]]:
    """Element ``index`` of an input, widened to the type it is computed in."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        value = builder.load(_pointer(context, builder, sig, args))
        _mark(builder, value, "noalias", "output", "accumulator")
        return _widen(builder, array, value)

    return _compute_type(array)(array, types.intp), codegen


@intrinsic
def reload(typingctx: Any, array: Any, index: Any) -> tuple[Any, Callable[..., Any]]:
    """Element ``index`` of an output, as it was stored."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return _widen(builder, array, builder.load(_pointer(context, builder, sig, args)))

    return _compute_type(array)(array, types.intp), codegen


@intrinsic
def peek(typingctx: Any, array: Any, index: Any) -> tuple[Any, Callable[..., Any]]:
    """Element ``index`` of an array that no output aliases, as it is."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        value = builder.load(_pointer(context, builder, sig, args))
        _mark(builder, value, "noalias", "output", "accumulator")
        return value

    return array.dtype(array, types.intp), codegen


@intrinsic
def signs(typingctx: Any, array: Any, index: Any) -> tuple[Any, Callable[..., Any]]:
    """Eight bits from element ``index`` of an output on: 0 where what was stored is <= 0, lowest first."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        pointer = _pointer(context, builder, sig, args)
        vector = ir.VectorType(context.get_data_type(array.dtype), 8)
        value = builder.load(builder.bitcast(pointer, vector.as_pointer()))
        value.align = array.dtype.bitwidth // 8
        kind = FLOAT
        if array.dtype == FLOAT16:
            value = builder.fpext(builder.bitcast(value, ir.VectorType(HALF, 8)), ir.VectorType(FLOAT, 8))
        elif array.dtype == BFLOAT16:
            wide = ir.VectorType(I32, 8)
            value = builder.shl(builder.zext(value, wide), ir.Constant(wide, [16] * 8))
            value = builder.bitcast(value, ir.VectorType(FLOAT, 8))
        elif array.dtype == types.float64:
            kind = ir.DoubleType()
        zeros = ir.Constant(ir.VectorType(kind, 8), [0.0] * 8)
        return builder.bitcast(builder.fcmp_unordered("ugt", value, zeros), ir.IntType(8))

    return types.uint8(array, types.intp), codegen


@intrinsic
def spread(typingctx: Any, array: Any, index: Any, byte: Any) -> tuple[Any, Callable[..., Any]]:
    """Write a byte's eight bits as eight elements from ``index`` on: 0 or not, lowest first."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        I8, vector = ir.IntType(8), ir.VectorType(ir.IntType(8), 8)
        one = builder.insert_element(ir.Constant(vector, ir.Undefined), args[2], ir.Constant(I32, 0))
        lanes = ir.Constant(ir.VectorType(I32, 8), [0] * 8)
        every = builder.shuffle_vector(one, ir.Constant(vector, ir.Undefined), lanes)
        bits = builder.and_(every, ir.Constant(vector, [ir.Constant(I8, 1 << k) for k in range(8)]))
        pointer = builder.bitcast(_pointer(context, builder, sig, args), vector.as_pointer())
        builder.store(bits, pointer).align = 1
        return context.get_dummy_value()

    return types.void(array, types.intp, types.uint8), codegen


@intrinsic
def store(typingctx: Any, array: Any, index: Any, value: Any) -> tuple[Any, Callable[..., Any]]:
    """Round ``value`` to nearest even and write it as element ``index`` of an output."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        value = args[2]
        if array.dtype == FLOAT16:
            value = builder.bitcast(builder.fptrunc(value, HALF), I16)
        elif array.dtype == BFLOAT16:
            bits = builder.bitcast(value, I32)
            odd = builder.and_(builder.lshr(bits, ir.Constant(I32, 16)), ir.Constant(I32, 1))
            nearest = builder.add(bits, builder.add(odd, ir.Constant(I32, 0x7FFF)))
            quiet = builder.or_(bits, ir.Constant(I32, 0x400000))
            nan = builder.fcmp_unordered("uno", value, value)
            bits = builder.select(nan, quiet, nearest)
            value = builder.trunc(builder.lshr(bits, ir.Constant(I32, 16)), I16)
        written = builder.store(value, _pointer(context, builder, sig, args))
        _mark(builder, written, "alias.scope", "output")
        return context.get_dummy_value()

    return types.void(array, types.intp, _compute_type(array)), codegen


@intrinsic
def accumulate(typingctx: Any, array: Any, index: Any, value: Any) -> tuple[Any, Callable[..., Any]]:
    """Add ``value`` to element ``index`` of an accumulator."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        pointer = _pointer(context, builder, sig, args)
        before = builder.load(pointer)
        after = builder.store(builder.fadd(before, args[2]), pointer)
        for instruction in (before, after):
            _mark(builder, instruction, "alias.scope", "accumulator")
            _mark(builder, instruction, "noalias", "output")
        return context.get_dummy_value()

    return types.void(array, types.intp, array.dtype), codegen


def at(coefficient, index):
    """A channel's coefficient: the scalar of a channels-first row, or element of a channels-last one."""


@overload(at, inline="always")
def _at(coefficient, index):
    if isinstance(coefficient, types.Array):
        return lambda coefficient, index: load(coefficient, index)
    return lambda coefficient, index: coefficient


def zero(array):
    """0 in the type an array's elements are computed in."""


@overload(zero, inline="always")
def _zero(array):
    constant = np.float64(0) if array.dtype == types.float64 else np.float32(0)
    return lambda array: constant


def cast(array, value):
    """A value in the type an array's elements are computed in."""


@overload(cast, inline="always")
def _cast(array, value):
    kind = np.float64 if array.dtype == types.float64 else np.float32
    return lambda array, value: kind(value)


def room(mask, size):
    """A byte for each of ``size`` elements where there is a mask, else None."""


@overload(room, inline="always")
def _room(mask, size):
    if isinstance(mask, types.Array):
        return lambda mask, size: np.empty(size, np.uint8)
    return lambda mask, size: None
