"""Small real architectures, built by config."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

import seedpack
from seedpack.api import unpack
from seedpack.codecs.seedlm import SeedLMCodec

CODEC = SeedLMCodec(9, 8, 3, 1)
SMALL: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
ROUTED: dict[str, Any] = {"num_key_value_heads": 2}


def llama(**more: Any) -> Any:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**SMALL, **ROUTED, **more}))


def gemma4(shared: int = 1) -> Any:
    """A model whose second layer takes the keys and values of the first, or not."""
    config: dict[str, Any] = {
        **SMALL, **ROUTED, "head_dim": 8, "global_head_dim": 8, "layer_types": ["full_attention"] * 2, "num_kv_shared_layers": shared,
        "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 96,
    }  # fmt: skip
    return transformers.Gemma4ForCausalLM(transformers.Gemma4TextConfig(**config))


ARCHITECTURES: dict[str, Callable[[], Any]] = {
    "llama": lambda: llama(tie_word_embeddings=False),
    "llama-tied": lambda: llama(tie_word_embeddings=True),
    "qwen3": lambda: transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**SMALL, **ROUTED, head_dim=8)),
    "gemma3": lambda: transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig(**SMALL, **ROUTED, head_dim=8)),
    "gpt2": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=96, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2)
    ),
    "bert": lambda: transformers.BertForMaskedLM(transformers.BertConfig(**{**SMALL, "eos_token_id": None, "bos_token_id": None})),
    "bert-encoder": lambda: transformers.BertModel(transformers.BertConfig(**{**SMALL, "eos_token_id": None, "bos_token_id": None})),
    "t5": lambda: transformers.T5ForConditionalGeneration(
        transformers.T5Config(
            vocab_size=96, d_model=32, d_ff=64, d_kv=8, num_layers=2, num_heads=4, decoder_start_token_id=0  # type: ignore[call-arg]
        )
    ),
    "mixtral": lambda: transformers.MixtralForCausalLM(transformers.MixtralConfig(**SMALL, **ROUTED, num_local_experts=4)),
    "qwen3-moe": lambda: transformers.Qwen3MoeForCausalLM(
        transformers.Qwen3MoeConfig(
            **SMALL, **ROUTED, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=48, decoder_sparse_step=1  # type: ignore[call-arg]
        )
    ),
}  # fmt: skip
IDS = torch.arange(24).reshape(2, 12) % 96


class Folders:
    """A dense folder, its packed one, and the dense model that the packed one decodes to."""

    def __init__(self, model: Any, path: Path, **options: Any):
        torch.manual_seed(0)
        self.cls = type(model)
        self.dense, self.packed, self.decoded = path / "dense", path / "packed", path / "decoded"
        model.save_pretrained(self.dense)
        self.report = seedpack.compress(self.dense, self.packed, **{"codec": CODEC, **options})
        unpack(self.packed, self.decoded)

    def reference(self, **options: Any) -> Any:
        return self.cls.from_pretrained(self.decoded, **options).eval()


@torch.no_grad()
def output(model: Any) -> torch.Tensor:
    more = {"decoder_input_ids": IDS} if model.config.is_encoder_decoder else {}
    result = model.eval()(IDS, **more)
    found: torch.Tensor = result.logits if hasattr(result, "logits") else result.last_hidden_state
    return found


def tokenizer(words: str = "the quick brown fox jumps over a lazy dog and b") -> Any:
    """A tokenizer of words."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    names = ["<unk>", "<s>", "</s>", *words.split()]
    made = Tokenizer(WordLevel({name: index for index, name in enumerate(names)}, unk_token="<unk>"))
    made.pre_tokenizer = Whitespace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", eos_token="</s>")
