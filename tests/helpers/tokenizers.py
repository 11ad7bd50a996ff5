"""Tokenizers: of the words w4 … w95, for the vocabularies of `helpers.models`, and of bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

CHAT_TEMPLATE = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"


def word_tokenizer(*, template: str = "", pad: bool = True) -> Any:
    """Return a tokenizer: 0 <pad>, 1 <s>, 2 </s>, 3 <unk>, and n for wn.

    Args:
        template: of a text with its special tokens, as "<s> $A </s>".
        pad: name the token to pad with.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3}
    tokenizer = Tokenizer(models.WordLevel(special | {f"w{i}": i for i in range(4, 96)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if template:
        tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=list(special.items()))
    names = {"unk_token": "<unk>", "eos_token": "</s>"} | ({"pad_token": "<pad>"} if pad else {})
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def words(path: Path, lines: int, *, answers: list[str] | None = None) -> Path:
    """Write a text of different lines of 3 to 9 words, each with an answer after a tab if there are answers."""
    texts = [" ".join(f"w{4 + (7 * i * i + 5 * j) % 92}" for j in range(3 + i % 7)) for i in range(lines)]
    ends = ["", *(f"\t{answer}" for answer in answers or [])]
    path.write_text("\n".join(text + ends[1 + i % (len(ends) - 1) if answers else 0] for i, text in enumerate(texts)))
    return path


def byte_tokenizer(template: str | None = None) -> Any:
    """Return a tokenizer whose tokens are parts of characters, after 0 <s> and 1 </s>; with a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: i for i, token in enumerate(["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    result = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    result.chat_template = template
    return result
