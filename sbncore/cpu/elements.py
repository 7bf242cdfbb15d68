"""Elements and arrays in memory, for kernels: the only file that tells how a half or a bfloat16 is stored.

NumPy has no bfloat16 and Numba no float16 on the CPU, so the engine sees both as integers of their bits:
int16 is float16, uint16 is bfloat16. They are computed in float32, rounded to nearest even. Arrays are
views at the record's addresses: kernels allocate none.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import from_dtype, njit, types
from numba.core import cgutils
from numba.extending import intrinsic, overload
from numba.np import arrayobj

from sbncore.cpu.record import Draw, Record

FLOAT16, BFLOAT16 = types.int16, types.uint16
I16, I32, I64, HALF, FLOAT = *(ir.IntType(bits) for bits in (16, 32, 64)), ir.HalfType(), ir.FloatType()
RECORD, DRAW = (from_dtype(np.dtype(kind)) for kind in (Record, Draw))


def loop(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """Compile a function that compiled ones call, with no entry for Python and without Numba's runtime."""

    def decorate(function: Callable[..., Any]) -> Any:
        compiler: Any = njit  # its types lack what leaves out the entries
        without = {"no_cpython_wrapper": True, "no_cfunc_wrapper": True, "_nrt": False}
        return compiler(error_model="numpy", **without, **options)(function)

    return decorate


def pointer(context: Any, builder: Any, array: types.Array, value: Any, index: Any) -> Any:
    """Return LLVM's pointer to an element."""
    memory = context.make_array(array)(context, builder, value).data
    return cgutils.gep_inbounds(builder, memory, index)


def compute_type(array: types.Array) -> types.Float:
    """Return the type an array's elements are computed in."""
    return types.float64 if array.dtype == types.float64 else types.float32


def widen(builder: Any, array: types.Array, value: Any, lanes: int = 0) -> Any:
    """Return what was loaded in the type it is computed in: an element, or a vector of ``lanes``."""
    if array.dtype == FLOAT16:
        return builder.fpext(builder.bitcast(value, _of(HALF, lanes)), _of(FLOAT, lanes))
    if array.dtype == BFLOAT16:
        wide = builder.zext(value, _of(I32, lanes))
        return builder.bitcast(builder.shl(wide, _constant(I32, 16, lanes)), _of(FLOAT, lanes))
    return value


def narrow(builder: Any, array: types.Array, value: Any, lanes: int = 0) -> Any:
    """Return a value rounded to nearest even, as it is stored."""
    if array.dtype == FLOAT16:
        return builder.bitcast(builder.fptrunc(value, _of(HALF, lanes)), _of(I16, lanes))
    if array.dtype == BFLOAT16:
        bits = builder.bitcast(value, _of(I32, lanes))
        odd = builder.and_(builder.lshr(bits, _constant(I32, 16, lanes)), _constant(I32, 1, lanes))
        nearest = builder.add(bits, builder.add(odd, _constant(I32, 0x7FFF, lanes)))
        quiet = builder.or_(bits, _constant(I32, 0x400000, lanes))
        nan = builder.fcmp_unordered("uno", value, value)
        bits = builder.select(nan, quiet, nearest)
        return builder.trunc(builder.lshr(bits, _constant(I32, 16, lanes)), _of(I16, lanes))
    return value


def _of(kind: Any, lanes: int) -> Any:
    return ir.VectorType(kind, lanes) if lanes else kind


def _constant(kind: Any, value: int, lanes: int) -> Any:
    return ir.Constant(_of(kind, lanes), [ir.Constant(kind, value)] * lanes if lanes else value)


@intrinsic
def load(typingctx: Any, array: Any, index: Any) -> tuple[Any, Callable[..., Any]]:
    """Element ``index``, widened to the type it is computed in."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return widen(builder, array, builder.load(pointer(context, builder, array, *args)))

    return compute_type(array)(array, types.intp), codegen


@intrinsic
def store(typingctx: Any, array: Any, index: Any, value: Any) -> tuple[Any, Callable[..., Any]]:
    """Round ``value`` to nearest even and write it as element ``index``."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        place = pointer(context, builder, array, *args[:2])
        builder.store(narrow(builder, array, args[2]), place)
        return context.get_dummy_value()

    return types.void(array, types.intp, compute_type(array)), codegen


@intrinsic
def sample_of(typingctx: Any, array: Any, n: Any, size: Any) -> tuple[Any, Callable[..., Any]]:
    """Return the n-th of an array's samples of that size; None of None."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        if not isinstance(array, types.Array):
            return context.get_dummy_value()
        whole, view = (context.make_array(array)(context, builder, *value) for value in ((args[0],), ()))
        first = builder.mul(args[1], args[2])
        arrayobj.populate_array(
            view, cgutils.gep_inbounds(builder, whole.data, first), [args[2]], whole.strides, whole.itemsize,
            ir.Constant(cgutils.voidptr_t, None),
        )  # fmt: skip
        return view._getvalue()

    return array(array, types.intp, types.intp), codegen


def _record(kind: Any) -> Any:
    def as_record(typingctx: Any, address: Any) -> tuple[Any, Callable[..., Any]]:
        def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            return builder.bitcast(args[0], context.get_value_type(kind))

        return kind(address), codegen

    return intrinsic(as_record)


record_at, draw_at = _record(RECORD), _record(DRAW)


@intrinsic
def array_at(typingctx: Any, address: Any, shape: Any, kind: Any) -> tuple[Any, Callable[..., Any]]:
    """Return the array of that shape at an address, of the type of the scalar ``kind``; None of None."""
    array = kind
    if not isinstance(kind, types.NoneType):
        array = types.Array(types.unliteral(kind), len(shape), "C")

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        if array is kind:
            return context.get_dummy_value()
        view, element = context.make_array(array)(context, builder), context.get_data_type(array.dtype)
        sizes = cgutils.unpack_tuple(builder, args[1])
        strides = [ir.Constant(I64, context.get_abi_sizeof(element))]
        for size in sizes[:0:-1]:
            strides.insert(0, builder.mul(size, strides[0]))
        arrayobj.populate_array(
            view, builder.inttoptr(args[0], element.as_pointer()), sizes, strides, strides[-1],
            ir.Constant(cgutils.voidptr_t, None),
        )  # fmt: skip
        return view._getvalue()

    return array(types.intp, shape, kind), codegen


@loop(inline="always")  # without Numba's runtime no function returns an array
def channel_array(address, C, kind):
    """Return the array of a value for each channel, of length 0 if the address is 0."""
    return array_at(address, (C if address != 0 else 0,), kind)


def zero(array):
    """0 in the type an array's elements are computed in."""


@overload(zero, inline="always")
def _zero(array):
    constant = np.float64(0) if array.dtype == types.float64 else np.float32(0)
    return lambda array: constant


def cast(array, value):
    """Return a value in the type an array's elements are computed in."""


@overload(cast, inline="always")
def _cast(array, value):
    kind = np.float64 if array.dtype == types.float64 else np.float32
    return lambda array, value: kind(value)
