"""Packed experts of vLLM's mixtures."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from vllm.distributed import tensor_model_parallel_all_gather
from vllm.model_executor.layers.fused_moe.activation import apply_moe_activation
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase

from seedpack.formats import Manifest
from seedpack.vllm.pieces import Piece, register_parts, rows_of

SHARDS = ("w1", "w3", "w2")  # gate, up, down


def expert_names(layer: Any, prefix: str) -> dict[tuple[int, str], str]:
    """Return the names of the tensors of all experts, by expert and shard."""
    leaves = zip(SHARDS, (layer.ckpt_gate_proj_name, layer.ckpt_up_proj_name, layer.ckpt_down_proj_name), strict=True)
    return {
        (expert, shard): f"{prefix}.{expert}.{leaf}.weight"
        for shard, leaf in leaves
        if leaf is not None
        for expert in range(layer.global_num_experts)
    }


class PackedExperts(FusedMoEMethodBase):
    """The experts of a layer, each of whose matrices is a tensor of the checkpoint.

    Args:
        moe: vLLM's config of the layer.
        manifest: of the packed tensors.
        prefix: of the layer.
    """

    def __init__(self, moe: Any, manifest: Manifest, prefix: str):
        super().__init__(moe)
        self.manifest, self.prefix = manifest, prefix

    def create_weights(
        self,
        layer: Any,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Take note of the experts, and of their rows, that this rank holds, and say where the parts go."""
        device, parallel = torch.get_default_device(), self.moe.moe_parallel_config
        rank, count = parallel.tp_rank, parallel.tp_size
        inner = intermediate_size_per_partition * count
        shapes = {"w1": (inner, hidden_size), "w3": (inner, hidden_size), "w2": (hidden_size, inner)}
        pieces: dict[tuple[int, str], Piece] = {}
        for (expert, shard), name in expert_names(layer, self.prefix).items():
            local, size = layer._map_global_expert_id_to_local_expert_id(expert), shapes[shard][0]
            if local >= 0:
                rows = torch.arange(rank * size // count, (rank + 1) * size // count, device="cpu")
                pieces[local, shard] = Piece(self.manifest, name, shapes[shard], rows, params_dtype)

        def load(part: str, value: Tensor, *_: Any, shard_id: str, expert_id: int, **__: Any) -> bool:
            local = layer._map_global_expert_id_to_local_expert_id(expert_id)
            if local >= 0:
                pieces[local, shard_id].take(part, value, device)
            return bool(local >= 0)

        layer.unfilled = pieces
        for prefix, shards in (("w13_", ("w1", "w3")), ("w2_", ("w2",))):
            register_parts(layer, [piece for (_, shard), piece in pieces.items() if shard in shards], prefix, load)

    def process_weights_after_loading(self, layer: Any) -> None:
        """Take over what was loaded."""
        if hasattr(layer, "unfilled"):
            for shard in SHARDS:
                own = [piece for (_, of), piece in sorted(layer.unfilled.items()) if of == shard]
                layer.add_module(shard, rows_of(own))
            del layer.unfilled

    def get_fused_moe_quant_config(self, layer: Any) -> None:
        """Return nothing: none of vLLM's own kernels is used."""

    def apply(
        self,
        layer: Any,
        x: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        shared_experts: Any = None,
        shared_experts_input: Tensor | None = None,
    ) -> Tensor:
        """Return the weighted sum of the chosen experts of each token, [tokens, hidden]; in part, for the sum over ranks.

        Experts run one after the other, over the tokens that chose them. The inner activations are gathered once for all, where
        ranks hold some rows each.
        """
        ids = topk_ids if layer.expert_map is None else layer.expert_map[topk_ids.long()]
        chosen = []  # (expert, tokens, their places in topk)
        for expert in ids[ids >= 0].unique().tolist():
            chosen.append((expert, *torch.where(ids == expert)))
        out = torch.zeros_like(x)
        if not chosen:
            return out
        inputs = []
        for expert, tokens, places in chosen:
            rows = x[tokens]
            if layer.apply_router_weight_on_input:
                rows = rows * topk_weights[tokens, places, None].to(x.dtype)
            found = [module[expert](rows) for module in (layer.w1, layer.w3) if len(module)]
            both = torch.cat(found, -1)
            inputs.append(apply_moe_activation(layer.activation, both.new_empty(len(rows), found[0].shape[-1]), both))
        inner, parallel = torch.cat(inputs), self.moe.moe_parallel_config
        if parallel.tp_size > 1:
            inner = tensor_model_parallel_all_gather(inner, dim=-1)
        hidden, size = x.shape[-1], parallel.tp_size
        start, stop = parallel.tp_rank * hidden // size, (parallel.tp_rank + 1) * hidden // size
        for (expert, tokens, places), rows in zip(chosen, inner.split([len(t) for _, t, _ in chosen]), strict=True):
            y = layer.w2[expert](rows)
            if not layer.apply_router_weight_on_input:
                y = y * topk_weights[tokens, places, None].to(x.dtype)
            out[:, start:stop].index_add_(0, tokens, y)
        return out
