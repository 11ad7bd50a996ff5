from __future__ import annotations

import json
from pathlib import Path

import pytest

from seedpack.errors import DigestError, FormatError, VersionError
from seedpack.formats import staged
from seedpack.formats.header import dumps_canonical
from seedpack.formats.record import RECORD_FILE, _digest, foreign_files, read_record, verify_record


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    with staged(tmp_path / "out", directory=True) as partial:
        (partial / "config.json").write_text('{"layers": 2}')
        (partial / "1_Pooling").mkdir()
        (partial / "1_Pooling" / "config.json").write_text("{}")
    return tmp_path / "out"


def damaged(folder: Path) -> list[str]:
    return [name for name, error in verify_record(folder) if error is not None]


def test_it_names_every_file(folder: Path) -> None:
    assert sorted(read_record(folder) or ()) == ["1_Pooling/config.json", "config.json"]
    assert not damaged(folder) and not foreign_files(folder)


def test_every_bit_is_covered(folder: Path) -> None:
    for name in ("config.json", "1_Pooling/config.json", RECORD_FILE):
        path = folder / name
        content = path.read_bytes()
        for bit in range(8 * len(content)):
            flipped = bytearray(content)
            flipped[bit // 8] ^= 1 << bit % 8
            path.write_bytes(flipped)
            assert damaged(folder) == [name]
        path.write_bytes(content + b" ")
        assert damaged(folder) == [name]
        path.write_bytes(content)


def test_missing_and_foreign_files(folder: Path) -> None:
    (folder / "config.json").rename(folder / "other.json")
    assert damaged(folder) == ["config.json"]
    assert foreign_files(folder) == "holds 1 files that seedpack did not write, such as 'other.json'"
    (folder / "other.json").unlink()
    (folder / "1_Pooling" / "config.json").write_text("mine")
    assert "1 files that were changed since seedpack wrote them, such as '1_Pooling" in foreign_files(folder)
    (folder / RECORD_FILE).unlink()
    assert not damaged(folder) and "no record that seedpack wrote them" in foreign_files(folder)


def test_what_is_no_record(folder: Path) -> None:
    path = folder / RECORD_FILE
    whole = path.read_text()
    cases: list[tuple[str, type[FormatError], str]] = [
        ("[]", FormatError, "must be an object"),
        ("{", FormatError, "JSON"),
        (whole.replace('"seedpack":1', '"seedpack":9'), VersionError, "upgrade"),
        (whole.replace('"config.json"', '"konfig.json"'), DigestError, "bytes changed"),
    ]
    for text, kind, message in cases:
        path.write_text(text)
        with pytest.raises(kind, match=message):
            read_record(folder)
        assert damaged(folder) == [RECORD_FILE]
        assert foreign_files(folder).startswith("its record of what seedpack wrote cannot be read")


@pytest.mark.parametrize("name", ["../a", "/etc/passwd", "a//b", "./a", "a/..", "", "a\0b"])
def test_names_that_lead_out_of_the_folder(folder: Path, name: str) -> None:
    document = json.loads((folder / RECORD_FILE).read_text())
    document["files"][name] = "0" * 64
    (folder / RECORD_FILE).write_text(dumps_canonical({**document, "digest": _digest(document)}))
    with pytest.raises(FormatError, match="must map names of files in the folder to digests"):
        read_record(folder)


def test_names_and_texts_that_no_file_has(folder: Path) -> None:
    document = json.loads((folder / RECORD_FILE).read_text())
    document["files"]["é" * 255] = "0" * 64
    (folder / RECORD_FILE).write_text(dumps_canonical({**document, "digest": _digest(document)}))
    assert damaged(folder) == ["é" * 255]
    for text in (b'{"digest":"\\ud800","files":{},"seedpack":1,"writer":""}', b'"\xff"'):
        (folder / RECORD_FILE).write_bytes(text)
        assert damaged(folder) == [RECORD_FILE]
