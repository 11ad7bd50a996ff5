"""A hub model is fetched with its own weights and small files, and the modules of sentence-transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.utils._paths import filter_repo_objects

from seedpack.hf.hub import download

FILES = [
    "config.json", "model.safetensors", "pytorch_model.bin", "LICENSE", "modules.json", "1_Pooling/config.json",
    "2_Dense/config.json", "2_Dense/model.safetensors", "onnx/model.onnx", "onnx/config.json",
    "original/consolidated.safetensors", "model.py",
]  # fmt: skip


@pytest.fixture
def fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that downloads a repository of some files, and tells which were fetched."""

    def run(files: list[str], modules: list[str]) -> set[str]:
        def snapshot_download(repo: str, *, allow_patterns: list[str], ignore_patterns: Any = None) -> str:
            wanted = filter_repo_objects(files, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns)
            for name in wanted:
                (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
                text = json.dumps([{"path": path} for path in modules]) if name == "modules.json" else "{}"
                (tmp_path / name).write_text(text)
            return str(tmp_path)

        monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
        folder = download("org/name")
        return {file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()}

    return run


def test_a_sentence_transformer(fetched: Any) -> None:
    expected = {"config.json", "model.safetensors", "LICENSE", "modules.json", "onnx/config.json"}
    modules = {"1_Pooling/config.json", "2_Dense/config.json", "2_Dense/model.safetensors"}
    assert fetched(FILES, ["", "1_Pooling", "2_Dense"]) == expected | modules


def test_old_weights_where_there_are_no_others(fetched: Any) -> None:
    files = ["config.json", "pytorch_model.bin", "original/pytorch_model.bin"]
    assert fetched(files, []) == {"config.json", "pytorch_model.bin"}
