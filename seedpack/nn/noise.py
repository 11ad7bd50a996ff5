"""Layers whose weight is noise times coefficients (RANDUMB), regenerated inside the products.

Neither a weight nor its gradient is ever in memory. `seedpack.save` stores a seed and the coefficients. Each tensor has one
vector of coefficients, W = Σ_m coefficient_m · noise_m, trained by gradients that the fused kernels give.
Weights start at the standard deviation of torch's layers: var(coefficient) = std² / (M · var(noise)), which is 3·std² / M.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch import nn as torch_nn

from seedpack._shapes import require_columns
from seedpack.codecs.basis import BasisCodec
from seedpack.codecs.coefficients import as_stored
from seedpack.kernels.basis.linear import basis_linear
from seedpack.loader.trained import Coefficients


class _Noise(Coefficients, torch_nn.Module):
    """Base of the layers; `outputs` of a bias, 0 for none."""

    def __init__(
        self,
        shape: tuple[int, ...],
        count: int,
        std: float,
        seed: int,
        generator: str,
        noise_bias: bool,
        coef_bits: int,
        outputs: int = 0,
    ):
        super().__init__()
        self.codec = BasisCodec(generator, count=count + noise_bias, seed=seed, coef_bits=coef_bits)
        self.stored_shape = shape
        self.std, self.noise_bias = std, noise_bias
        self.coefs = torch_nn.Parameter(torch.empty(1, count + noise_bias))
        self.bias = torch_nn.Parameter(torch.empty(outputs)) if outputs else None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw coefficients of the variance that gives weights their standard deviation.

        With a noise bias (RANDUMB's default) its coefficient alone gives it, and the others are 0.
        """
        scale = self.std / math.sqrt(self.codec.noise.variance)
        if self.noise_bias:
            self.coefs.zero_()[0, -1] = scale
        else:
            bound = scale * math.sqrt(3 / self.coefs.shape[1])
            self.coefs.uniform_(-bound, bound)
        if self.bias is not None:
            torch_nn.init.uniform_(self.bias, -self.std * math.sqrt(3), self.std * math.sqrt(3))

    @property
    def weight(self) -> Tensor:
        """The weight, materialised: for a look at it; no product needs it."""
        return self._rows(None).view(self.stored_shape)

    def _rows(self, index: Tensor | None) -> Tensor:
        return self.materialise(as_stored(self.coefs, self.codec.coef_bits), index)

    def _linear(self, x: Tensor) -> Tensor:
        require_columns(f"seedpack.nn.{type(self).__name__}", x, math.prod(self.stored_shape[1:]))
        coefs = as_stored(self.coefs, self.codec.coef_bits)
        y = basis_linear(x, coefs, self.codec.noise, rows=self.stored_shape[0])
        return y if self.bias is None else y + self.bias

    def extra_repr(self) -> str:
        """Return the weight's shape and its codec."""
        return f"{list(self.stored_shape)}, {self.codec}"


class Linear(_Noise):
    """nn.Linear whose weight [out_features, in_features] is noise times `count` coefficients.

    Args:
        in_features: of the input [..., in_features].
        out_features: of the output.
        count: M, coefficients.
        bias: whether to add a trained bias [out_features].
        seed: of the noise; give each layer its own.
        generator: "philox", "squirrel5" (RANDUMB's) or "hadamard" (structured; its weight is materialised in each pass).
        noise_bias: one more basis vector, whose coefficient alone is not 0 at the start.
        coef_bits: of a coefficient in the file, as for `reparam.basis_`.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        count: int,
        *,
        bias: bool = True,
        seed: int = 0,
        generator: str = "philox",
        noise_bias: bool = False,
        coef_bits: int = 32,
    ):
        std = 1 / math.sqrt(3 * in_features)  # nn.Linear's: uniform in ±1 / √in_features
        outputs = out_features if bias else 0
        super().__init__((out_features, in_features), count, std, seed, generator, noise_bias, coef_bits, outputs)
        self.in_features, self.out_features = in_features, out_features

    def forward(self, x: Tensor) -> Tensor:
        """Multiply x [..., in_features] by the weight: [..., out_features]."""
        return self._linear(x)


class Conv2d(_Noise):
    """nn.Conv2d of one group whose weight [out_channels, in_channels, kernel, kernel] is noise times `count` coefficients.

    The input is unfolded for a product, as a convolution without its weight in memory needs.

    Args:
        in_channels: of the input [N, in_channels, H, W].
        out_channels: of the output.
        kernel_size: one for both axes, or two.
        count: M, coefficients.
        stride: as nn.Conv2d's; so are padding, dilation and bias.
        seed: of the noise; give each layer its own.
        generator: as for `Linear`; so are noise_bias and coef_bits.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        count: int,
        *,
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        bias: bool = True,
        seed: int = 0,
        generator: str = "philox",
        noise_bias: bool = False,
        coef_bits: int = 32,
    ):
        kernel, self.stride, self.padding, self.dilation = (
            (value, value) if isinstance(value, int) else value for value in (kernel_size, stride, padding, dilation)
        )
        std, shape = 1 / math.sqrt(3 * in_channels * math.prod(kernel)), (out_channels, in_channels, *kernel)
        super().__init__(shape, count, std, seed, generator, noise_bias, coef_bits, out_channels if bias else 0)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve [N, in_channels, H, W] into [N, out_channels, H', W']."""
        kernel = self.stored_shape[2:]
        patches = torch_nn.functional.unfold(x, kernel, self.dilation, self.padding, self.stride)
        y = self._linear(patches.mT)
        height, width = (
            (x.shape[2 + i] + 2 * self.padding[i] - self.dilation[i] * (kernel[i] - 1) - 1) // self.stride[i] + 1
            for i in (0, 1)
        )
        return y.mT.reshape(x.shape[0], self.stored_shape[0], height, width)


class Embedding(_Noise):
    """nn.Embedding whose table [num_embeddings, embedding_dim] is noise times `count` coefficients.

    Only the rows that are looked up are materialised.

    Args:
        num_embeddings: rows of the table.
        embedding_dim: columns.
        count: M, coefficients.
        std: of the entries at the start; nn.Embedding's is 1.
        seed: of the noise; give each layer its own.
        generator: as for `Linear`; so are noise_bias and coef_bits.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        count: int,
        *,
        std: float = 1.0,
        seed: int = 0,
        generator: str = "philox",
        noise_bias: bool = False,
        coef_bits: int = 32,
    ):
        super().__init__((num_embeddings, embedding_dim), count, std, seed, generator, noise_bias, coef_bits)
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim

    def forward(self, index: Tensor) -> Tensor:
        """Look indices [...] up: [..., embedding_dim]."""
        rows, place = torch.unique(index, return_inverse=True)  # in order
        if rows.numel() and rows.device.type == "cpu" and not 0 <= int(rows[0]) <= int(rows[-1]) < self.num_embeddings:
            raise IndexError(f"embedding index out of range 0 … {self.num_embeddings - 1}")
        return self._rows(rows)[place]
