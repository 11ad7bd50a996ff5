"""A packed folder is served by `vllm serve`, and gives the tokens that transformers gives.

Needs a Python of its own that has vLLM: `make test-vllm`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import seedpack
from benchmarks.lib import serving
from seedpack.loader.fill import use_int8_activations_
from tests.helpers.tokenizers import byte_tokenizer

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(serving.python() is None, reason=f"needs vLLM: make test-vllm, or {serving.VARIABLE}"),
]
TOKENS, SIZES = 32, {"vocab_size": 300, "hidden_size": 256, "intermediate_size": 384, "num_hidden_layers": 2,
                     "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256}  # fmt: skip
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "tied": ("Llama", {"tie_word_embeddings": True}),
    "untied": ("Llama", {"tie_word_embeddings": False}),
    "experts": ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "transposed": ("GPT2", {"n_embd": 256, "n_layer": 2, "n_head": 4, "n_positions": 256}),
}
PROMPTS = [[(7 * n + 13 * i) % 290 + 3 for i in range(3 + 4 * n)] for n in range(10)]


def folder(path: Path, kind: str, **options: Any) -> Path:
    """Write a packed model."""
    import transformers

    name, changes = KINDS[kind]
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**{**SIZES, **changes, "bos_token_id": 1, "eos_token_id": 2})
    model = transformers.AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, 0, 0.08)
    model.save_pretrained(path / "dense")
    byte_tokenizer().save_pretrained(path / "dense")
    seedpack.compress(path / "dense", path / "packed", settings={"effort": "fast"}, **options)
    return path / "packed"


def tokens_of_transformers(packed: Path) -> list[list[int]]:
    """Return what transformers writes, greedily."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(packed, dtype=torch.float32)
    use_int8_activations_(model, False)
    model.generation_config.eos_token_id = None  # as the server is asked: it goes on behind an end
    found = []
    for prompt in PROMPTS:
        whole = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=TOKENS, pad_token_id=0)
        found.append(whole[0, len(prompt) :].tolist())
    return found


@pytest.fixture
def one_core_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")


@pytest.mark.parametrize("kind", KINDS)
def test_the_tokens_of_transformers(tmp_path: Path, kind: str) -> None:
    """One after the other, and 16 at once."""
    packed = folder(tmp_path, kind)
    expected = tokens_of_transformers(packed)
    with serving.served(packed, "--dtype", "float32", "--max-model-len", "256", "--enforce-eager") as url:
        assert serving.complete(url, PROMPTS, TOKENS)[0] == expected
        many = [PROMPTS[i % 10] for i in range(16)]
        assert serving.complete(url, many, TOKENS, at_once=16)[0] == [expected[i % 10] for i in range(16)]


@pytest.mark.parametrize("kind", ["tied", "experts"])
@pytest.mark.usefixtures("one_core_each")
def test_two_ranks(tmp_path: Path, kind: str) -> None:
    packed = folder(tmp_path, kind)
    options = ["--dtype", "float32", "--max-model-len", "256", "--enforce-eager", "--tensor-parallel-size", "2"]
    with serving.served(packed, *options) as url:
        assert serving.complete(url, PROMPTS, TOKENS, at_once=4)[0] == tokens_of_transformers(packed)


def test_compiled(tmp_path: Path) -> None:
    """With vLLM's compilation, whose graphs take the products as they are."""
    packed = folder(tmp_path, "tied", bits=3)
    with serving.served(packed, "--dtype", "float32", "--max-model-len", "256") as url:
        assert serving.complete(url, PROMPTS, TOKENS, at_once=4)[0] == tokens_of_transformers(packed)


def test_a_damaged_file(tmp_path: Path) -> None:
    packed = folder(tmp_path, "tied")
    with (packed / "model.safetensors").open("r+b") as file:
        file.seek(-1000, 2)
        byte = file.read(1)
        file.seek(-1000, 2)
        file.write(bytes([byte[0] ^ 1]))
    with (
        pytest.raises(RuntimeError, match="is damaged: its digest differs"),
        serving.served(packed, "--dtype", "float32", "--max-model-len", "256", "--enforce-eager"),
    ):
        pass
