"""Known answers of the publications."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from seedpack.errors import CodecError
from seedpack.prng import (
    LFSR_TAPS,
    lfsr_cycle,
    lfsr_matrix,
    lfsr_position,
    lfsr_step,
    philox,
    philox_words,
    rademacher,
    squirrel5,
    trellis_key,
)
from tests.helpers.marks import slow_but


def test_lfsr_check_matrix_of_seedlm_figure_4() -> None:
    assert lfsr_matrix(4, bits=3, rows=4, columns=2).tolist() == [[2, 5], [6, 7], [3, 1], [4, 2]]


@pytest.mark.parametrize("bits", slow_but(range(2, 23), sorted(LFSR_TAPS)))
def test_lfsr_visits_every_state_once(bits: int) -> None:
    cycle, position = lfsr_cycle(bits), lfsr_position(bits)
    assert np.array_equal(np.sort(cycle), np.arange(1, 2**bits))
    assert np.array_equal(cycle[position[1:]], np.arange(1, 2**bits)) and position[0] == -1
    probe = [0, 1, len(cycle) // 2, len(cycle) - 1]
    assert all(cycle[(i + 1) % len(cycle)] == lfsr_step(int(cycle[i]), bits) for i in probe)


@pytest.mark.parametrize("bits", range(2, 13))
def test_lfsr_cycle_is_the_register_stepped(bits: int) -> None:
    state, stepped = 1, []
    for _ in range(2**bits - 1):
        stepped.append(state)
        state = lfsr_step(state, bits)
    assert state == 1 and lfsr_cycle(bits).tolist() == stepped


def test_lfsr_refuses_seed_zero_and_unknown_width() -> None:
    with pytest.raises(CodecError, match="must be 1 to 7"):
        lfsr_matrix(0, 3, 1, 1)
    with pytest.raises(CodecError, match="must be 2 to 24"):
        lfsr_cycle(25)


RANDOM123 = [  # kat_vectors of Random123: counter, key, result
    ([0] * 4, (0, 0), [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([0xFFFFFFFF] * 4, (0xFFFFFFFF, 0xFFFFFFFF), [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        (0xA4093822, 0x299F31D0),
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), RANDOM123)
def test_philox_known_answers(counter: list[int], key: tuple[int, int], expected: list[int]) -> None:
    assert philox(key, torch.tensor(counter)).tolist() == expected


@pytest.mark.parametrize(("counter", "key", "expected"), RANDOM123)
def test_philox_in_numpy(counter: list[int], key: tuple[int, int], expected: list[int]) -> None:
    assert philox(key, np.array(counter)).tolist() == expected


def test_squirrel5_in_numpy() -> None:
    positions = np.arange(0, 2**32, 2**27 + 1)
    assert np.array_equal(squirrel5(positions, 7), squirrel5(torch.from_numpy(positions), 7).numpy())


def test_philox_random_access() -> None:
    whole = philox_words(0x123456789ABCDEF, 40)
    assert torch.equal(philox_words(0x123456789ABCDEF, 9, offset=20), whole[20:29])
    with pytest.raises(CodecError, match="multiple of 4"):
        philox_words(0, 4, offset=2)


TRITON = """
import torch, triton, triton.language as tl
from seedpack.prng import philox_words
@triton.jit
def kernel(out, seed):
    i = tl.arange(0, 64)
    a, b, c, d = tl.randint4x(seed, i.to(tl.uint32))
    tl.store(out + 4 * i, a.to(tl.int64) & 0xFFFFFFFF); tl.store(out + 4 * i + 1, b.to(tl.int64) & 0xFFFFFFFF)
    tl.store(out + 4 * i + 2, c.to(tl.int64) & 0xFFFFFFFF); tl.store(out + 4 * i + 3, d.to(tl.int64) & 0xFFFFFFFF)
"""


def test_philox_equals_triton(tmp_path: object) -> None:
    pytest.importorskip("triton")
    path = f"{tmp_path}/triton_philox.py"
    body = """
for seed in (0, 7, 0xDEADBEEF, 0x123456789ABCDEF):
    out = torch.zeros(256, dtype=torch.int64)
    kernel[(1,)](out, seed)
    assert torch.equal(out, philox_words(seed, 256)), seed
print("equal")
"""
    with open(path, "w") as file:
        file.write(TRITON + body)
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run([sys.executable, path], capture_output=True, text=True, env=environment)
    assert done.stdout.strip() == "equal", done.stderr


def test_rademacher_is_balanced_and_fixed() -> None:
    matrix = rademacher(5, 40, 33)
    assert matrix.shape == (40, 33) and set(matrix.unique().tolist()) == {-1.0, 1.0}
    assert abs(float(matrix.mean())) < 0.1
    words = philox_words(5, 2)
    first = [1 - 2 * (int(words[k // 32]) >> (k % 32) & 1) for k in range(64)]
    assert matrix.flatten()[:64].tolist() == first
    assert not torch.equal(matrix, rademacher(6, 40, 33))


def squirrel5_in_python(position: int, seed: int) -> int:
    """The published C, line by line, on Python's integers."""
    mask = 0xFFFFFFFF
    x = position * 0xD2A80A3F & mask
    x = x + seed & mask
    x ^= x >> 9
    x = x + 0xA884F197 & mask
    x ^= x >> 11
    x = x * 0x6C736F4B & mask
    x ^= x >> 13
    x = x + 0xB79F3ABB & mask
    x ^= x >> 15
    x = x * 0x1B56C4F5 & mask
    return x ^ x >> 17


def test_squirrel5() -> None:
    positions = [0, 1, 2, 1000, 0x7FFFFFFF, 0xFFFFFFFF]
    for seed in (0, 1, 0xFFFFFFFF):
        found = squirrel5(torch.tensor(positions), seed).tolist()
        assert found == [squirrel5_in_python(p, seed) for p in positions]


def test_squirrel5_seeds_are_shifts_of_one_stream() -> None:
    inverse = pow(0xD2A80A3F, -1, 2**32)
    shifted = torch.tensor([(p + 99 * inverse) % 2**32 for p in range(20)])
    assert torch.equal(squirrel5(torch.arange(20), 99), squirrel5(shifted, 0))


def test_a_key_on_the_meta_device() -> None:
    """Where a model is made without memory."""
    trellis_key.cache_clear()
    with torch.device("meta"):
        assert trellis_key(0) == 0x6627E8D5
