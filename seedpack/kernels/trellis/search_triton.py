"""The trellis's search in Triton: a program takes a row at a time, its survivors in scratch memory of its own.

A window costs 2^(m + K) edges. An edge is an addition (the window's product with the multiplier) and a minimum, and for each
weight the sum of bytes less the value (one dp4a on NVIDIA) and a multiply–add, in 32-bit integers: exact, so streams agree
bit for bit with the reference. The 2^K edges out of a state lie side by side, so that its metric is loaded once for them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from seedpack.kernels.common import gpu_configs as configs
from seedpack.kernels.trellis.code import TrellisCode
from seedpack.kernels.trellis.decode_triton import byte_dot, byte_factors, byte_offset
from seedpack.kernels.trellis.search_reference import CEILING, CLOSED, PADDING, Boundary


@triton.jit
def _error(mixed, first, last, PADDING: tl.constexpr, UNIT: tl.constexpr, WEIGHTS: tl.constexpr, DP4A: tl.constexpr):
    """Return the sum over a window's weights of (UNIT·(value - wanted))², for words, and the first and the last wanted value."""
    total = tl.zeros(mixed.shape, tl.int32)
    for weight in tl.static_range(WEIGHTS):
        x = first if weight == 0 else last
        unit = tl.where(x == PADDING, 0, UNIT)
        factors = tl.full(mixed.shape, 0, tl.int32) + byte_factors(weight, unit, WEIGHTS)
        start = tl.full(mixed.shape, 0, tl.int32) - (byte_offset(weight, WEIGHTS) + x) * unit
        error = byte_dot(mixed, factors, start, WEIGHTS, DP4A)
        total += error * error
    return total


@triton.jit
def _last_symbol(p_last, i, option, SEEN: tl.constexpr):
    """Load the i-th of the row's last symbols; the free bits of the first are an option."""
    symbol = tl.load(p_last + i).to(tl.int32)
    return tl.where(i == 0, (symbol & ((1 << SEEN) - 1)) | (option << SEEN), symbol)


