"""Addresses, atomic words and calls by address, for Numba's compiled code: what threads that share a job are made of."""

from __future__ import annotations

import sys
from typing import Any

import llvmlite.binding
from llvmlite import ir
from numba import types
from numba.core import cgutils

from seedpack.kernels.common.vectors import I8, I64, intrinsic, load, store

_WORD = I64.as_pointer()
_LINE = ir.VectorType(I8, 64)
_ORDER = "seq_cst"


@intrinsic
def pointer(context: Any, address: Any, kind: Any) -> Any:
    """Return an address as a pointer to a NumPy scalar type, for `numba.carray`."""
    signature = types.CPointer(kind.dtype)(types.int64, kind)

    def codegen(ctx: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], ctx.get_value_type(signature.return_type))

    return signature, codegen


@intrinsic
def atomic_add(context: Any, address: Any, value: Any) -> Any:
    """Add to the word at an address; returns what it was."""

    def codegen(ctx: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.atomic_rmw("add", builder.inttoptr(args[0], _WORD), args[1], _ORDER)

    return types.int64(types.int64, types.int64), codegen


@intrinsic
def exchange(context: Any, address: Any, value: Any) -> Any:
    """Put a value into the word at an address; returns what it was."""

    def codegen(ctx: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.atomic_rmw("xchg", builder.inttoptr(args[0], _WORD), args[1], _ORDER)

    return types.int64(types.int64, types.int64), codegen


@intrinsic
def atomic_load(context: Any, address: Any) -> Any:
    """Return the word at an address."""

    def codegen(ctx: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.load_atomic(builder.inttoptr(args[0], _WORD), _ORDER, 8)

    return types.int64(types.int64), codegen


@intrinsic
def call_at(context: Any, function: Any, argument: Any) -> Any:
    """Call the function of one word at an address."""

    def codegen(ctx: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind = ir.FunctionType(I64, [I64]).as_pointer()
        return builder.call(builder.inttoptr(args[0], kind), [args[1]])

    return types.int64(types.int64, types.int64), codegen


@intrinsic
def copy_line(context: Any, to: Any, source: Any) -> Any:
    """Copy 64 bytes from one address to another."""

    def codegen(ctx: Any, builder: Any, signature: Any, args: Any) -> Any:
        octets = load(builder, builder.inttoptr(args[1], I8.as_pointer()), _LINE)
        store(builder, octets, builder.inttoptr(args[0], I8.as_pointer()))
        return ctx.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


@intrinsic
def pause(context: Any) -> Any:
    """Let the core rest for a moment, in a loop that waits."""

    def codegen(ctx: Any, builder: Any, signature: Any, args: Any) -> Any:
        if llvmlite.binding.get_process_triple().startswith(("x86_64", "i686")):
            rest = cgutils.get_or_insert_function(
                builder.module, ir.FunctionType(ir.VoidType(), []), "llvm.x86.sse2.pause"
            )
            builder.call(rest, [])
        return ctx.get_dummy_value()

    return types.void(), codegen


@intrinsic
def yield_core(context: Any) -> Any:
    """Let another thread have the core."""
    name = "SwitchToThread" if sys.platform == "win32" else "sched_yield"

    def codegen(ctx: Any, builder: Any, signature: Any, args: Any) -> Any:
        function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(ir.IntType(32), []), name)
        builder.call(function, [])
        return ctx.get_dummy_value()

    return types.void(), codegen
