"""A parameter that a model cannot run with packed stays raw, with the reason."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor, nn

from seedpack.hf.trial import FAILS, WRITTEN_TO, refused_parameters, run_on_meta
from seedpack.loader.weight import PackedWeight
from tests.helpers.models import SMALL, llama


class Net(nn.Module):
    """One layer is written to, one wants a plain tensor for its weight, and one of two matrices, if there are two, has to be."""

    def __init__(self, *, fails: bool = False, matrices: int = 0) -> None:
        super().__init__()
        self.written, self.odd, self.plain = (nn.Linear(8, 8) for _ in range(3))
        self.embedding, self.fails = nn.Embedding(16, 8), fails
        self.pair = nn.ParameterList(nn.Parameter(torch.empty(8, 8)) for _ in range(matrices))

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embedding(input_ids)
        self.written.weight.data.div_(2)
        both = len(self.pair) and all(isinstance(p, PackedWeight) for p in self.pair)
        if self.fails or both or isinstance(self.odd.weight, PackedWeight):
            raise TypeError("expected a plain tensor")
        return self.plain(self.odd(self.written(x)))  # type: ignore[no-any-return]


def on_meta(make: Any) -> Any:
    def made() -> Any:
        with torch.device("meta"):
            return make()

    return made


def test_refused_parameters() -> None:
    assert refused_parameters(on_meta(Net)) == {"written.weight": WRITTEN_TO, "odd.weight": FAILS}


def test_what_fails_only_together_stays_raw_together() -> None:
    refused = refused_parameters(on_meta(lambda: Net(matrices=2)))
    assert refused.keys() == {"written.weight", "odd.weight", "pair.0", "pair.1"}


def test_a_model_that_does_not_run_anyway_tells_nothing() -> None:
    assert refused_parameters(on_meta(lambda: Net(fails=True))) == {"written.weight": WRITTEN_TO}


def test_real_models_run() -> None:
    vision: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
    }
    makers = (
        llama,
        lambda: transformers.ViTModel(transformers.ViTConfig(**vision, image_size=16, patch_size=8)),
        lambda: transformers.BertModel(transformers.BertConfig(**SMALL)),
    )
    for make in makers:
        assert run_on_meta(on_meta(make)()) is None and not refused_parameters(on_meta(make))
