"""The product of bytes with 8-bit activations, in LLVM IR: the processor's own instruction where it has one.

A word of four bytes is the seed of one weight, the sum of the bytes, or of two, sums of some with signs (`prng.TRELLIS_SUMS`).
So its product with the activations of its weights is a sum of bytes times bytes. Activations lie as words of 32 bits, in the
pattern that the instruction takes. All ways give the same integers, but for a known multiple of each activation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llvmlite import ir
from numba.core import cgutils

from seedpack.kernels.common.vectors import I8, I16, I32, INTS, byte_sums, splat, target_has

_BYTES = ir.VectorType(I8, 64)
# What an activation of 8 bits is multiplied by once it is cut to some bits: it then stands in each byte, or in each half.
IN_BYTES, IN_HALVES, AS_IT_IS = (0xFF, 0x01010101), (0xFFFF, 0x00010001), (0xFFFFFFFF, 1)


def way() -> str:
    """Return how words are multiplied on the processor that Numba compiles for."""
    if target_has("avx512vbmi") and target_has("avx512vnni"):
        return "vnni512"
    if target_has("avxvnni") or (target_has("avx512vnni") and target_has("avx512vl")):
        return "vnni256"
    if target_has("avx2"):
        return "avx2"
    return "neon" if target_has("dotprod") else "any"


def pattern(way: str, weights: int) -> tuple[int, int]:
    """Return the mask and the factor that make an activation's word; of two weights, each byte has what it is multiplied with."""
    return IN_BYTES if weights > 1 else {"any": AS_IT_IS, "avx2": IN_HALVES}.get(way, IN_BYTES)


def shortfall(way: str, weights: int) -> int:
    """Return how much is taken from each byte of a word, where the product is one of bytes with signs."""
    return 128 if _has_signs(way, weights) else 0


def _has_signs(way: str, weights: int) -> bool:
    return way == "neon" or (way == "any" and weights > 1)


def _halves(builder: Any, vector: Any) -> list[Any]:
    count = vector.type.count // 2
    index = ir.VectorType(I32, count)
    return [
        builder.shuffle_vector(vector, vector, ir.Constant(index, list(range(first, first + count))))
        for first in (0, count)
    ]


def _joined(builder: Any, low: Any, high: Any) -> Any:
    count = 2 * low.type.count
    return builder.shuffle_vector(low, high, ir.Constant(ir.VectorType(I32, count), list(range(count))))


def _call(builder: Any, name: str, result: Any, *args: Any) -> Any:
    kind = ir.FunctionType(result, [arg.type for arg in args])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), args)


def dot(builder: Any, way: str, weights: int, sums: Any, words: Any, activations: Any) -> Any:
    """Emit IR for sums + the products of 16 words, each of so many weights, with their activations."""
    if way == "vnni512":
        return _call(builder, "llvm.x86.avx512.vpdpbusd.512", INTS, sums, words, activations)
    if way == "vnni256":
        parts = zip(*(_halves(builder, vector) for vector in (sums, words, activations)), strict=True)
        return _joined(
            builder, *(_call(builder, "llvm.x86.avx512.vpdpbusd.256", part[0].type, *part) for part in parts)
        )
    if way == "avx2":
        products = []
        for half, times in zip(_halves(builder, words), _halves(builder, activations), strict=True):
            products.append(_avx2_dot(builder, weights, half, times))
        return builder.add(sums, _joined(builder, *products))
    if _has_signs(way, weights):
        return _signed_dot(builder, sums, builder.xor(words, splat(INTS, 0x80808080)), activations)
    return builder.add(sums, builder.mul(byte_sums(builder, words, 0), activations))


def add_square(builder: Any, way: str, sums: Any, values: Any, exact: bool = True) -> Any:
    """Emit IR for sums + the squares of 16 numbers, each within 16 bits; of negative ones one more may come unless exact."""
    low = builder.and_(values, splat(INTS, 0xFFFF)) if exact else values
    if way == "vnni512":
        return _call(builder, "llvm.x86.avx512.vpdpwssd.512", INTS, sums, values, low)
    if way == "vnni256":
        parts = zip(*(_halves(builder, vector) for vector in (sums, values, low)), strict=True)
        return _joined(
            builder, *(_call(builder, "llvm.x86.avx512.vpdpwssd.256", part[0].type, *part) for part in parts)
        )
    if way == "avx2":
        pairs = ir.VectorType(I16, 16)
        parts = zip(*(_halves(builder, vector) for vector in (values, low)), strict=True)
        squares = (
            _call(
                builder, "llvm.x86.avx2.pmadd.wd", left.type, *(builder.bitcast(half, pairs) for half in (left, right))
            )
            for left, right in parts
        )
        return builder.add(sums, _joined(builder, *squares))
    return builder.add(sums, builder.mul(values, values))


