"""Measure what the trellis codec's defaults were chosen by: per-channel scaling, and what a bit is worth in each tensor."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.lib import models, report
from seedpack.codecs.trellis import TrellisCodec
from seedpack.converter.sources.base import Source
from seedpack.converter.sources.open import open_source
from seedpack.eval.language import compare_language_models, windows
from seedpack.hf.language_model import load_language_model

CONTEXT, TOKENS = 1024, 4096
Importance = Callable[[Tensor, Tensor | None], Tensor]  # weight [out, in], power [in] -> h [in]


def squared(weight: Tensor) -> Tensor:
    """‖w‖² of each column, kept off zero."""
    power = weight.double().square().sum(0)
    return power.clamp_min(1e-6 * power.mean())


def known(weight: Tensor, power: Tensor | None) -> Tensor:
    return torch.ones(weight.shape[1], dtype=torch.float64) if power is None else power.double().clamp_min(1e-6)


BALANCES: dict[str, Importance] = {
    "no balance": lambda w, p: squared(w),
    "h = 1": lambda w, p: torch.ones_like(squared(w)),
    "h = 1 / ‖w‖": lambda w, p: squared(w) ** -0.5,
    "h = 1 / ‖w‖²": lambda w, p: 1 / squared(w),
    "h = power": lambda w, p: known(w, p),
    "h = power / ‖w‖": lambda w, p: known(w, p) * squared(w) ** -0.5,
    "scaled by √power": lambda w, p: known(w, p) ** 2 * squared(w),
}
KINDS = ("embed_tokens", "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@torch.no_grad()
def packed(
    model: Any, source: Source, code_bits: int, importance: Importance | None, only: str = ""
) -> tuple[Any, float, int]:
    """A copy of a model with its matrices packed and rebuilt; the relative error and the weights of those."""
    other, codec = copy.deepcopy(model), TrellisCodec(code_bits, effort="fast")
    error = energy = 0.0
    weights = 0
    for name, parameter in other.named_parameters():
        if parameter.dim() == 2 and only in name:
            power = source.norm_power(name)
            h = None if importance is None else importance(parameter, power)
            if importance is None and power is not None:
                h = BALANCES["h = power / ‖w‖"](parameter, power)
            shape = (parameter.shape[0], parameter.shape[1])
            rebuilt = codec.decode(codec.encode(parameter, h), shape, torch.float32)
            error += float((rebuilt - parameter).double().square().sum())
            energy += float(parameter.double().square().sum())
            weights += parameter.numel()
            parameter.copy_(rebuilt)
    return other, error / energy, weights


def embeddings(folder: Path) -> tuple[Any, Callable[[Any], Tensor]]:
    """all-MiniLM-L6-v2 and what gives a copy's sentence embeddings, for 256 lines of the text."""
    from transformers import AutoModel, AutoTokenizer

    model, tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    lines = [line.strip() for line in models.text()[1].split("\n") if len(line.strip()) > 80][:256]
    batch = tokenizer(lines, padding=True, truncation=True, max_length=128, return_tensors="pt")

    @torch.inference_mode()
    def embed(other: Any) -> Tensor:
        mask = batch["attention_mask"][..., None]
        hidden = other(**batch).last_hidden_state
        return torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1)

    return model, embed


def measure(result: report.Result) -> None:
    folder, name = models.smollm2(), models.text()[0]
    model, tokenizer = load_language_model(folder)
    source = open_source(folder)
    ids = windows(tokenizer, models.text()[1], CONTEXT, TOKENS)
    small = models.minilm()
    encoder, embed = embeddings(small)
    original, small_source = embed(encoder), open_source(small)
    rows: list[tuple[object, ...]] = []
    for label, importance in BALANCES.items():
        kl = compare_language_models(model, [packed(model, source, 3, importance)[0]], ids)[0].kl_mean
        found = embed(packed(encoder, small_source, 3, importance)[0])
        rows.append((label, f"{kl:.3f}", f"{1 - float((found * original).sum(1).mean()):.4f}"))
        print(rows[-1], flush=True)
    result.say(
        f"Trellis at 3 bits everywhere, effort `fast`. SmolLM2-135M, rescaled: KL on {TOKENS:,} tokens of {name}; "
        "all-MiniLM-L6-v2: mean 1 − cosine of 256 embeddings to the original's. h as in docs/codecs/trellis.md."
    )
    result.table(["balance", "SmolLM2 KL", "MiniLM 1 − cosine"], rows)
    rows = []
    for only, code_bits in [
        *((kind, 3) for kind in KINDS),
        *(("embed_tokens", k) for k in (2, 4, 5, 6)),
        ("layers.", 3),
    ]:
        other, error, weights = packed(model, source, code_bits, None, only)
        kl = compare_language_models(model, [other], ids)[0].kl_mean
        rows.append(
            (
                only,
                code_bits,
                f"{weights / 1e6:.1f}",
                f"{error:.4f}",
                f"{kl:.4f}",
                f"{kl / error:.2f}",
                f"{kl / error / weights * 1e6:.3f}",
            )
        )
        print(rows[-1], flush=True)
    result.say("One kind of tensor packed at a time:")
    result.table(
        ["tensors", "k", "million weights", "relative error", "KL", "KL / error", "for a million weights"], rows
    )


if __name__ == "__main__":
    report.run("choices", "What the trellis codec's defaults were chosen by", measure)
