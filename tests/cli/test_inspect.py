"""Any checkpoint as a table: kinds of layers, tensors, natural order; packed or dense, in every format."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file

import seedpack
from seedpack.cli.main import cli
from tests.helpers.gguf import write_gguf
from tests.helpers.models import Folders, llama


def inspect(*arguments: object, code: int = 0) -> Result:
    result = CliRunner().invoke(cli, ["inspect", *map(str, arguments)])
    assert result.exit_code == code, (result.output, result.exception)
    return result


def as_json(*arguments: object) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(inspect(*arguments, "--json").stdout)
    return document


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("deep")
    state = {f"layers.{i}.fc.weight": torch.randn(64, 64) for i in range(12)} | {"layers.0.norm": torch.ones(64)}
    torch.save({"state_dict": state, "epoch": 3}, path / "net.pt")
    torch.save(state, path / "old.bin", _use_new_zipfile_serialization=False)
    save_file(state, path / "net.safetensors")
    seedpack.compress(path / "net.safetensors", path / "packed", settings={"effort": "fast"})
    return path


@pytest.mark.parametrize("name", ["net.pt", "old.bin", "net.safetensors", "packed"])
def test_files(deep: Path, name: str) -> None:
    document = as_json(deep / name)
    names = [tensor["name"] for tensor in document["tensors"]]
    assert names == [*("layers.0.fc.weight", "layers.0.norm"), *(f"layers.{i}.fc.weight" for i in range(1, 12))]
    assert document["file_bytes"] == (deep / name).stat().st_size and document["packed"] == (name == "packed")
    assert document["kinds"]["layers.*.fc.weight"]["tensors"] == 12
    text = inspect(deep / name).output
    row = next(line for line in text.splitlines() if "12 × layers.*.fc.weight" in line).split()
    assert row[3:6] == (["64×64", "trellis", "4"] if name == "packed" else ["64×64", "F32", "32.000"])
    assert "1 × layers.*.norm" in text and ("seedpack compress packs it" in text) == (name != "packed")
    listed = inspect(deep / name, "--tensors", "layers.1*").output
    assert "layers.10.fc.weight" in listed and "layers.2.fc" not in listed and "12 ×" not in listed
    assert "layers.9.fc.weight" in inspect(deep / name, "--tensors").output
    assert (
        "names look like 'layers.3.fc.weight'" in inspect(deep / name, "--tensors", "layers.3.fc.wait", code=1).stderr
    )


def test_a_packed_file(deep: Path) -> None:
    document = as_json(deep / "packed", "--tensors", "layers.0.*")
    weight, norm = document["tensors"]
    assert weight["codec"] == "trellis 4" and weight["parts"]["weight"]["digest"] and norm["codec"] == "raw"
    assert weight["bits_per_weight"] == pytest.approx(8 * weight["bytes"] / 64**2) and weight["dtype"] == "F32"
    assert document["manifest"]["seedpack"] == 1
    assert "codec  " in inspect(deep / "packed").output and "headers included" in inspect(deep / "packed").output


def test_gguf(tmp_path: Path) -> None:
    document = as_json(write_gguf(tmp_path / "tiny.gguf"))
    tensors = {tensor["name"]: tensor for tensor in document["tensors"]}
    assert tensors["blk.0.ffn_down.weight"]["shape"] == [32, 64] and tensors["blk.0.ffn_down.weight"]["dtype"] == "F32"
    assert document["kinds"]["blk.*.attn_q.weight"]["tensors"] == 2
    (tmp_path / "x.gguf").write_bytes(b"GGUF\3\0\0\0" + b"\xff" * 16)
    assert "not a GGUF file that can be read" in inspect(tmp_path / "x.gguf", code=1).stderr


def test_folders(tmp_path: Path) -> None:
    folders = Folders(llama(), tmp_path)
    for path in (folders.dense, folders.packed):
        assert as_json(path)["kinds"]["model.layers.*.self_attn.q_proj.weight"]["tensors"] == 2
    sharded, torch_folder = tmp_path / "sharded", tmp_path / "torch"
    llama().save_pretrained(sharded, max_shard_size="20kB")
    document = as_json(sharded)
    assert len(document["files"]) > 2 and document["kinds"] == as_json(folders.dense)["kinds"]
    torch_folder.mkdir()
    (torch_folder / "config.json").write_text("{}")
    state = load_file(folders.dense / "model.safetensors")
    torch.save(state | {"tied.weight": state["lm_head.weight"]}, torch_folder / "pytorch_model.bin")
    assert as_json(torch_folder)["shared"] == {"tied.weight": "lm_head.weight"}
    (tmp_path / "other").mkdir()
    save_file({"a": torch.zeros(2)}, tmp_path / "other" / "diffusion.safetensors")
    assert [tensor["name"] for tensor in as_json(tmp_path / "other")["tensors"]] == ["a"]
    again = tmp_path / "again"
    seedpack.load(folders.packed).save_pretrained(again)
    document = as_json(again)
    assert document["undescribed"] and set(document["undescribed"]) <= {t["name"] for t in document["tensors"]}


FOREIGN = {
    "torch": (b"PK\x03\x04\0\0\x08\x08", "is a torch checkpoint, not a packed checkpoint; run seedpack compress"),
    "old torch": (b"\x80\x02\x8a\nl\xfc\x9cF", "is a torch checkpoint"),
    "GGUF": (b"GGUF\3\0\0\0", "is a GGUF file, not a packed checkpoint; run seedpack compress"),
    "PNG": (b"\x89PNG\r\n\x1a\n", "is a PNG image, not a packed checkpoint"),
    "LFS": (b"version https://git-lfs", "is a Git LFS pointer (git lfs pull fetches the file)"),
    "HTML": (b"<!DOCTYPE html>", "is a web page"),
    "text": (b"hello, this is text", "not a safetensors file (its header would take"),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_files_of_other_kinds(kind: str, tmp_path: Path) -> None:
    start, message = FOREIGN[kind]
    (tmp_path / "file").write_bytes(start + bytes(64))
    for command in ("load", "verify"):
        result = CliRunner().invoke(cli, [command, str(tmp_path / "file")])
        assert result.exit_code == 1 and message in result.stderr
    with pytest.raises(seedpack.SeedpackError) as caught:
        seedpack.load(tmp_path / "file", dense=True)
    assert message in str(caught.value)


def test_dense_folders(tmp_path: Path) -> None:
    folders = Folders(llama(), tmp_path)
    for command in ("load", "verify"):
        result = CliRunner().invoke(cli, [command, str(folders.dense)])
        assert result.exit_code == 1 and f"{folders.dense} is not packed: " in result.stderr
    (folders.dense / "model.safetensors").unlink()
    torch.save({}, folders.dense / "pytorch_model.bin")
    with pytest.raises(seedpack.SeedpackError, match=r"dense is not packed: it holds pytorch_model.bin; run seedpack"):
        seedpack.load(folders.dense)
