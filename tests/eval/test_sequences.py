from __future__ import annotations

import math

import pytest
import torch

from seedpack.errors import ModelError
from seedpack.eval.sequences import TARGET_TOKENS, compare_sequence_models, write_targets
from tests.helpers.models import ARCHITECTURES

PAIRS = [(torch.arange(5, 11), torch.tensor([20, 21, 1])), (torch.arange(30, 34), torch.tensor([40, 41, 42, 43, 1]))]


def test_by_definition() -> None:
    a, b = ARCHITECTURES["t5"]().eval(), ARCHITECTURES["t5"]().eval()
    done: list[int] = []
    other, same = compare_sequence_models(a, [b, a], PAIRS, done.append)
    rows = []
    for model in (a, b):
        with torch.no_grad():  # the decoder starts with token 0
            starts = [torch.cat([torch.tensor([0]), target[:-1]])[None] for _, target in PAIRS]
            rows.append(
                torch.cat(
                    [
                        model(input_ids=s[None], decoder_input_ids=d).logits[0]
                        for (s, _), d in zip(PAIRS, starts, strict=True)
                    ]
                )
            )
    targets = torch.cat([target for _, target in PAIRS])
    for logits, perplexity in zip(rows, (other.perplexity_original, other.perplexity_packed), strict=True):
        assert perplexity == pytest.approx(math.exp(torch.nn.functional.cross_entropy(logits, targets)), rel=1e-4)
    p, q = (logits.log_softmax(1) for logits in rows)
    assert other.kl_mean == pytest.approx(float((p.exp() * (p - q)).sum(1).mean()), rel=1e-3)
    assert other.top1_agreement == pytest.approx(float((p.argmax(1) == q.argmax(1)).float().mean()))
    assert (same.kl_mean, same.top1_agreement) == (0, 1) and other.tokens == 8 and other.pairs == 2 and done == [3, 5]


def test_targets_are_the_originals_own() -> None:
    model = ARCHITECTURES["t5"]().eval()
    (target,) = write_targets(model, [PAIRS[0][0]])
    ids = torch.tensor([[0]])
    with torch.no_grad():
        while ids.shape[1] <= TARGET_TOKENS and ids[0, -1] != model.config.eos_token_id:
            logits = model(input_ids=PAIRS[0][0][None], decoder_input_ids=ids).logits[0, -1]
            ids = torch.cat([ids, logits.argmax()[None, None]], 1)
    assert target.tolist() == ids[0, 1:].tolist()


def test_targets_without_tokens() -> None:
    model = ARCHITECTURES["t5"]()
    with pytest.raises(ModelError, match="no target has a token"):
        compare_sequence_models(model, [model], [(PAIRS[0][0], torch.empty(0, dtype=torch.int64))])
    with pytest.raises(ModelError, match="a T5ForConditionalGeneration cannot run on this"):
        write_targets(model, [torch.tensor([1000])])
