"""The product of few tokens on CPUs, all of a layer in one call: mix, round to 8 bits, multiply by the packed rows.

What does not change from call to call is prepared once, as words in memory. The product itself is the codec's: a function that
takes rows until none is left, run by all threads that are free. Integers are exact; each group of 256 is scaled in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import carray, types
from numba.core import cgutils
from torch import Tensor

from seedpack.kernels.common.byte_dots import pattern, way
from seedpack.kernels.common.jit import jit
from seedpack.kernels.common.memory import pointer
from seedpack.kernels.common.native import Native
from seedpack.kernels.common.row_tiles import padded_token_count
from seedpack.kernels.rotation.cpu import mix_row
from seedpack.kernels.common.team import LINE, ready, share_out
from seedpack.kernels.common.vectors import FLOATS, I8, I32, INTS, intrinsic, load, splat, spread
from seedpack.kernels.common.vectors import store as store_vector

GROUP = 256  # activations that share a scale
LANES = 16
CHUNK = 64  # weights that a step of the inner loop takes
OFFSET = 510  # by which the sum of a word's bytes exceeds the weight
ALONE = 1 << 16  # weights, times tokens, up to which one thread is faster than two
PIECES = 16  # of the rows of a layer, which threads take one at a time

# Words of a layer; the codec's own are at CODE. Behind them, for each part that it was prepared from: its address, that of a
# copy, and their bytes.
ROWS, COLUMNS, PADDED, FACTOR, ODD, SMALL, ORDER, SCALE, BIAS, CODE, COPIES, KEPT_FIRST = range(12)
# Words of a call. NEXT, the row that is taken next, is written to by all threads.
NEXT, LAYER, CODES, STARTS, STEPS, OUT, TOKENS, KIND, STEP, WORDS = 0, 8, 9, 10, 11, 12, 13, 14, 15, 16
FLOAT32, BFLOAT16 = 0, 1
KINDS = {torch.float32: FLOAT32, torch.bfloat16: BFLOAT16}


@jit()
def array(address: int, kind: Any, size: int) -> Any:
    """Return the array of `size` numbers at an address."""
    return carray(pointer(address, kind), (size,))


@jit()
def read_bits(bits: int) -> float:
    """Return the float32 of a bfloat16's bits."""
    return np.uint32(bits << 16).view(np.float32)


