from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import transformers

from seedpack.errors import ModelError
from seedpack.eval.classes import class_of, compare_classifiers
from tests.helpers.models import SMALL


def classifier(**more: Any) -> Any:
    config = transformers.BertConfig(**{**SMALL, "eos_token_id": None, "bos_token_id": None, "num_labels": 3, **more})
    return transformers.BertForSequenceClassification(config)


BATCHES = [{"input_ids": torch.arange(3, 23).reshape(4, 5)}, {"input_ids": torch.arange(30, 45).reshape(3, 5)}]


def test_by_definition() -> None:
    a, b = classifier().eval(), classifier().eval()
    labels, done = [0, 1, 2, 0, 1, 2, 0], list[int]()
    other, same = compare_classifiers(a, [b, a], BATCHES, labels, done.append)
    with torch.no_grad():
        x, y = (torch.cat([model(**batch).logits for batch in BATCHES]).double() for model in (a, b))
    kl = torch.nn.functional.kl_div(y.log_softmax(1), x.log_softmax(1), reduction="none", log_target=True).sum(1)
    assert other.kl_mean == pytest.approx(float(kl.mean()), rel=1e-4)
    assert other.kl_p99 == pytest.approx(float(kl.quantile(0.99)), rel=1e-4)
    assert other.agreement == pytest.approx(float((x.argmax(1) == y.argmax(1)).float().mean()))
    right = torch.tensor(labels)
    assert other.accuracy_original == pytest.approx(float((x.argmax(1) == right).float().mean()))
    assert other.accuracy_packed == pytest.approx(float((y.argmax(1) == right).float().mean()))
    assert (same.agreement, same.kl_mean, same.kl_p99) == (1, 0, 0) and done == [4, 3] and other.inputs == 7
    assert compare_classifiers(a, [b], BATCHES)[0].accuracy_packed is None


def test_other_classes_are_refused() -> None:
    with pytest.raises(ModelError, match="has 4 classes, but BertForSequenceClassification has 3"):
        compare_classifiers(classifier(), [classifier(num_labels=4)], BATCHES)
    broken = classifier()
    with torch.no_grad():
        broken.classifier.bias.fill_(math.nan)
    with pytest.raises(ModelError, match="not finite"):
        compare_classifiers(classifier(), [broken], BATCHES)


def test_labels() -> None:
    assert class_of(classifier()) == {"0": 0, "1": 1, "2": 2, "LABEL_0": 0, "LABEL_1": 1, "LABEL_2": 2}
    assert class_of(classifier(num_labels=2, id2label={0: "1", 1: "0"}))["1"] == 0  # a name goes before a number
    with pytest.raises(ModelError, match="gives one number; expected a classifier of two or more classes"):
        class_of(classifier(num_labels=1))
    with pytest.raises(ModelError, match="gives several labels at once"):
        class_of(classifier(problem_type="multi_label_classification"))
