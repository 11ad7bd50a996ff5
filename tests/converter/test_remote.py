"""Models and outputs in remote storage: a server of S3's protocol, on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import seedpack
from seedpack.converter.sources.open import open_source
from seedpack.errors import BackendError, FormatError, ModelError, OutputError
from seedpack.formats import places
from tests.helpers.marks import slow
from tests.helpers.models import llama
from tests.helpers.storage import s3 as s3

OPTIONS: dict[str, Any] = {"codec": "trellis", "settings": {"effort": "fast"}}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    llama().save_pretrained(tmp_path / "dense", max_shard_size="40KB")
    (tmp_path / "dense" / "README.md").write_text("a card")
    return tmp_path / "dense"


def upload(folder: Path, place: Any) -> Any:
    place.fs.put(str(folder), place.path, recursive=True)
    return place


def files(folder: Any) -> dict[str, bytes]:
    if isinstance(folder, Path):
        return {f.relative_to(folder).as_posix(): f.read_bytes() for f in folder.rglob("*") if f.is_file()}
    found = folder.fs.find(folder.path)
    return {name.removeprefix(f"{folder.path}/"): folder.fs.cat_file(name) for name in found}


def test_a_folder_is_read_and_written_there(s3: Any, folder: Path, tmp_path: Path) -> None:
    model = upload(folder, s3 / "one" / "dense")
    for output in (tmp_path / "packed", s3 / "one" / "packed"):
        report = seedpack.compress(str(model), str(output), **OPTIONS, shard_bytes=8_000)
        assert report.source == "s3://models/one/dense" and report.file_bytes > 8_000
    seedpack.compress(folder, tmp_path / "whole", **OPTIONS, shard_bytes=8_000)
    there = files(s3 / "one" / "packed")
    assert files(tmp_path / "whole") == files(tmp_path / "packed") == there
    assert len([name for name in there if name.endswith(".safetensors")]) > 1 and "README.md" in there
    assert {path.name for path in (s3 / "one").iterdir()} == {"dense", "packed"}  # nothing else is left


def test_only_the_wanted_bytes_are_read(s3: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = upload(folder, s3 / "two")
    source = open_source(str(model))
    monkeypatch.setattr(places, "PIECE", 1000)
    asked: list[int] = []
    cat = model.fs.cat_ranges

    def counted(paths: Any, starts: Any, ends: Any, **more: Any) -> Any:
        asked.extend(end - start for start, end in zip(starts, ends, strict=True))
        return cat(paths, starts, ends, **more)

    monkeypatch.setattr(model.fs, "cat_ranges", counted)
    name = "model.layers.0.mlp.down_proj.weight"
    assert torch.equal(source.read(name), open_source(folder).read(name))
    assert sum(asked) == source.tensors[name].source_bytes and max(asked) == 1000


def test_an_interrupted_run_goes_on_there(s3: Any, folder: Path, tmp_path: Path) -> None:
    model, output = upload(folder, s3 / "three" / "dense"), s3 / "three" / "packed"
    messages: list[str] = []

    def stop(stage: str, done: int, total: int, unit: str = "", item: str = "", /) -> None:
        messages.append(item)
        if stage == "Fitting" and item.endswith("1.mlp.up_proj.weight"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        seedpack.compress(str(model), str(output), **OPTIONS, progress=stop)
    assert not output.exists() and "kept in s3://models/three/.packed.partial: " in messages[-1]
    seedpack.compress(str(model), str(output), **OPTIONS, progress=lambda stage, *rest: messages.extend(rest[3:4]))
    assert any(message.startswith("resuming: ") for message in messages)
    seedpack.compress(folder, tmp_path / "whole", **OPTIONS)
    assert files(output) == files(tmp_path / "whole")


@slow
def test_workers_read_there_too(s3: Any, folder: Path, tmp_path: Path) -> None:
    model = upload(folder, s3 / "four")
    seedpack.compress(str(model), tmp_path / "packed", **OPTIONS, jobs=2)
    seedpack.compress(folder, tmp_path / "whole", **OPTIONS)
    assert files(tmp_path / "packed") == files(tmp_path / "whole")


def test_calibration_of_a_remote_model(s3: Any, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = upload(folder, s3 / "five" / "dense"), torch.arange(128).reshape(4, 32) % 64
    monkeypatch.chdir(tmp_path)  # where it is kept
    options = {**OPTIONS, "calibration": seedpack.Calibration(ids, context=32, sequential=False)}
    seedpack.compress(str(model), "s3://models/five/packed", **options)
    assert (tmp_path / "seedpack-calibration").is_dir()
    seedpack.compress(folder, tmp_path / "other" / "whole", **options)
    assert files(s3 / "five" / "packed") == files(tmp_path / "other" / "whole")


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_single_files(s3: Any, tmp_path: Path, suffix: str) -> None:
    state, local = {"w": torch.randn(64, 96), "b": torch.randn(7)}, tmp_path / f"net{suffix}"
    torch.save(state, local) if suffix == ".pt" else save_file(state, local)
    place = upload(local, s3 / f"net{suffix}")
    output = f"s3://models/out{suffix[1:]}.safetensors"
    report = seedpack.compress(str(place), output, **OPTIONS)
    seedpack.compress(local, tmp_path / "whole.safetensors", **OPTIONS)
    assert places.place(output).read_bytes() == (tmp_path / "whole.safetensors").read_bytes()
    assert any("fetched whole" in note for note in report.notes) == (suffix == ".pt")
    with pytest.raises(OutputError, match="exists already; pass --force"):
        seedpack.compress(local, output, **OPTIONS)
    seedpack.compress(local, output, **OPTIONS, force=True)


def test_what_is_refused(s3: Any, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="s3://models/none: has no config.json"):
        open_source("s3://models/none")
    with pytest.raises(FormatError, match="foo://a/b: .*known are"):
        open_source("foo://a/b")
    with pytest.raises(BackendError, match="pip install 'seedpack-torch.remote.' gcsfs"):
        open_source("gs://models/a")
    with pytest.raises(FormatError, match="none.safetensors: cannot be reached"):
        open_source("s3://models/none.safetensors")
    other = s3 / "six" / "other"
    (other / "mine.txt").write_text("precious")
    with pytest.raises(OutputError, match="holds 'mine.txt', which seedpack did not write"):
        seedpack.compress(folder, str(other), **OPTIONS, force=True)
    assert files(other) == {"mine.txt": b"precious"}
    with pytest.raises(OutputError, match="cannot be written"):
        seedpack.compress(folder, "s3://nobucket/out", **OPTIONS)


def test_a_file_that_changes_is_found(s3: Any, folder: Path) -> None:
    model = upload(folder, s3 / "seven")
    source = open_source(str(model))
    name = next(iter(source.tensors))
    source.read(name)
    shard = next(path for path in model.iterdir() if path.name.startswith("model-00001"))
    data = bytearray(shard.read_bytes())
    data[-1000:] = bytes(1000)
    shard.write_bytes(bytes(data))
    assert source.state != open_source(str(model)).state


def test_only_its_own_files_are_replaced(s3: Any, folder: Path) -> None:
    output = s3 / "eight"
    seedpack.compress(folder, str(output), **OPTIONS, shard_bytes=8_000)
    (output / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match="holds 'notes.txt', which seedpack did not write"):
        seedpack.compress(folder, str(output), **OPTIONS, force=True)
    assert len(files(output)) > 5
    output.fs.rm_file((output / "notes.txt").path)
    seedpack.compress(folder, str(output), **OPTIONS, force=True)
    assert "model.safetensors" in files(output) and not any("-of-" in name for name in files(output))


@pytest.mark.parametrize("old", [False, True])
def test_a_stop_while_files_are_moved(s3: Any, folder: Path, monkeypatch: pytest.MonkeyPatch, old: bool) -> None:
    """Leaves no model, and the same command goes on."""
    output = s3 / f"nine-{old}"
    if old:
        seedpack.compress(folder, str(output), **OPTIONS, shard_bytes=8_000)
    copy, count = output.fs.copy, [0]

    def failing(*args: Any, **more: Any) -> None:
        count[0] += 1
        if count[0] == 3:
            raise OSError("the network is down")
        copy(*args, **more)

    monkeypatch.setattr(output.fs, "copy", failing)
    with pytest.raises(OutputError, match="run the same command again"):
        seedpack.compress(folder, str(output), **OPTIONS, force=old)
    assert "config.json" not in files(output)
    monkeypatch.setattr(output.fs, "copy", copy)
    seedpack.compress(folder, str(output), **OPTIONS)
    assert "config.json" in files(output) and not any("-of-" in name for name in files(output))


def test_an_output_that_holds_its_source(s3: Any, folder: Path) -> None:
    model = upload(folder, s3 / "ten" / "dense")
    with pytest.raises(ModelError, match="is the model itself or holds it"):
        seedpack.compress(str(model), "s3://models/ten", **OPTIONS)
