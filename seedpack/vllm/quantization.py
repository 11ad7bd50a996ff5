"""The quantisation config that vLLM makes of a packed model's config.json."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

from seedpack.formats import Manifest
from seedpack.formats.reader import QUANT_METHOD, manifest_of_quantization
from seedpack.vllm.embedding import PackedVocabulary, TiedHead
from seedpack.vllm.experts import PackedExperts, expert_names
from seedpack.vllm.linear import PackedProduct


@register_quantization_config(QUANT_METHOD)
class SeedpackVllmConfig(QuantizationConfig):
    """The manifest of a packed model.

    Args:
        manifest: of its packed tensors, by the names of the checkpoint.
    """

    def __init__(self, manifest: Manifest):
        super().__init__()
        self.manifest = self.of_checkpoint = manifest
        self._in_vllm = {name: name for name in manifest.tensors}
        self.kept_packed: set[str] = set()  # names in vLLM

    @classmethod
    def get_name(cls) -> str:
        """Return the method's name."""
        return QUANT_METHOD

    @classmethod
    def get_supported_act_dtypes(cls) -> list[torch.dtype]:
        """Return the dtypes of activations."""
        return [torch.float32, torch.float16, torch.bfloat16]

    @classmethod
    def get_min_capability(cls) -> int:
        """Return the oldest generation of GPUs, Turing: Triton needs it."""
        return 75

    @staticmethod
    def get_config_filenames() -> list[str]:
        """Return no files: config.json has it all."""
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> SeedpackVllmConfig:
        """Make one of the JSON object in config.json."""
        return cls(manifest_of_quantization(config, "config.json: quantization_config"))

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """Take vLLM's names of tensors."""
        self._in_vllm = {name: hf_to_vllm_mapper.map_name(known) or known for name, known in self._in_vllm.items()}
        tensors = {self._in_vllm[name]: tensor for name, tensor in self.of_checkpoint.tensors.items()}
        self.manifest = replace(self.of_checkpoint, tensors=tensors)

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """Return how a layer is computed: from its packed weight, or as it is in vLLM, from one made dense (see `dense_weights`).

        Args:
            layer: of vLLM.
            prefix: its name in the model, which some layers are not told.
        """
        method, names = self._packed_method(layer, prefix)
        self.kept_packed |= self.manifest.tensors.keys() & names
        if method is None and isinstance(layer, LinearBase):
            method = UnquantizedLinearMethod()
        if method is not None:
            method.seedpack = self  # by which it is found again
        return method

    def _packed_method(self, layer: nn.Module, prefix: str) -> tuple[Any, set[str]]:
        """Return a layer's method, None if nothing of it is packed in a form that it takes, and the names of its tensors."""
        if isinstance(layer, RoutedExperts):
            names = set(expert_names(layer, prefix).values())
            return (
                (PackedExperts(layer.moe_config, self.manifest, prefix), names) if self._takes(names) else (None, set())
            )
        if isinstance(layer, LinearBase):
            base, _, leaf = prefix.rpartition(".")
            leaves = [leaf] if self._takes({f"{prefix}.weight"}) else self.packed_modules_mapping.get(leaf, [leaf])
            ordered = [f"{base}.{name}.weight" for name in leaves]
            return (PackedProduct(self.manifest, ordered), set(ordered)) if self._takes(set(ordered)) else (None, set())
        if isinstance(layer, VocabParallelEmbedding):
            name = f"{prefix}.weight" if prefix else self._embedding(layer)
            if self._takes({name}):
                return PackedVocabulary(self.manifest, name), {name}
            return (TiedHead() if isinstance(layer, ParallelLMHead) else None), set()
        return None, set()

    def _takes(self, names: set[str]) -> bool:
        """Return whether some of a layer's tensors are packed, and all of these as matrices [out, in]."""
        packed = [self.manifest.tensors[name] for name in names if name in self.manifest.tensors]
        return bool(packed) and all(len(tensor.shape) == 2 and not tensor.transposed for tensor in packed)

    def _embedding(self, layer: VocabParallelEmbedding) -> str:
        """Return the name of the packed embedding that a layer holds which was not told its own name, or ""."""
        shape = (layer.org_vocab_size, layer.embedding_dim)
        found = [
            name for name, tensor in self.manifest.tensors.items() if tensor.shape == shape and EMBEDDING.search(name)
        ]
        return found[0] if len(found) == 1 else ""

    def made_dense(self) -> Manifest:
        """Return the packed tensors, by their names in the checkpoint, that vLLM's layers take no other way than dense."""
        return self.of_checkpoint.select(name for name, known in self._in_vllm.items() if known not in self.kept_packed)


EMBEDDING = re.compile(r"(^|[._])(embed\w*|wte|word_embeddings|tok_embeddings)\.weight$")
