from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from seedpack.errors import ModelError
from seedpack.eval.language import compare_language_models
from seedpack.eval.tensors import compare_tensors
from seedpack.hf.language_model import load_language_model
from tests.helpers.models import llama


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(3, 96, (3, 20))


def test_a_model_against_itself(ids: torch.Tensor) -> None:
    model = llama()
    done: list[int] = []
    (report,) = compare_language_models(model, [model], ids, done.append)
    assert report.kl_mean == 0 == report.kl_p99 and report.top1_agreement == 1
    assert report.perplexity_original == report.perplexity_packed and report.tokens == 57 and sum(done) == 57
    with torch.no_grad():
        nll = torch.nn.functional.cross_entropy(model.eval()(ids).logits[:, :-1].reshape(-1, 96), ids[:, 1:].flatten())
    assert report.perplexity_original == pytest.approx(math.exp(nll), rel=1e-5)


def test_divergence_by_its_definition(ids: torch.Tensor) -> None:
    a, b = llama(), llama()
    (report,) = compare_language_models(a, [b], ids)
    with torch.no_grad():
        p, q = (m.eval()(ids).logits[:, :-1].log_softmax(-1) for m in (a, b))
    kl = torch.nn.functional.kl_div(q, p, reduction="none", log_target=True).sum(-1)
    assert report.kl_mean == pytest.approx(float(kl.mean()), rel=1e-4)
    assert report.kl_p99 == pytest.approx(float(kl.flatten().quantile(0.99)), rel=1e-3)


def test_bad_models(ids: torch.Tensor, tmp_path: Path) -> None:
    with pytest.raises(
        ModelError,
        match="LlamaForCausalLM has 97 tokens in its vocabulary, but LlamaForCausalLM has 96; compare models that",
    ):
        compare_language_models(llama(), [llama(vocab_size=97)], ids)
    broken = llama()
    with torch.no_grad():
        broken.model.norm.weight.fill_(math.nan)
    with pytest.raises(ModelError, match="not finite"):
        compare_language_models(broken, [llama()], ids)
    with pytest.raises(ModelError, match="not finite"):
        compare_language_models(llama(), [broken], ids)
    with pytest.raises(ModelError, match="no config.json to be had; expected a Hugging Face folder"):
        load_language_model(tmp_path)


def test_tensors_without_a_common_name(tmp_path: Path) -> None:
    for name in ("a", "b"):
        torch.save({f"{name}.weight": torch.randn(3, 3)}, tmp_path / f"{name}.pt")
    with pytest.raises(ModelError, match="have no tensor name in common; the first has 'a.weight'"):
        compare_tensors(tmp_path / "a.pt", tmp_path / "b.pt")
    torch.save({"a.weight": torch.randn(3, 4)}, tmp_path / "b.pt")
    with pytest.raises(ModelError, match=r"tensor 'a.weight': .* has shape \[3, 3\], .* has \[3, 4\]"):
        compare_tensors(tmp_path / "a.pt", tmp_path / "b.pt")