@triton.jit
def walk_kernel(
    x_ptr, memory_ptr, last_ptr, symbols_ptr, metric_ptr, base_ptr, best_ptr, history_ptr,
    rows, steps, multiplier, key,
    CODE_BITS: tl.constexpr, WEIGHTS: tl.constexpr, STATE_BITS: tl.constexpr, SURVIVORS: tl.constexpr, TAG: tl.constexpr,
    START: tl.constexpr, LAST: tl.constexpr, SEEN: tl.constexpr, PADDING: tl.constexpr, CLOSED: tl.constexpr,
    CEILING: tl.constexpr, DP4A: tl.constexpr, BLOCK: tl.constexpr, UNROLLED: tl.constexpr,
):  # fmt: skip
    """Store the symbols [rows, steps] of CODE_BITS of least error for x [rows, steps, WEIGHTS], int32.

    START says whether the walk starts from `memory` [rows], or anywhere. It ends with the symbols `last` [rows, LAST],
    of whose first the bits from SEEN on are free. Scratch is each program's own: metric (with tags), base (the
    window's older bits times the multiplier, plus the key), best [programs, 2^m]; history uint8 [programs, steps, 2^m].
    """
    STATES: tl.constexpr = 1 << SURVIVORS
    SYMBOLS: tl.constexpr = 1 << CODE_BITS
    GROUPS: tl.constexpr = BLOCK // SYMBOLS
    STRIDE: tl.constexpr = STATES // SYMBOLS  # between the predecessors of a state
    TAGS: tl.constexpr = (1 << TAG) - 1
    MEMORY: tl.constexpr = (1 << (STATE_BITS - CODE_BITS)) - 1
    UNIT: tl.constexpr = 1 << ((TAG + 1) // 2)
    a, c = tl.cast(multiplier, tl.uint32), tl.cast(key, tl.uint32)
    program = tl.program_id(0).to(tl.int64)
    metric_ptr += program * STATES
    base_ptr += program * STATES
    best_ptr += program * STATES
    history_ptr += program * steps * STATES
    i_symbol = tl.arange(0, SYMBOLS)
    for row in range(program, rows, tl.num_programs(0)):
        x_row, symbols_row = x_ptr + row * steps * WEIGHTS, symbols_ptr + row * steps
        if START:
            start = tl.load(memory_ptr + row).to(tl.int32)
        for first in range(0, STATES, BLOCK):
            i_state = first + tl.arange(0, BLOCK)
            b_memory = i_state
            b_metric = tl.zeros((BLOCK,), tl.int32)
            if START:
                m_start = i_state == (start & (STATES - 1))
                b_memory = tl.where(m_start, start, i_state)
                b_metric = tl.where(m_start, 0, CLOSED)
            tl.store(metric_ptr + i_state, b_metric + ((b_memory >> (SURVIVORS - CODE_BITS)) & TAGS))
            tl.store(base_ptr + i_state, ((b_memory << CODE_BITS).to(tl.uint32) * a + c).to(tl.int32))
        tl.debug_barrier()
        for step in range(steps - LAST):
            wanted, wanted_last = tl.load(x_row + step * WEIGHTS), tl.load(x_row + step * WEIGHTS + (WEIGHTS - 1))
            least = tl.cast(CEILING, tl.int32)
            for first in range(0, STATES, BLOCK):
                i_group = first // SYMBOLS + tl.arange(0, GROUPS)
                b_best = tl.full((SYMBOLS, GROUPS), CEILING, tl.int32)
                for j in range(0, SYMBOLS, UNROLLED):
                    for more in tl.static_range(UNROLLED):
                        i_before = (j + more) * STRIDE + i_group
                        if SURVIVORS == STATE_BITS - CODE_BITS:  # a state is its memory
                            b_base = (i_before << CODE_BITS).to(tl.uint32) * a + c
                        else:
                            b_base = tl.load(base_ptr + i_before).to(tl.uint32)
                        b_metric = tl.load(metric_ptr + i_before)
                        mixed = b_base[None, :] + (i_symbol.to(tl.uint32) * a)[:, None]
                        error = _error(mixed, wanted, wanted_last, PADDING, UNIT, WEIGHTS, DP4A)
                        b_best = tl.minimum(b_best, error + b_metric[None, :])
                tl.store(best_ptr + i_group[None, :] * SYMBOLS + i_symbol[:, None], b_best)
                least = tl.minimum(least, tl.min(tl.min(b_best, 0), 0))
            tl.debug_barrier()
            least &= ~TAGS
            for first in range(0, STATES, BLOCK):
                i_state = first + tl.arange(0, BLOCK)
                b_best = tl.load(best_ptr + i_state)
                b_tag = b_best & TAGS
                b_memory = ((b_tag << SURVIVORS) | i_state) & MEMORY
                after = (b_memory >> (SURVIVORS - CODE_BITS)) & TAGS
                tl.store(metric_ptr + i_state, b_best - b_tag - least + after)
                if SURVIVORS < STATE_BITS - CODE_BITS:
                    tl.store(base_ptr + i_state, ((b_memory << CODE_BITS).to(tl.uint32) * a + c).to(tl.int32))
                tl.store(history_ptr + tl.cast(step, tl.int64) * STATES + i_state, (b_tag & (SYMBOLS - 1)).to(tl.uint8))
            tl.debug_barrier()

        OPTIONS: tl.constexpr = 1 << (CODE_BITS - SEEN) if LAST > 0 else 1
        best = tl.cast((1 << 62), tl.int64)  # cost, state and what the first of the last symbols becomes, in this order
        FEW: tl.constexpr = max(BLOCK // 8, SYMBOLS)  # long integers take two registers
        for first in range(0, STATES, FEW):
            i_state = first + tl.arange(0, FEW)
            b_best = tl.load(best_ptr + i_state)
            for option in range(OPTIONS):
                b_memory = (((b_best & TAGS) << SURVIVORS) | i_state) & MEMORY
                b_cost = (b_best & ~TAGS).to(tl.int64)
                for i in range(LAST):
                    symbol = _last_symbol(last_ptr + row * LAST, i, option, SEEN)
                    b_window = (b_memory << CODE_BITS) | symbol
                    p_x = x_row + (steps - LAST + i) * WEIGHTS
                    mixed = b_window.to(tl.uint32) * a + c
                    b_cost += _error(mixed, tl.load(p_x), tl.load(p_x + (WEIGHTS - 1)), PADDING, UNIT, WEIGHTS, DP4A)
                    b_memory = b_window & MEMORY
                best = tl.minimum(best, tl.min((b_cost * STATES + i_state) * OPTIONS + option, 0))
        option = (best % OPTIONS).to(tl.int32)
        state = (best // OPTIONS % STATES).to(tl.int32)
        for i in range(LAST):
            tl.store(symbols_row + steps - LAST + i, _last_symbol(last_ptr + row * LAST, i, option, SEEN).to(tl.uint8))
        for back in range(steps - LAST):
            step = steps - LAST - 1 - back
            tl.store(symbols_row + step, (state & (SYMBOLS - 1)).to(tl.uint8))
            symbol = tl.load(history_ptr + tl.cast(step, tl.int64) * STATES + state).to(tl.int32)
            state = (symbol << (SURVIVORS - CODE_BITS)) | (state >> CODE_BITS)
        tl.debug_barrier()


def walk(x: Tensor, code: TrellisCode, survivors: int, boundary: Boundary | None = None) -> Tensor:
    """Do as `search_reference.walk`, bit for bit."""
    (rows, steps, _), states = x.shape, 1 << survivors
    config = configs.trellis_walk(code.symbol_bits, survivors, x.device)
    programs = configs.programs(x.device, rows, config["num_warps"], steps * states)
    scratch = torch.empty(3, programs, states, dtype=torch.int32, device=x.device)
    history = torch.empty(programs, steps, states, dtype=torch.uint8, device=x.device)
    symbols = torch.empty(rows, steps, dtype=torch.uint8, device=x.device)
    memory, last, count = symbols, symbols, 0
    if boundary is not None:
        memory, last = boundary.memory.contiguous(), boundary.last.to(torch.uint8).contiguous()
        count = last.shape[1]
    args = memory, last, symbols, *scratch.unbind(), history, rows, steps, code.multiplier, code.key
    constants = {
        "CODE_BITS": code.symbol_bits,
        "WEIGHTS": code.weights,
        "STATE_BITS": code.state_bits,
        "SURVIVORS": survivors,
    }
    constants |= {"TAG": code.tag_bits(survivors), "PADDING": PADDING, "CLOSED": CLOSED, "CEILING": CEILING}
    constants |= {"START": boundary is not None, "LAST": count, "DP4A": configs.is_nvidia(x.device)}
    constants["SEEN"] = max(0, code.state_bits - code.symbol_bits * count)
    with configs.current(x.device):
        walk_kernel[(programs,)](x.to(torch.int32).contiguous(), *args, **constants, **config)
    return symbols
