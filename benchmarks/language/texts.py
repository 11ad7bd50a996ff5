"""Which text to calibrate on: a model's own, more of it, begun in other ways, real texts, and mixtures."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from dataclasses import asdict
from pydoc_data import topics
from typing import Any

import torch
from torch import Tensor

from benchmarks.language.calibration import CALIBRATION_TOKENS, Subject
from benchmarks.language.peers import TEXTS, code
from benchmarks.lib import models, pages, report
from seedpack import Calibration
from seedpack.hf.language_model import load_language_model
from seedpack.hf.own_text import generate_tokens

TOKENS = 8192  # of each text that is scored
CONTEXT = 128  # of what the model writes
PROMPTS = (  # in several languages and formats
    "The history of the", "Once upon a time", "In mathematics, a", "Abstract: We", "def main(args", "#include <std", "SELECT * FROM",
    '{"name": "', "<html><body", "Dear Sir or", "Q: How do I", "Step 1: Take", "L'histoire de", "La ciudad de", "Die Stadt",
    "O governo do", "Il libro di", "In 1914 the", "Breaking news: the", "Chapter 1: A", "Ingredients: 2", "import numpy as",
    "function add(a", "1. First, the", "A: Hello, how", "Review: This", "The law of the", "According to the", "Theorem. Let",
    "My favourite song", "Patients with a", "- a list of",
)  # fmt: skip


class Reader(Subject):
    """A language model, and the texts that it may be calibrated on, int64 [n, context]."""

    def __init__(self) -> None:
        super().__init__("", "SmolLM2-135M-Instruct", models.smollm2(), TOKENS, [models.wikitext(), code()])

    @functools.cache  # noqa: B019  # one reader
    def own(self, tokens: int = CALIBRATION_TOKENS, context: int = CONTEXT, seed: int = 0) -> Tensor:
        """Return what `--calibration self` writes: each sequence begins with a token drawn from the vocabulary."""
        return generate_tokens(load_language_model(self.folder)[0], tokens, context, seed)

    def wikitext(self, tokens: int = CALIBRATION_TOKENS) -> Tensor:
        return self.text(models.unscored_wikitext(), tokens)

    def manual(self, tokens: int = CALIBRATION_TOKENS) -> Tensor:
        return self.text("\n\n".join(topics.topics.values()), tokens)

    def begun(self, *starts: str, temperature: float = 1.0) -> Tensor:
        """Return what the model writes on from the first tokens of texts."""
        model, tokenizer = load_language_model(self.folder)
        begun = [tokenizer(start)["input_ids"] for start in starts]
        length = min(map(len, begun))
        count = CALIBRATION_TOKENS // CONTEXT
        ids = torch.tensor([start[:length] for start in itertools.islice(itertools.cycle(begun), count)])
        torch.manual_seed(0)
        with torch.inference_mode():
            written: Tensor = model.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=True, temperature=temperature, top_k=0, top_p=1.0,
                max_new_tokens=CONTEXT - length, min_new_tokens=CONTEXT - length, pad_token_id=0,
            )  # fmt: skip
        return written.clone()

    def measured(self, bits: int, text: Tensor | None) -> dict[str, Any]:
        calibration = None if text is None else Calibration(text, context=text.shape[1], sequential=False)
        stored, scores = self.ours("trellis", bits, calibration, settings={"effort": "fast"})
        return {"bits": stored, "texts": {name: asdict(score) for name, score in zip(TEXTS, scores, strict=True)}}


def texts_of(reader: Reader) -> dict[str, tuple[tuple[int, ...], Callable[[], Tensor | None]]]:
    """List the texts by what is said of them, and the bits that are measured with each."""

    def with_half(other: Tensor) -> Tensor:
        return torch.cat([reader.own()[::2], other.reshape(-1, CONTEXT)[::2]])

    return {
        "none": ((4, 3, 2), lambda: None),
        "own": ((4, 3, 2), reader.own),
        "own, 65,536 tokens": ((4, 3, 2), lambda: reader.own(65536)),
        "own, 262,144 tokens": ((4, 3, 2), lambda: reader.own(262144)),
        "own, of another seed": ((3,), lambda: reader.own(seed=1)),
        "own, sequences of 512": ((3,), lambda: reader.own(context=512)),
        "own, sequences of 256": ((3,), lambda: reader.own(context=256)),
        "own, all from the first token": ((3,), lambda: reader.begun("<|im_start|>")),
        "own, at temperature 0.7": ((3,), lambda: reader.begun("<|im_start|>", temperature=0.7)),
        "own, after short prompts": ((3,), lambda: reader.begun(*PROMPTS)),
        "own half, half as a user's turns": ((3,), lambda: with_half(reader.begun("<|im_start|>user\n"))),
        "WikiText-2": ((4, 3, 2), reader.wikitext),
        "WikiText-2, 65,536 tokens": ((3,), lambda: reader.wikitext(65536)),
        "Python's manual": ((3,), reader.manual),
        "own half, half Python's manual": ((3,), lambda: with_half(reader.manual())),
        "own half, half WikiText-2": ((3,), lambda: with_half(reader.wikitext())),
        "own, and as much of Python's manual": ((3,), lambda: torch.cat([reader.own(), reader.manual().reshape(-1, CONTEXT)])),
    }  # fmt: skip


def measure(result: report.Result) -> None:
    reader = Reader()
    rows = []
    for title, (rates, text) in texts_of(reader).items():
        text = functools.cache(text)
        for bits in rates:
            label = f"{title}, {bits} bits"
            if result.wanted(label):
                found = report.kept("texts", label, lambda: reader.measured(bits, text()))  # noqa: B023
                rows.append({"text": title, "k": bits, **found})
    rows = result.joined(rows)
    result.say(
        f"KL to the original (nats per token) on {TOKENS:,} tokens each of {models.WIKITEXT} and of the modules of Python's library, context "
        "1024, with 95% confidence intervals by blocks of 256 tokens. SmolLM2-135M-Instruct (rescaled), linear layers by `trellis` "
        f"at effort `fast`, not in sequence; calibrated on {CALIBRATION_TOKENS:,} tokens unless said otherwise. "
        f"`own` (sequences of {CONTEXT}) is what `--calibration self` writes; WikiText-2 is the second half of the text whose beginning is scored, "
        "and Python's manual speaks of what is scored, in prose."
    )
    for bits in (4, 3, 2):
        mine = [row for row in rows if row["k"] == bits]
        if mine:
            result.say(f"## {bits} bits")
            result.table(["text", *(f"KL, {text}" for text in TEXTS), "measured"], [
                (row["text"], *(pages.divergence(row["texts"][text]) for text in TEXTS), row["measured"]) for row in mine
            ])  # fmt: skip


if __name__ == "__main__":
    report.run("texts", "Texts to calibrate on", measure)
