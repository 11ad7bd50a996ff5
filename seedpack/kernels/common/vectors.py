"""Vectors for Numba's compiled code, written as LLVM IR: loops over packed bits that Numba would not vectorise.

LLVM compiles them for whatever width the machine has; only sums of bytes are given x86's own instructions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import llvmlite.binding
from llvmlite import ir
from numba.core import cgutils
from numba.core.registry import cpu_target
from numba.extending import intrinsic as _intrinsic

intrinsic: Any = _intrinsic  # callers of an intrinsic leave its first argument out
LANES = 16
ROWS_AT_ONCE = 16  # rows of one task of a core
I8, I16, I32, I64, F32 = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType()
INTS, FLOATS = ir.VectorType(I32, LANES), ir.VectorType(F32, LANES)


def target_has(feature: str) -> bool:
    """Return whether the processor that Numba compiles for has a feature, by LLVM's name; False of any but this machine's own.

    With NUMBA_CPU_NAME alone Numba hands LLVM another processor's name with this machine's features. Such a target can have
    AVX-512 instructions and yet no vectors of 512 bits, which LLVM does not tell but ends the process.
    """
    _, name, features = cpu_target.target_context.codegen().magic_tuple()
    return name == llvmlite.binding.get_host_cpu_name() and f"+{feature}" in features.split(",")


def data(context: Any, builder: Any, kind: Any, array: Any) -> Any:
    """Emit IR for the pointer to an array's first element."""
    return cgutils.create_struct_proxy(kind)(context, builder, value=array).data


def splat(vector: Any, value: int | float) -> Any:
    """Return a constant vector of one number."""
    return ir.Constant(vector, [value] * vector.count)


def spread(builder: Any, scalar: Any, vector: Any) -> Any:
    """Emit IR for a vector of one scalar."""
    nothing = ir.Constant(vector, ir.Undefined)
    one = builder.insert_element(nothing, scalar, ir.Constant(I32, 0))
    return builder.shuffle_vector(one, nothing, splat(ir.VectorType(I32, vector.count), 0))


def load(builder: Any, pointer: Any, vector: Any) -> Any:
    """Emit IR that loads an unaligned vector."""
    return builder.load(builder.bitcast(pointer, vector.as_pointer()), align=1)


def prefetch(builder: Any, pointer: Any) -> None:
    """Emit IR that has the line at a pointer fetched, which may lie anywhere."""
    kind = ir.FunctionType(ir.VoidType(), [pointer.type, I32, I32, I32])
    function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
    builder.call(function, [pointer, *(ir.Constant(I32, value) for value in (0, 3, 1))])  # to read, to keep, data


def store(builder: Any, value: Any, pointer: Any) -> None:
    """Emit IR that stores an unaligned vector."""
    builder.store(value, builder.bitcast(pointer, value.type.as_pointer()), align=1)


def multiply_add(builder: Any, x: Any, y: Any, z: Any) -> Any:
    """Emit IR for x·y + z, fused where the machine can."""
    return builder.fadd(builder.fmul(x, y, flags=("contract",)), z, flags=("contract",))


def nearest(builder: Any, vector: Any) -> Any:
    """Emit IR that rounds a vector of floats to whole numbers, halves to even."""
    kind = ir.FunctionType(vector.type, [vector.type])
    function = cgutils.get_or_insert_function(builder.module, kind, f"llvm.rint.v{vector.type.count}f32")
    return builder.call(function, [vector])


def total(builder: Any, vector: Any) -> Any:
    """Emit IR for the sum of a vector of floats, by halves."""
    count = vector.type.count
    while count > 1:
        count //= 2
        index = ir.VectorType(I32, count)
        low = builder.shuffle_vector(vector, vector, ir.Constant(index, list(range(count))))
        high = builder.shuffle_vector(vector, vector, ir.Constant(index, list(range(count, 2 * count))))
        vector = builder.fadd(low, high)
    return builder.extract_element(vector, ir.Constant(I32, 0))


def interleaved(builder: Any, vectors: Sequence[Any]) -> list[Any]:
    """Emit IR for the elements of one vector, or of two in turn, as many vectors."""
    if len(vectors) == 1:
        return list(vectors)
    count = vectors[0].type.count
    turns = [side * count + lane for lane in range(count) for side in (0, 1)]
    index = ir.VectorType(I32, count)
    return [builder.shuffle_vector(*vectors, ir.Constant(index, turns[at : at + count])) for at in (0, count)]


def taken_in_turn(builder: Any, vectors: Sequence[Any]) -> list[Any]:
    """Emit IR for the inverse of `interleaved`: the even and the odd elements of two vectors."""
    if len(vectors) == 1:
        return list(vectors)
    count = vectors[0].type.count
    index = ir.VectorType(I32, count)
    return [builder.shuffle_vector(*vectors, ir.Constant(index, list(range(first, 2 * count, 2)))) for first in (0, 1)]


def byte_sums(builder: Any, words: Any, start: int, factors: Sequence[int] = (1, 1, 1, 1)) -> Any:
    """Emit IR for `start` plus the sum of the four bytes of each of 16 words, each times its factor: 1, 0 or -1."""
    if target_has("avx512bw"):
        octets, pairs = ir.VectorType(I8, 64), ir.VectorType(I16, 32)
        by_two = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(pairs, [octets, octets]), "llvm.x86.avx512.pmaddubs.w.512"
        )
        by_four = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(INTS, [pairs, pairs]), "llvm.x86.avx512.pmaddw.d.512"
        )
        times = ir.Constant(octets, [factor & 255 for factor in factors] * LANES)
        sums = builder.call(by_two, [builder.bitcast(words, octets), times])
        return builder.add(builder.call(by_four, [sums, splat(pairs, 1)]), splat(INTS, start))
    if min(factors) < 1:
        sums = splat(INTS, start)
        for byte, factor in enumerate(factors):
            octet = builder.and_(builder.lshr(words, splat(INTS, 8 * byte)), splat(INTS, 255))
            sums = builder.add(sums, octet) if factor > 0 else builder.sub(sums, octet) if factor < 0 else sums
        return sums
    low = splat(INTS, 0x00FF00FF)
    sums = builder.add(builder.and_(words, low), builder.and_(builder.lshr(words, splat(INTS, 8)), low))
    sums = builder.lshr(builder.mul(sums, splat(INTS, 0x00010001)), splat(INTS, 16))
    return builder.add(sums, splat(INTS, start))


def words_at(builder: Any, pointer: Any, stride: int, window: int, offset: int = 0) -> Any:
    """Emit IR for 16 words, lane i holding the bits from bit stride·i + offset on of the bytes at a pointer, `window` of them
    at least (at most 25).

    A load, a shuffle that gives each lane its four bytes, a shift.
    """
    starts = [stride * lane + offset for lane in range(LANES)]
    width = 16 * -(-(max(start >> 3 for start in starts) + -(-(7 + window) // 8)) // 16)
    octets = load(builder, pointer, ir.VectorType(I8, width))
    places = [min((start >> 3) + byte, width - 1) for start in starts for byte in range(4)]
    shuffle = ir.Constant(ir.VectorType(I32, 4 * LANES), places)
    words = builder.bitcast(builder.shuffle_vector(octets, ir.Constant(octets.type, ir.Undefined), shuffle), INTS)
    return builder.lshr(words, ir.Constant(INTS, [start & 7 for start in starts]))
