"""Packed linear layers of vLLM."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from vllm.distributed import tensor_model_parallel_all_gather
from vllm.model_executor.layers.linear import LinearMethodBase, QKVParallelLinear, RowParallelLinear

from seedpack.errors import ModelError
from seedpack.formats import Manifest
from seedpack.vllm.pieces import Piece, register_parts, take_over

SHARDS = {"q": 0, "k": 1, "v": 2}


class PackedProduct(LinearMethodBase):
    """A linear layer whose weight is one tensor of the checkpoint or several, some of them packed.

    Args:
        manifest: of the packed tensors.
        names: of the layer's tensors.
    """

    def __init__(self, manifest: Manifest, names: list[str]):
        self.manifest, self.names = manifest, names

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Take note of the rows that this rank holds, and say where the parts go."""
        device = torch.get_default_device()
        sizes, indices = _partitions(layer, output_partition_sizes, output_size)
        if len(self.names) == 1 and len(sizes) > 1:  # fused in the checkpoint too
            starts = [sum(sizes[:i]) for i in range(len(sizes))]
            indices = [torch.cat([start + rows for start, rows in zip(starts, indices, strict=True)])]
            sizes = [sum(sizes)]
        if len(self.names) != len(sizes):
            raise ModelError(
                f"{layer.prefix}: vLLM makes it of {len(sizes)} matrices, and the checkpoint has {len(self.names)} "
                f"({', '.join(self.names)}); serve the model with transformers, or pack it without this layer (--exclude)"
            )
        pieces = [
            Piece(self.manifest, name, (size, input_size), rows, params_dtype)
            for name, size, rows in zip(self.names, sizes, indices, strict=True)
        ]

        def load(part: str, value: Tensor, shard: Any = None) -> None:
            pieces[0 if shard is None else SHARDS.get(shard, shard)].take(part, value, device)

        layer.unfilled = pieces
        register_parts(layer, pieces, "", load)

    def process_weights_after_loading(self, layer: Any) -> None:
        """Take over what was loaded."""
        take_over(layer)

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return x [..., in] times the transposed weight, plus bias.

        A layer that is parallel in its inputs is computed by output rows: its inputs are gathered, and each rank leaves the rows
        of the others zero, which are summed up afterwards.
        """
        parallel = isinstance(layer, RowParallelLinear) and layer.tp_size > 1
        if parallel:
            x = tensor_model_parallel_all_gather(x, dim=-1)
        found = [piece(x) for piece in layer.pieces]
        y = found[0] if len(found) == 1 else torch.cat(found, -1)
        if parallel:
            rows = _slice_of(layer.output_size, layer.tp_rank, layer.tp_size)
            y = nn.functional.pad(y, (rows.start, layer.output_size - rows.stop))
        return y if bias is None else y + bias


def _partitions(layer: Any, own: list[int], output_size: int) -> tuple[list[int], list[Tensor]]:
    """Return the sizes of the whole matrices of a layer, and the rows of each that this rank holds.

    Args:
        layer: of vLLM.
        own: rows of each matrix on this rank.
        output_size: of the whole layer.
    """
    rank, count = layer.tp_rank, layer.tp_size
    if isinstance(layer, RowParallelLinear):
        rows = _slice_of(output_size, rank, count)
        return [output_size], [torch.arange(rows.start, rows.stop, device="cpu")]
    replicas = [1] * len(own)
    if isinstance(layer, QKVParallelLinear):
        replicas = [1, layer.num_kv_head_replicas, layer.num_kv_head_replicas]
    sizes = [size * count // copies for size, copies in zip(own, replicas, strict=True)]
    starts = [rank // copies * size for size, copies in zip(own, replicas, strict=True)]
    return sizes, [torch.arange(start, start + size, device="cpu") for start, size in zip(starts, own, strict=True)]


def _slice_of(size: int, rank: int, count: int) -> slice:
    """Return the rows that one of `count` ranks holds."""
    return slice(rank * size // count, (rank + 1) * size // count)
