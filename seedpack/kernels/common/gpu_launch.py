"""Launch the kernels of `gpu_tiles` for a regenerated weight."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from seedpack.kernels.common import gpu_configs as configs
from seedpack.kernels.common import gpu_tiles as tiles
from seedpack.kernels.common.row_tiles import FEW_TOKENS, pad_tokens

Grid = Callable[[configs.Config], tuple[int, ...]]
# The arguments, where a kernel has them, for whose values a configuration is searched.
SEARCHED_FOR = ["rows", "columns", "blocks", "TOKENS", "BUCKET", "INT8", "SIZES", "CODE_BITS"]
tuners: dict[tuple[str, Any], Any] = {}  # by kernel and TILE; `tuner.cache` holds what each has found


@dataclass(frozen=True)
class Regenerated:
    """A weight [rows, columns] that a TILE function regenerates; see `gpu_tiles`.

    Attributes:
        tile: the function.
        parts: its pointers and numbers.
        sizes: its constants.
        scale: float32 [rows], or [1] for all rows.
        rows: of the weight.
        columns: of the weight.
        heavy: whether a tile takes many registers.
        dense_share: of the places of a tile, those that are columns of the weight: (numerator, denominator).
    """

    tile: Any
    parts: tuple[Any, ...]
    sizes: tuple[int, ...]
    scale: Tensor
    rows: int
    columns: int
    dense_share: tuple[int, int] = (1, 1)
    heavy: bool = False

    def steps(self, block_k: int) -> int:
        """Return how many steps of BLOCK_K places of a tile cover the columns."""
        return int(triton.cdiv(self.columns, block_k * self.dense_share[0] // self.dense_share[1]))

    @property
    def stride_scale(self) -> int:
        """The distance between the scales of neighbouring rows."""
        return int(self.scale.numel() > 1)


def start(kernel: Any, name: str, device: torch.device, grid: Grid, *args: Any, **constants: Any) -> None:
    """Launch a kernel in the configuration for a device: a fixed one, or the fastest of its candidates.

    The candidates are measured at the first call with new sizes, and the result is kept on disk.
    """
    config = configs.fixed(name, device)
    with configs.current(device):
        if config is None:
            autotuned(kernel, name, constants.get("TILE"))[grid](*args, **constants)
        else:
            kernel[grid(config)](*args, **constants, **config)


def start_on_tensor_cores(
    kernel: Any, grid: Grid, operand: Tensor, weight: Regenerated, *args: Any, **constants: Any
) -> None:
    """Launch a kernel for many tokens, operand [tokens, n] the first of its arguments."""
    device, bucket = operand.device, configs.tokens_bucket(len(operand))
    constants |= {"PRECISION": configs.precision(device), "BUCKET": bucket}
    start(kernel, configs.matmul(operand, weight.heavy), device, grid, operand, *args, **constants)


def autotuned(kernel: Any, name: str, tile: Any) -> Any:
    """Return a kernel, for a TILE, that measures its candidates."""
    if (name, tile) in tuners:
        return tuners[name, tile]
    choices = [
        triton.Config(
            {key: value for key, value in config.items() if key.startswith("BLOCK")},
            **{key: value for key, value in config.items() if key.startswith("num")},
        )
        for config in configs.CANDIDATES[name]
    ]
    key = [argument for argument in SEARCHED_FOR if argument in kernel.arg_names]
    if name == "dense":  # as many rows as an embedding looks up
        key.remove("rows")
    tuners[name, tile] = triton.autotune(choices, key=key, cache_results=True)(kernel)
    return tuners[name, tile]


def dense(weight: Regenerated, dtype: torch.dtype, first: int = 0, rows: int | None = None) -> Tensor:
    """Return the weight, or so many of its rows from one on, in a dtype."""
    rows = weight.rows if rows is None else rows
    out = torch.empty(rows, weight.columns, dtype=dtype, device=weight.scale.device)
    if rows:

        def grid(block: configs.Config) -> tuple[int, ...]:
            return triton.cdiv(rows, block["BLOCK_N"]), weight.steps(block["BLOCK_K"])

        args = out, weight.scale, weight.parts, first, rows, weight.columns, weight.stride_scale
        start(tiles.dense_kernel, "dense", out.device, grid, *args, TILE=weight.tile, SIZES=weight.sizes)
    return out


def dense_chunks(weight: Regenerated, dtype: torch.dtype) -> Iterator[tuple[int, Tensor]]:
    """Yield the weight in a dtype, as many rows at a time as `configs.DENSE_WEIGHTS` says, each time with the first row."""
    step = max(1, configs.DENSE_WEIGHTS // weight.columns)
    for first in range(0, weight.rows, step):
        yield first, dense(weight, dtype, first, min(step, weight.rows - first))


def matmul(x: Tensor, weight: Regenerated, dtype: torch.dtype) -> Tensor:
    """Multiply x [tokens, columns] by the weight transposed, in a dtype, which also says how exact the product must be.

    Few tokens multiply in float32. For more, 16-bit dtypes allow float16 on tensor cores, each token of x scaled to its
    largest value; float32 is kept exact. For hundreds in bfloat16 it costs less to decode the weight once, some rows at a
    time, than for every tile of tokens again.
    """
    if dtype == torch.bfloat16 and len(x) >= configs.MANY_TOKENS:
        x = x.to(dtype)
        pieces = [x @ chunk.T for _, chunk in dense_chunks(weight, dtype)]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, 1)
    if x.shape[0] <= FEW_TOKENS:
        return few_tokens(x, weight, dtype)
    operand, x_scale = tensor_core_operand(x, dtype)
    out = torch.empty(x.shape[0], weight.rows, dtype=dtype, device=x.device)

    def grid(block: configs.Config) -> tuple[int, ...]:
        return triton.cdiv(len(x), block["BLOCK_M"]), triton.cdiv(weight.rows, block["BLOCK_N"])

    shape = len(x), weight.rows, weight.columns, weight.stride_scale
    args = x_scale, out, weight.scale, weight.parts, *shape
    constants = {"TILE": weight.tile, "SIZES": weight.sizes, "SHARE": weight.dense_share}
    start_on_tensor_cores(tiles.matmul_kernel, grid, operand, weight, *args, **constants)
    return out


def few_tokens(x: Tensor, weight: Regenerated, dtype: torch.dtype) -> Tensor:
    """Multiply as `matmul`, at most 8 tokens."""
    padded = pad_tokens(x, 0)
    out = torch.empty(len(padded), weight.rows, dtype=dtype, device=x.device)

    def grid(block: configs.Config) -> tuple[int, ...]:
        return (triton.cdiv(weight.rows, block["BLOCK_N"]),)

    args = padded, out, weight.scale, weight.parts, weight.rows, weight.columns, weight.stride_scale
    constants = {"TOKENS": len(padded), "TILE": weight.tile, "SIZES": weight.sizes, "SHARE": weight.dense_share}
    start(tiles.few_tokens_kernel, "few_tokens", x.device, grid, *args, **constants)
    return out[: len(x)]


def matmul_transposed(grad: Tensor, weight: Regenerated, dtype: torch.dtype) -> Tensor:
    """Multiply grad [tokens, rows] by the weight, in a dtype; exact as `matmul` is."""
    if dtype == torch.bfloat16 and len(grad) >= configs.MANY_TOKENS:
        grad = grad.to(dtype)
        pieces = [grad[:, first : first + len(chunk)] @ chunk for first, chunk in dense_chunks(weight, dtype)]
        return pieces[0] if len(pieces) == 1 else torch.stack(pieces).float().sum(0).to(dtype)
    operand, grad_scale = tensor_core_operand(grad.float() * weight.scale, dtype)
    out = torch.empty(grad.shape[0], weight.columns, dtype=dtype, device=grad.device)
    if len(grad):

        def grid(block: configs.Config) -> tuple[int, ...]:
            return triton.cdiv(len(grad), block["BLOCK_M"]), weight.steps(block["BLOCK_K"])

        args = grad_scale, out, weight.parts, len(grad), weight.rows, weight.columns
        start_on_tensor_cores(
            tiles.transposed_kernel, grid, operand, weight, *args, TILE=weight.tile, SIZES=weight.sizes
        )
    return out


def tensor_core_operand(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return what the tensor cores take for x [tokens, n], and the factor of each token: float16 in ±1, or float32 as it is."""
    x = x.float()
    if dtype == torch.float32:
        return x.contiguous(), torch.ones(x.shape[0], dtype=torch.float32, device=x.device)
    scale = x.abs().amax(1).clamp_min(torch.finfo(torch.float32).tiny)
    return (x / scale[:, None]).half().contiguous(), scale
