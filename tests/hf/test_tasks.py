from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers

from seedpack.converter.trust import trusting_remote_code
from seedpack.errors import ModelError
from seedpack.hf.tasks import TASKS, load_processor, pooling_of, task_of

CASES = {
    "LlamaForCausalLM": "language-modeling", "GPT2LMHeadModel": "language-modeling",
    "Gemma3ForConditionalGeneration": "language-modeling", "BertModel": "embeddings", "XLMRobertaForMaskedLM": "embeddings",
    "T5EncoderModel": "embeddings", "MistralModel": "embeddings", "DistilBertForSequenceClassification": "text-classification",
    "ResNetForImageClassification": "image-classification", "DeiTForImageClassificationWithTeacher": "image-classification",
    "T5ForConditionalGeneration": "seq2seq", "BartForConditionalGeneration": "seq2seq", "MarianMTModel": "seq2seq",
}  # fmt: skip
NONE = ["WhisperForConditionalGeneration", "Wav2Vec2Model", "ClapModel", "CLIPModel", "ViTModel", "BertForTokenClassification",
        "Qwen2AudioForConditionalGeneration", "ImageGPTForImageClassification"]  # fmt: skip


def configured(path: Path, name: str, **more: Any) -> Path:
    (path / "config.json").write_text(json.dumps({"architectures": [name], **more}))
    return path


@pytest.mark.parametrize(("name", "task"), CASES.items())
def test_tasks(tmp_path: Path, name: str, task: str) -> None:
    assert task_of(configured(tmp_path, name)) == task


@pytest.mark.parametrize("name", NONE)
def test_models_for_no_task(tmp_path: Path, name: str) -> None:
    with pytest.raises(
        ModelError,
        match=f"a {name} is for none of the tasks text-classification, image.*--task chooses one, such as embeddings",
    ):
        task_of(configured(tmp_path, name))


def test_other_paths(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").touch()
    assert task_of(tmp_path / "a.gguf") == "language-modeling"
    for path, message in ((tmp_path, "no config.json"), (tmp_path / "no", "no such file or folder, and not a hub id")):
        with pytest.raises(ModelError, match=message):
            task_of(path)
    for config in ({"model_type": "llama"}, {"architectures": ["Unheard"]}):
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(ModelError, match="an architecture that config.json does not name is for none of the tasks"):
            task_of(tmp_path)
    with pytest.raises(ModelError, match="no image processor that transformers can load"):
        load_processor(tmp_path, "image-classification")


def test_auto_classes_exist_and_code_of_a_folder_names_one(tmp_path: Path) -> None:
    assert all(hasattr(transformers, auto) for auto, _ in TASKS.values())
    configured(tmp_path, "Own", model_type="own", auto_map={"AutoModelForSeq2SeqLM": "code.Own"})
    with pytest.raises(ModelError, match="defined by Python code"):
        task_of(tmp_path)
    with trusting_remote_code(True):
        assert task_of(tmp_path) == "seq2seq"


@pytest.mark.parametrize(
    ("config", "pooling"),
    [
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False, "word_embedding_dimension": 4}, "cls"),
        ({"pooling_mode_mean_tokens": True}, "mean"),
        ({"pooling_mode_lasttoken": True}, "lasttoken"),
        ({"pooling_mode": "cls"}, "cls"),
        ({"pooling_mode_max_tokens": True}, None),
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True}, None),
        ({}, None),
    ],
)
def test_pooling(tmp_path: Path, config: dict[str, Any], pooling: str | None) -> None:
    assert pooling_of(tmp_path) == "mean"
    configured(tmp_path, "MistralForCausalLM")
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps(config))
    assert task_of(tmp_path) == "embeddings"
    if pooling is None:
        with pytest.raises(
            ModelError, match=r"pooling (max_tokens|cls\+mean|missing); expected one of mean, cls, lasttoken"
        ):
            pooling_of(tmp_path)
    else:
        assert pooling_of(tmp_path) == pooling
