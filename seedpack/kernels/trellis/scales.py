"""The factors of a trellis weight's rows and input; see `scales_reference`."""

from __future__ import annotations

from typing import cast

from torch import Tensor

from seedpack.kernels.dispatch import Backend, kernels_for


def trellis_scales(
    scales: Tensor, exponent: Tensor, balance: Tensor | None, signs: Tensor, *, backend: Backend = "auto"
) -> tuple[Tensor, Tensor]:
    """Return what a product takes: float32 [rows], the scales of the integers, and float32 [columns], those of activations.

    Args:
        scales: bit patterns of float16, int16 [rows].
        exponent: int8 [1], of the tensor.
        balance: four bits per input channel, uint8 [1, groups, bytes], or None.
        signs: the rotation's, float32 [columns].
        backend: which kernels to use.
    """
    among = ("triton", "reference") if backend != "auto" or scales.device.type != "cpu" else ("reference",)
    kernels = kernels_for("trellis.scales", backend, scales.device, among=among)
    return cast(tuple[Tensor, Tensor], kernels.prepare(scales, exponent, balance, signs))
