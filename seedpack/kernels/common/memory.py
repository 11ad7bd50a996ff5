"""Addresses for Numba's compiled code: arrays, atomic words and functions at them."""

from __future__ import annotations

from functools import cache
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.np.arrayobj import make_array, populate_array

from seedpack.kernels.common.vectors import I8, I64, intrinsic, load, store

_WORD = I64.as_pointer()
_LINE = ir.VectorType(I8, 64)
_ORDER = "seq_cst"


@intrinsic
def array(context: Any, address: Any, kind: Any, size: Any) -> Any:
    """Return the array of `size` numbers of a NumPy scalar type at an address; unlike `numba.carray` it checks nothing, and takes
    no time to compile."""
    signature = types.Array(kind.dtype, 1, "C")(types.int64, kind, types.int64)

    def codegen(ctx: Any, builder: Any, signature: Any, args: Any) -> Any:
        numbers = ctx.get_data_type(signature.return_type.dtype)
        stride = ctx.get_constant(types.intp, ctx.get_abi_sizeof(numbers))
        found = make_array(signature.return_type)(ctx, builder)
        at = builder.inttoptr(args[0], numbers.as_pointer())
        populate_array(found, at, shape=[args[2]], strides=[stride], itemsize=stride, meminfo=None)
        return found._getvalue()

    return signature, codegen


@cache
def on_stack(size: int) -> Any:
    """Return a function that returns the address of so many bytes, its caller's until that returns."""

    @intrinsic
    def room(context: Any) -> Any:
        def codegen(ctx: Any, builder: Any, signature: Any, args: Any) -> Any:
            found = cgutils.alloca_once(builder, ir.ArrayType(I8, size))
            found.align = 64
            return builder.ptrtoint(found, I64)

        return types.int64(), codegen

    return room


@intrinsic
def atomic_add(context: Any, address: Any, value: Any) -> Any:
    """Add to the word at an address; returns what it was."""

    def codegen(ctx: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.atomic_rmw("add", builder.inttoptr(args[0], _WORD), args[1], _ORDER)

    return types.int64(types.int64, types.int64), codegen


@intrinsic
def call_at(context: Any, function: Any, argument: Any) -> Any:
    """Call the function of one word at an address."""

    def codegen(ctx: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind = ir.FunctionType(I64, [I64]).as_pointer()
        return builder.call(builder.inttoptr(args[0], kind), [args[1]])

    return types.int64(types.int64, types.int64), codegen


@intrinsic
def call_together(context: Any, region: Any, function: Any, argument: Any, threads: Any) -> Any:
    """Have several threads call the function of one word at an address, by `openmp.parallel_region`; returns once all have."""

    def codegen(ctx: Any, builder: Any, signature: Any, args: Any) -> Any:
        count = ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [I64, I64, count, count]).as_pointer()
        threads = builder.trunc(args[3], count)
        builder.call(builder.inttoptr(args[0], kind), [args[1], args[2], threads, ir.Constant(count, 0)])
        return ctx.get_dummy_value()

    return types.void(*(types.int64,) * 4), codegen


@intrinsic
def copy_line(context: Any, to: Any, source: Any) -> Any:
    """Copy 64 bytes from one address to another."""

    def codegen(ctx: Any, builder: Any, signature: Any, args: Any) -> Any:
        octets = load(builder, builder.inttoptr(args[1], I8.as_pointer()), _LINE)
        store(builder, octets, builder.inttoptr(args[0], I8.as_pointer()))
        return ctx.get_dummy_value()

    return types.void(types.int64, types.int64), codegen
