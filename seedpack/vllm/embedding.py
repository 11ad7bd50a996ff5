"""Packed embeddings and output heads of vLLM."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod

from seedpack.formats import Manifest
from seedpack.vllm.pieces import Piece, register_parts, take_over


class PackedVocabulary(QuantizeMethodBase):
    """An embedding or an output head that is packed.

    Args:
        manifest: of the packed tensors.
        name: of the layer's tensor.
    """

    def __init__(self, manifest: Manifest, name: str):
        self.manifest, self.name = manifest, name

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
        device, own = torch.get_default_device(), layer.shard_indices
        rows = torch.arange(own.org_vocab_start_index, own.org_vocab_end_index, device="cpu")
        vocabulary = self.manifest.tensors[self.name].shape[0]
        piece = Piece(self.manifest, self.name, (vocabulary, input_size), rows, params_dtype)
        layer.unfilled = [piece]
        register_parts(layer, [piece], "", lambda part, value: piece.take(part, value, device))

    def process_weights_after_loading(self, layer: Any) -> None:
        """Take over what was loaded."""
        take_over(layer)

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return logits [..., rows of this rank with padding]."""
        embedding = getattr(layer, "tied_to", [layer])[0]
        y = embedding.pieces[0](x)
        y = nn.functional.pad(y, (0, layer.num_embeddings_per_partition - y.shape[-1]))
        return y if bias is None else y + bias

    def embedding(self, layer: Any, input_: Tensor) -> Tensor:
        """Return the rows [..., in] of tokens, whose numbers are those of this rank's rows."""
        rows = layer.pieces[0]
        found: Tensor = rows.lookup(input_)
        return found

    def tie_weights(self, layer: Any, embed_tokens: Any) -> Any:
        """Have a head use the weight of an embedding."""
        return tied(layer, embed_tokens)


class TiedHead(UnquantizedEmbeddingMethod):
    """An output head that has no packed weight of its own: it is raw, or takes that of a packed embedding."""

    def tie_weights(self, layer: Any, embed_tokens: Any) -> Any:
        """Have a head use the weight of an embedding."""
        if not isinstance(embed_tokens.quant_method, PackedVocabulary):
            return super().tie_weights(layer, embed_tokens)
        return tied(layer, embed_tokens)


def tied(layer: Any, embed_tokens: Any) -> Any:
    """Take a head's own weight away, and have it use that of a packed embedding."""
    for name, _ in list(layer.named_parameters(recurse=False)):
        if name != "bias":
            delattr(layer, name)
    layer.tied_to, layer.quant_method = [embed_tokens], embed_tokens.quant_method  # in a list: no module of the head
    return layer