@jit()
def write_bits(value: float) -> int:
    """Return the bits of the bfloat16 nearest to a float32, ties to even."""
    bits = np.float32(value).view(np.uint32)
    if (bits & 0x7FFFFFFF) > 0x7F800000:
        return (bits >> 16) | 0x40
    return (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16


@jit()
def store(call: Any, layer: Any, first: int, end: int, products: Any) -> None:
    """Store the products [end - first, tokens] of some rows, times their scales and with their biases, in the result's dtype."""
    rows, tokens = layer[ROWS], call[TOKENS]
    scale = array(layer[SCALE], np.float32, rows)
    for r in range(first, end):
        for t in range(tokens):
            products[r - first, t] *= scale[r]
    if layer[BIAS]:
        bias = array(layer[BIAS], np.float32, rows)
        for r in range(first, end):
            for t in range(tokens):
                products[r - first, t] += bias[r]
    if call[KIND] == FLOAT32:
        out = array(call[OUT], np.float32, tokens * rows)
        for t in range(tokens):
            for r in range(first, end):
                out[t * rows + r] = products[r - first, t]
    else:
        halves = array(call[OUT], np.uint16, tokens * rows)
        for t in range(tokens):
            for r in range(first, end):
                halves[t * rows + r] = write_bits(products[r - first, t])


@intrinsic
def _round16(
    context: Any, values: Any, step: Any, codes: Any, start: Any, mask: Any, factor: Any
) -> Any:
    """Round the 16 floats at an address: store their codes' words, and take the codes times 510 from the 16 numbers at `start`."""

    def codegen(ctx: Any, builder: Any, signature: Any, args: Any) -> Any:
        values, codes, start = (builder.inttoptr(args[i], I8.as_pointer()) for i in (0, 2, 3))
        mask, factor = (spread(builder, builder.trunc(args[i], I32), INTS) for i in (4, 5))
        whole = builder.fdiv(load(builder, values, FLOATS), spread(builder, args[1], FLOATS))
        nearest = cgutils.get_or_insert_function(builder.module, ir.FunctionType(FLOATS, [FLOATS]), "llvm.rint.v16f32")
        code = builder.fptosi(builder.call(nearest, [whole]), INTS)
        sums = builder.sub(load(builder, start, INTS), builder.mul(code, splat(INTS, OFFSET)))
        store_vector(builder, sums, start)
        store_vector(builder, builder.mul(builder.and_(code, mask), factor), codes)
        return ctx.get_dummy_value()

    words = types.int64
    return types.void(words, types.float32, words, words, words, words), codegen


@jit()
def _round(y: Any, codes: int, starts: int, steps: Any, mask: int, factor: int) -> None:
    """Round a token's activations to 8 bits in groups of 256: store codes, each group's step, and what its sums start from.

    A group with a number that is not finite gets a step that is not a number. `y` ends in zeros that fill its last chunk.
    """
    for group in range(steps.shape[0]):
        first, last = group * GROUP, min(y.shape[0], (group + 1) * GROUP)
        largest = np.int32(0)
        for bits in y[first:last].view(np.int32):
            largest = max(largest, bits & np.int32(0x7FFFFFFF))  # magnitudes of floats are ordered as their bits
        step = max(np.int32(largest).view(np.float32), np.float32(1e-30)) / np.float32(127)
        if largest >= 0x7F800000:
            step = np.float32(np.nan)
        steps[group] = step
        for i in range(first, last, LANES):
            _round16(y.ctypes.data + 4 * i, step, codes + 4 * i, starts + 4 * LANES * group, mask, factor)


@jit()
def keep(lines: Any, steps: Any, call: Any) -> int:
    """Return 0; Numba frees an array once its last use is past, and knows nothing of addresses."""
    return 0 * (len(lines) + len(steps) + len(call))


@jit()
def _stale(layer: Any) -> bool:
    """Return whether the parts that a layer was prepared from have other bytes now."""
    for copy in range(layer[COPIES]):
        at = KEPT_FIRST + 3 * copy
        now, then = array(layer[at], np.uint8, layer[at + 2]), array(layer[at + 1], np.uint8, layer[at + 2])
        different = np.uint8(0)
        for i in range(layer[at + 2]):
            different |= now[i] ^ then[i]
        if different:
            return True
    return False


def _make_run() -> Native:
    mask, factor = pattern(way())

    def run(at: int, share: int, x: int, out: int, tokens: int, kind: int, board: int, helpers: int) -> int:
        """Multiply `tokens` activations at x by the layer at an address; returns 1 if it has to be prepared anew."""
        layer = array(at, np.int64, KEPT_FIRST)
        if _stale(array(at, np.int64, KEPT_FIRST + 3 * layer[COPIES])):
            return 1
        columns, padded = layer[COLUMNS], layer[PADDED]
        groups = -(-padded // GROUP)
        all_tokens = 1
        while all_tokens < tokens:
            all_tokens *= 2
        lines = np.zeros(all_tokens * (padded + groups * LANES) + LANES, np.int32)
        codes = lines.ctypes.data + -lines.ctypes.data % LINE
        starts = codes + 4 * all_tokens * padded
        steps = np.zeros(all_tokens * groups, np.float32)
        padded_y = np.zeros(padded, np.float32)
        y = padded_y[:columns]
        small = carray(pointer(layer[SMALL], np.float32), (layer[ORDER], layer[ORDER]))
        for t in range(tokens):
            if kind == FLOAT32:
                y[:] = array(x + 4 * t * columns, np.float32, columns)
            else:
                bits = array(x + 2 * t * columns, np.uint16, columns)
                for i in range(columns):
                    y[i] = read_bits(bits[i])
            if layer[FACTOR]:
                times = array(layer[FACTOR], np.float32, columns)
                for i in range(columns):
                    y[i] *= times[i]
                mix_row(y, layer[ODD], small)
            _round(
                padded_y, codes + 4 * t * padded, starts + 4 * LANES * t * groups, steps[t * groups : (t + 1) * groups],
                mask, factor,
            )  # fmt: skip
        call = np.zeros(WORDS, np.int64)
        call[LAYER], call[OUT], call[TOKENS], call[KIND] = at, out, tokens, kind
        call[CODES], call[STARTS], call[STEPS] = codes, starts, steps.ctypes.data
        rows = layer[ROWS]
        few = rows * columns * all_tokens <= ALONE
        call[STEP] = rows if few else max(1, rows // PIECES)
        share_out(0 if few else board, helpers, share, call.ctypes.data)
        return keep(lines, steps, call)

    return Native(run, 8)


_run = cache(_make_run)


class Prepared:
    """A layer's product for few tokens, ready to be called.

    Args:
        shape: of the weight, [rows, columns].
        factor: what activations are multiplied by before they are mixed, float32 [columns]; None: they are not mixed.
        mixing: the odd order of the mixing and the matrix of it, see `rotation.cpu.plan`.
        scale: float32 [rows], of the integers.
        bias: [rows], or None.
        code: the codec's own words.
        kept: the parts that all of this comes from; if their bytes change, the layer is prepared anew.
        alive: what else must stay in memory.
        share: makes the function that takes rows, for a count of tokens.
    """

    def __init__(
        self,
        shape: tuple[int, int],
        factor: Tensor | None,
        mixing: tuple[int, Any],
        scale: Tensor,
        bias: Tensor | None,
        code: Any,
        kept: Sequence[Tensor],
        alive: object,
        share: Callable[[int], Native],
    ):
        rows, columns = shape
        odd, small = mixing
        single = None if bias is None else bias.detach().to(torch.float32)
        tensors = [tensor.detach() for tensor in (*kept, *([] if bias is None else [bias]))]
        copies = [tensor.clone() for tensor in tensors]
        self._alive = factor, small, scale, single, code, tensors, copies, alive
        words = [rows, columns, -(-columns // CHUNK) * CHUNK, address(factor), odd, small.ctypes.data, len(small)]
        words += [address(scale), address(single), code.ctypes.data, len(copies)]
        for tensor, copy in zip(tensors, copies, strict=True):
            words += [tensor.data_ptr(), copy.data_ptr(), copy.nbytes]
        self._words = np.array(words, np.int64)
        self._at, self._rows = self._words.ctypes.data, rows
        self._share = share
        self._shares: dict[int, int] = {}
        self._call = _run().call

    def __call__(self, x: Tensor) -> Tensor | None:
        """Return the product of x [..., columns], contiguous float32 or bfloat16, of few tokens, in its dtype; None if the
        parts have changed."""
        tokens = x.numel() // x.shape[-1]
        out = x.new_empty((*x.shape[:-1], self._rows))
        share = self._shares.get(tokens)
        if share is None:
            share = self._shares[tokens] = self._share(padded_token_count(tokens)).address
        stale = self._call(self._at, share, x.data_ptr(), out.data_ptr(), tokens, KINDS[x.dtype], *ready())
        return None if stale else out


def address(tensor: Tensor | None) -> int:
    """Return where a tensor's elements are, or 0 for none."""
    return 0 if tensor is None else tensor.data_ptr()
