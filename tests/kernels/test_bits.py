from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from seedpack.kernels.common.bits import pack, packed_shape, signed, unpack


@settings(max_examples=60, deadline=None)
@given(bits=st.integers(1, 40), rows=st.integers(1, 5), fields=st.integers(1, 21), seed=st.integers(0, 99))
def test_round_trip(bits: int, rows: int, fields: int, seed: int) -> None:
    values = torch.randint(0, 2**bits, (rows, fields), generator=torch.Generator().manual_seed(seed))
    packed = pack(values, bits)
    assert packed.shape == packed_shape(rows, fields, bits) and packed.dtype == torch.uint8
    assert torch.equal(unpack(packed, fields, bits), values)
    assert torch.equal(
        signed(unpack(pack(values - 2 ** (bits - 1), bits), fields, bits), bits), values - 2 ** (bits - 1)
    )


@pytest.mark.parametrize("bits", [4, 16, 20])
def test_definition(bits: int) -> None:
    values = torch.randint(0, 2**bits, (3, 7))
    for row, packed in zip(values.tolist(), pack(values, bits), strict=True):
        stream = sum(value << i * bits for i, value in enumerate(row))
        assert bytes(packed.flatten().tolist()) == stream.to_bytes(packed.numel(), "little")


def test_large_inputs_are_packed_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.randint(0, 2**11, (40, 13))
    whole = pack(values, 11)
    monkeypatch.setattr("seedpack.kernels.common.bits.BITS_AT_ONCE", 500)
    assert torch.equal(pack(values, 11), whole) and torch.equal(unpack(whole, 13, 11), values)
