from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from seedpack.errors import ModelError
from seedpack.eval.embeddings import compare_embeddings, embed
from tests.helpers.models import ARCHITECTURES

BATCH = {
    "input_ids": torch.tensor([[5, 6, 7, 8], [9, 10, 0, 0], [11, 12, 13, 0], [14, 15, 16, 17]]),
    "attention_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]),
}


class Table:
    """A model whose embeddings are given: of a text of one token, its row."""

    config, device = SimpleNamespace(is_encoder_decoder=False), torch.device("cpu")

    def __init__(self, rows: list[list[float]]):
        self.rows = torch.tensor(rows)
        self.base_model = self

    def eval(self) -> None:
        pass

    def __call__(self, input_ids: Tensor) -> Any:
        return SimpleNamespace(last_hidden_state=self.rows[input_ids])


def compared(a: list[list[float]], b: list[list[float]]) -> Any:
    return compare_embeddings(Table(a), [Table(b)], [{"input_ids": torch.arange(len(a))[:, None]}])[0]


def circle(*degrees: float) -> list[list[float]]:
    return [[math.cos(math.radians(d)), math.sin(math.radians(d))] for d in degrees]


@pytest.mark.parametrize("pooling", ["mean", "cls", "lasttoken"])
def test_pooling_by_hand(pooling: str) -> None:
    model = ARCHITECTURES["bert"]().eval()
    with torch.no_grad():
        got = embed(model, BATCH, pooling)
        for row, length in enumerate((4, 2, 3, 4)):  # one text at a time, without padding
            hidden = model.bert(BATCH["input_ids"][row : row + 1, :length]).last_hidden_state[0]
            want = {"mean": hidden.mean(0), "cls": hidden[0], "lasttoken": hidden[-1]}[pooling]
            assert torch.allclose(got[row], want / want.norm(), atol=1e-5)


def test_a_decoder_is_left_out() -> None:
    model = ARCHITECTURES["t5"]().eval()
    with torch.no_grad():
        hidden = model.encoder(**BATCH).last_hidden_state[0].mean(0)
        assert torch.allclose(embed(model, BATCH)[0], hidden / hidden.norm(), atol=1e-5)


def test_distances_and_neighbours_by_their_definition() -> None:
    a, b = ARCHITECTURES["bert-encoder"](), ARCHITECTURES["bert-encoder"]()
    done: list[int] = []
    batches = [
        {"input_ids": torch.randint(3, 96, (8, 5)), "attention_mask": torch.ones(8, 5, dtype=torch.int64)}
        for _ in range(3)
    ]
    one, same = compare_embeddings(a, [b, a], batches, progress=done.append)
    with torch.no_grad():
        x, y = (torch.cat([embed(model, batch) for batch in batches]).double() for model in (a, b))
    distances = 1 - torch.nn.functional.cosine_similarity(x, y)
    assert one.distance_mean == pytest.approx(float(distances.mean()), abs=1e-6)
    assert one.distance_max == pytest.approx(float(distances.max()), abs=1e-6)
    orders = [[sorted(set(range(24)) - {i}, key=lambda j: -float(e[i] @ e[j])) for i in range(24)] for e in (x, y)]
    pairs = list(zip(*orders, strict=True))
    assert one.nearest_agreement == pytest.approx(sum(p[0] == q[0] for p, q in pairs) / 24)
    assert one.neighbours == 10
    assert one.neighbours_overlap == pytest.approx(sum(len({*p[:10]} & {*q[:10]}) for p, q in pairs) / 240)
    assert (same.distance_mean, same.distance_max, same.nearest_agreement, same.neighbours_overlap) == (0, 0, 1, 1)
    assert done == [8, 8, 8] and one.texts == 24


def test_ties_are_no_errors() -> None:
    square = circle(0, 90, 180, 270)  # each has two nearest neighbours
    assert compared(square, circle(0, 80, 180, 260)).nearest_agreement == 1
    assert compared(circle(0, 90, 170, 270), circle(0, 90, 190, 270)).nearest_agreement == 0.25  # of the first alone


def test_turned_embeddings_are_far_but_in_order() -> None:
    report = compared(circle(0, 10, 30, 70), circle(180, 190, 210, 250))
    assert report.distance_mean == pytest.approx(2) and report.nearest_agreement == 1 and report.neighbours == 3


def test_what_cannot_be_compared() -> None:
    with pytest.raises(ModelError, match="2 texts have no neighbours to compare; give at least three different lines"):
        compared(circle(0, 90), circle(0, 90))
    with pytest.raises(ModelError, match="Table has 1 numbers in an embedding, but Table has 2"):
        compared(circle(0, 90, 180), [[1.0], [1.0], [1.0]])
    with pytest.raises(ModelError, match="not finite"):
        compared(circle(0, 90, 180), [[1.0, math.nan]] * 3)
    with pytest.raises(ModelError, match=r"Table: a Table cannot run on this \(.*unexpected keyword"):
        compare_embeddings(Table([]), [], [BATCH])
