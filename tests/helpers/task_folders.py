"""Folders of tiny models for each task of `eval`, with tokenizers and image processors."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image

import seedpack
from tests.helpers.models import ARCHITECTURES, SMALL, llama
from tests.helpers.tokenizers import word_tokenizer

BERT = {**SMALL, "eos_token_id": None, "bos_token_id": None}
MODELS: dict[str, Callable[[], Any]] = {
    "language-modeling": llama,
    "seq2seq": ARCHITECTURES["t5"],
    "embeddings": ARCHITECTURES["bert"],
    "text-classification": lambda: transformers.BertForSequenceClassification(
        transformers.BertConfig(**BERT, id2label={0: "bad", 1: "fair", 2: "good"}, label2id={"bad": 0, "fair": 1, "good": 2})
    ),
    "image-classification": lambda: transformers.ViTForImageClassification(
        transformers.ViTConfig(
            **{key: SMALL[key] for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")},
            image_size=16, patch_size=8, id2label={0: "cat", 1: "dog"}, label2id={"cat": 0, "dog": 1},
        )
    ),
}  # fmt: skip


def task_folder(path: Path, task: str) -> Path:
    """Write a tiny random model for a task, of weights large enough to tell its inputs apart."""
    torch.manual_seed(0)
    model = MODELS[task]()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4.0 if parameter.dim() > 1 else 1.0)
    model.save_pretrained(path)
    if task == "image-classification":
        sizes = {"size": {"height": 16, "width": 16}, "image_processor_type": "ViTImageProcessor"}
        (path / "preprocessor_config.json").write_text(json.dumps(sizes))
    else:
        template = {"language-modeling": "", "seq2seq": "$A </s>"}.get(task, "<s> $A </s>")
        word_tokenizer(template=template).save_pretrained(path)
    return path


def packed(folder: Path, bits: float) -> Path:
    """Pack a folder beside it; 32 bits are raw tensors."""
    out = folder.parent / f"packed-{bits:g}"
    settings: dict[str, Any] = {"codec": "raw"} if bits == 32 else {"bits": bits, "settings": {"effort": "fast"}}
    seedpack.compress(folder, out, **settings)
    return out


def pictures(folder: Path, count: int, *names: str) -> Path:
    """Write different images, into sub-folders by turns if there are names."""
    generator = torch.Generator().manual_seed(0)
    for i in range(count):
        where = folder / (names[i % len(names)] if names else "")
        where.mkdir(parents=True, exist_ok=True)
        pixels = torch.randint(0, 256, (20, 24, 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(where / f"{i:03}.png")
    return folder
