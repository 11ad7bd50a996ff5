"""Each task as a whole: packed folders beside the original, and values computed by transformers alone."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from seedpack.errors import ModelError
from seedpack.eval.evaluate import Evaluation, evaluate
from seedpack.hf.tasks import TASKS
from tests.helpers.marks import slow_but
from tests.helpers.task_folders import packed, pictures, task_folder
from tests.helpers.tokenizers import word_tokenizer, words

ANSWERS = {"text-classification": ["good", "0"], "seq2seq": ["w9 w8", "w7"]}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("evaluate")


@pytest.fixture(scope="module", params=slow_but(TASKS.keys() - {"seq2seq"}, TASKS))
def task(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def folders(root: Path, task: str) -> list[Path]:
    """Return a dense folder, and it packed by raw, in 4 bits and in 2."""
    dense = task_folder(root / task / "dense", task)
    return [dense, *(packed(dense, bits) for bits in (32.0, 4.0, 2.0))]


@pytest.fixture(scope="module")
def data(root: Path, task: str) -> Path:
    if task == "image-classification":
        return pictures(root / task / "pictures", 24, "cat", "dog")
    return words(root / task / "text", 40, answers=ANSWERS.get(task))


@pytest.fixture(scope="module")
def evaluation(folders: list[Path], data: Path) -> Evaluation:
    return evaluate(folders[0], folders[1:], data)


def measures(evaluation: Evaluation) -> list[dict[str, Any]]:
    return [report.to_json() for _, report in evaluation.packed]


def test_raw_changes_nothing_and_fewer_bits_are_worse(task: str, evaluation: Evaluation) -> None:
    assert evaluation.task == task
    raw, four, two = measures(evaluation)
    error = "distance_mean" if task == "embeddings" else "kl_mean"
    assert raw[error] == 0 < four[error] < two[error]
    shares = [key for key in raw if key.endswith(("agreement", "overlap"))]
    assert shares and all(raw[key] == 1 for key in shares)
    assert raw.get("accuracy_packed") == raw.get("accuracy_original")
    assert raw.get("perplexity_packed") == raw.get("perplexity_original")


def test_sizes(folders: list[Path], evaluation: Evaluation) -> None:
    original, *sizes = evaluation.original, *(size for size, _ in evaluation.packed)
    assert original.bits_per_weight is not None and 32 <= original.bits_per_weight < 40
    for folder, size in zip(folders, (original, *sizes), strict=True):
        assert size.path == str(folder) and size.file_bytes == (folder / "model.safetensors").stat().st_size
        assert size.bits_per_weight == pytest.approx(
            original.bits_per_weight * size.file_bytes / int(original.file_bytes or 0)
        )


def test_json(evaluation: Evaluation) -> None:
    document = json.loads(json.dumps(evaluation.to_json()))
    assert [v["path"] for v in document["variants"]] == [size.path for size, _ in evaluation.packed]
    assert document["original"]["file_bytes"] > document["variants"][2]["file_bytes"]
    assert document["variants"][0] == json.loads(json.dumps(vars(evaluation.packed[0][0]) | measures(evaluation)[0]))
    assert Evaluation.from_json(document) == evaluation


def test_variants_do_not_depend_on_each_other(folders: list[Path], data: Path, evaluation: Evaluation) -> None:
    assert measures(evaluate(folders[0], folders[3:], data))[0] == measures(evaluation)[2]


def logits_of(folder: Path, cls: Any, inputs: list[dict[str, Any]]) -> torch.Tensor:
    model = cls.from_pretrained(folder).eval()
    with torch.no_grad():
        return torch.cat([model(**x).logits.flatten(0, -2) for x in inputs]).double()


def require_kl(p: torch.Tensor, q: torch.Tensor, report: dict[str, Any]) -> None:
    p, q = p.log_softmax(1), q.log_softmax(1)
    assert report["kl_mean"] == pytest.approx(float((p.exp() * (p - q)).sum(1).mean()), rel=1e-3)


def test_texts_by_hand(root: Path) -> None:
    path = root / "by-hand"
    dense = task_folder(path / "dense", "text-classification")
    other = packed(dense, 3.0)
    text = words(path / "text", 20, answers=ANSWERS["text-classification"])
    (report,) = measures(evaluate(dense, [other], text))
    tokenizer = transformers.AutoTokenizer.from_pretrained(dense)
    inputs = [tokenizer(line.split("\t")[0], return_tensors="pt") for line in text.read_text().splitlines()]
    p, q = (logits_of(folder, transformers.BertForSequenceClassification, inputs) for folder in (dense, other))
    require_kl(p, q, report)
    labels = torch.tensor([2, 0] * 10)
    assert report["inputs"] == 20 and report["agreement"] == float((p.argmax(1) == q.argmax(1)).double().mean())
    assert report["accuracy_original"] == float((p.argmax(1) == labels).double().mean())
    assert report["accuracy_packed"] == float((q.argmax(1) == labels).double().mean())


def test_images_by_hand(root: Path) -> None:
    path = root / "images-by-hand"
    dense = task_folder(path / "dense", "image-classification")
    other = packed(dense, 3.0)
    folder = pictures(path / "pictures", 20)
    (report,) = measures(evaluate(dense, [other], folder))
    processor = transformers.AutoImageProcessor.from_pretrained(dense)
    inputs = [
        processor(images=transformers.image_utils.load_image(str(f)), return_tensors="pt")
        for f in sorted(folder.iterdir())
    ]
    p, q = (logits_of(f, transformers.ViTForImageClassification, inputs) for f in (dense, other))
    require_kl(p, q, report)
    assert report["inputs"] == 20 and report["accuracy_packed"] is None


def test_targets_by_hand(root: Path) -> None:
    path = root / "targets-by-hand"
    dense = task_folder(path / "dense", "seq2seq")
    other = packed(dense, 3.0)
    text = words(path / "text", 8, answers=["w9 w8", "w7"])
    (report,) = measures(evaluate(dense, [other], text))
    tokenizer = transformers.AutoTokenizer.from_pretrained(dense)
    pairs = [line.split("\t") for line in text.read_text().splitlines()]
    inputs = [tokenizer(s, text_target=t, return_tensors="pt") for s, t in pairs]
    targets = torch.cat([x["labels"][0] for x in inputs])
    p, q = (logits_of(f, transformers.T5ForConditionalGeneration, inputs) for f in (dense, other))
    require_kl(p, q, report)
    assert report["tokens"] == len(targets) == 4 * 3 + 4 * 2
    nll = torch.nn.functional.cross_entropy(q, targets)
    assert report["perplexity_packed"] == pytest.approx(math.exp(nll), rel=1e-4)
    own = evaluate(dense, [other], words(path / "sources", 3))
    assert own.inputs.endswith("of targets scored, the original's own")


def test_pooling_of_a_folder(root: Path) -> None:
    path = root / "pooling"
    dense = task_folder(path / "dense", "embeddings")
    (dense / "1_Pooling").mkdir()
    (dense / "1_Pooling" / "config.json").write_text(
        '{"pooling_mode_cls_token": true, "pooling_mode_mean_tokens": false}'
    )
    other = packed(dense, 2.0)
    text = words(path / "text", 12)
    evaluation = evaluate(dense, [other], text)
    assert evaluation.inputs.endswith("pooling cls")
    tokenizer = transformers.AutoTokenizer.from_pretrained(dense)
    embeddings = []
    for folder in (dense, other):
        model = transformers.BertForMaskedLM.from_pretrained(folder).eval()
        inputs = [tokenizer(line, return_tensors="pt") for line in text.read_text().splitlines()]
        with torch.no_grad():
            embeddings.append(torch.stack([model.bert(**x).last_hidden_state[0, 0] for x in inputs]))
    distance = 1 - torch.nn.functional.cosine_similarity(embeddings[0], embeddings[1]).mean()
    assert measures(evaluation)[0]["distance_mean"] == pytest.approx(float(distance), abs=1e-5)


def test_a_model_without_limit(root: Path) -> None:
    config = transformers.XLNetConfig(vocab_size=96, d_model=32, n_layer=1, n_head=4, d_inner=64)  # says -1 positions
    transformers.XLNetLMHeadModel(config).save_pretrained(root / "xlnet")
    word_tokenizer().save_pretrained(root / "xlnet")
    evaluation = evaluate(root / "xlnet", [root / "xlnet"], words(root / "long", 20), context=50)
    assert evaluation.inputs == "98 tokens scored, context 50, windows without overlap"


def test_other_tasks_and_wrong_data(root: Path) -> None:
    path = root / "others"
    dense = task_folder(path / "dense", "language-modeling")
    text = words(path / "text", 12)
    assert evaluate(dense, [dense], text, task="embeddings").packed[0][1].to_json()["distance_max"] == 0
    with pytest.raises(ModelError, match="transformers cannot load it for seq2seq"):
        evaluate(dense, [dense], text, task="seq2seq")
    with pytest.raises(ModelError, match="others: language-modeling needs a text file"):
        evaluate(dense, [dense], path)
    with pytest.raises(ModelError, match="nothing: language-modeling needs a text file"):
        evaluate(dense, [dense], path / "nothing")
    text.write_text("w5 w6\n w5 w6 \nw7")
    with pytest.raises(ModelError, match="2 texts have no neighbours to compare; give at least three different lines"):
        evaluate(dense, [dense], text, task="embeddings")
    classifier = task_folder(path / "classifier", "text-classification")
    text.write_text("w5 w6\tgood\nw7\tgreat")
    with pytest.raises(
        ModelError, match="line 2: label 'great' after the tab is not one of the model's: 'bad', 'fair', 'good'"
    ):
        evaluate(classifier, [classifier], text)
