"""Other trellis quantisers, without data: EXL3 and ik_llama.cpp's types."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from benchmarks.lib import exl3, ik_llama
from benchmarks.lib.peers import Quantiser


def trellises() -> dict[str, tuple[str, Quantiser]]:
    """Those at hand: name to (family, quantiser), as `peers.data_free`."""
    found: dict[str, tuple[str, Quantiser]] = {
        f"EXL3, {bits} bits": ("EXL3", partial(_exl3, bits=bits)) for bits in (2, 3, 4)
    }
    if ik_llama.at_hand():
        found |= {
            f"ik_llama.cpp {kind}": ("ik_llama.cpp IQ*_KT", partial(_ik_llama, kind=kind)) for kind in ik_llama.TYPES
        }
    return found


def _exl3(weight: Tensor, bits: int) -> tuple[Tensor, float]:
    return exl3.exl3(weight, torch.eye(weight.shape[1]), bits)


def _ik_llama(weight: Tensor, kind: str) -> tuple[Tensor, float]:
    return ik_llama.trellis(weight, kind, torch.ones(weight.shape[1]))