def _avx2_dot(builder: Any, weights: int, words: Any, activations: Any) -> Any:
    """Emit IR for the products of 8 words, without sums that 16 bits do not hold."""
    octets, pairs = ir.VectorType(I8, 32), ir.VectorType(I16, 16)

    def by_two(words: Any, factors: Any) -> Any:
        return _call(builder, "llvm.x86.avx2.pmadd.ub.sw", pairs, builder.bitcast(words, octets), factors)

    def by_four(halves: Any, factors: Any) -> Any:
        return _call(builder, "llvm.x86.avx2.pmadd.wd", words.type, halves, factors)

    if weights == 1:
        return by_four(by_two(words, splat(octets, 1)), builder.bitcast(activations, pairs))
    own = builder.bitcast(activations, octets)
    parts = [builder.and_(words, splat(words.type, mask)) for mask in (0x00FF00FF, 0xFF00FF00)]
    return builder.add(*(by_four(by_two(part, own), splat(pairs, 1)) for part in parts))


def _signed_dot(builder: Any, sums: Any, words: Any, activations: Any) -> Any:
    """Emit IR for sums + the product of four signed bytes with four others, as ARM has it; on other machines by hand."""
    if "aarch64" in builder.module.triple or "arm64" in builder.module.triple:
        octets, name = ir.VectorType(I8, 16), "llvm.aarch64.neon.sdot.v4i32.v16i8"
        quarters = [
            [part for half in _halves(builder, vector) for part in _halves(builder, half)]
            for vector in (sums, words, activations)
        ]
        dots = [
            _call(builder, name, own.type, own, builder.bitcast(w, octets), builder.bitcast(a, octets))
            for own, w, a in zip(*quarters, strict=True)
        ]
        return _joined(builder, _joined(builder, *dots[:2]), _joined(builder, *dots[2:]))
    for byte in range(4):
        left, right = (
            builder.ashr(builder.shl(vector, splat(INTS, 24 - 8 * byte)), splat(INTS, 24))
            for vector in (words, activations)
        )
        sums = builder.add(sums, builder.mul(left, right))
    return sums


def opaque(builder: Any, vector: Any) -> Any:
    """Emit IR that keeps LLVM from seeing how a vector of 512 bits was made."""
    return builder.asm(ir.FunctionType(vector.type, [vector.type]), "", "=v,0", [vector], False)


def byte_shift(builder: Any, octets: Any, cuts: Sequence[int]) -> Any:
    """Emit IR for a vector of 64 bytes, each the eight bits from some bit on of its lane of 64 bits (`vnni512`), modulo 64.

    `cuts` are these bits, for all 64 bytes or for those of every lane.
    """
    constant = ir.Constant(_BYTES, [*cuts] * (64 // len(cuts)))
    return _call(builder, "llvm.x86.avx512.pmultishift.qb.512", _BYTES, constant, octets)


def windows(builder: Any, octets: Any, first: int, stride: int, bits: int, mask: Any) -> Any:
    """Emit IR for 16 windows of up to 20 bits of a vector of 64 bytes, lane i from bit stride·i of byte `first` on, where the
    machine has byte permutes and shifts across bytes (`vnni512`). The last byte of the vector is zero.

    Each lane of 64 bits gets the bytes of its two windows, and zeros; then each byte of it the eight bits that belong there.
    """
    places, cuts = [], []
    for lane in range(8):
        byte = 2 * stride * lane // 8
        places += [min(first + byte + i, 63) if i < 5 else 63 for i in range(8)]
        for window in range(2):
            bit = stride * (2 * lane + window) - 8 * byte
            cuts += [bit, bit + 8, bit + 16 if bits > 16 else 40, 40]
    moved = _call(builder, "llvm.x86.avx512.permvar.qi.512", _BYTES, octets, ir.Constant(_BYTES, places))
    cut = builder.bitcast(byte_shift(builder, moved, cuts), INTS)
    return cut if bits == 16 else builder.and_(cut, mask)
