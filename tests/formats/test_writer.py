from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from seedpack.errors import FormatError, OutputError
from seedpack.formats import CheckpointWriter, staged
from tests.helpers import checkpoints as make


def test_order_of_writing_does_not_matter(tmp_path: Path) -> None:
    first = make.write(tmp_path / "a").read_bytes()
    with CheckpointWriter(tmp_path / "b", make.PLANNED, make.SHARED, "test") as writer:
        for tensor in reversed(make.PLANNED):
            writer.write(tensor.name, make.contents(tensor))
    assert (tmp_path / "b").read_bytes() == first


def test_the_file_is_laid_out_first(tmp_path: Path) -> None:
    with CheckpointWriter(tmp_path / "a", make.PLANNED, {}, "test") as writer:
        size = (tmp_path / "a").stat().st_size
        for tensor in make.PLANNED:
            writer.write(tensor.name, make.contents(tensor))
    assert (tmp_path / "a").stat().st_size == size


def test_what_was_not_planned_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="2 parts were never written|3 parts were never written"):
        with CheckpointWriter(tmp_path / "a", make.PLANNED, {}, "test") as writer:
            writer.write("b", make.contents(make.PLANNED[1]))
    writer = CheckpointWriter(tmp_path / "b", make.PLANNED, {}, "test")
    dtype, shape, data = make.contents(make.PLANNED[1])["weight"]
    for wrong in [(dtype, (6,), data), ("I32", shape, data), (dtype, shape, data[:-1])]:
        with pytest.raises(FormatError, match=r"tensor 'b', part 'weight': planned F32 \[5\] of 20 bytes"):
            writer.write("b", {"weight": wrong})
    with pytest.raises(FormatError, match=r"planned parts \['weight'\], got \['x'\]"):
        writer.write("b", {"x": (dtype, shape, data)})
    writer.__exit__(OSError, None, None)


def test_plans_that_cannot_be_stored(tmp_path: Path) -> None:
    packed, raw = make.PLANNED
    for plan, message in [
        ([packed, packed], "the same name"),
        ([packed, replace(raw, name="a.codes")], "overwrite another tensor"),
        ([replace(raw, parts={"weight": ("F12", (5,))})], "cannot be stored"),
        ([replace(packed, parts={**packed.parts, "codes": ("F32", (3,))})], "must be of integers"),
        ([replace(packed, shape=(3, 2, 2))], "shape of the dense weight"),
    ]:
        with pytest.raises(FormatError, match=message):
            CheckpointWriter(tmp_path / "a", plan, {}, "test")
        (tmp_path / "a").unlink(missing_ok=True)


class TestStaged:
    def test_existing_output_is_kept(self, tmp_path: Path) -> None:
        target = tmp_path / "out"
        target.write_text("old")
        with pytest.raises(OutputError, match="exists already; pass --force"), staged(target):
            raise AssertionError("not reached")
        with pytest.raises(KeyboardInterrupt), staged(target, force=True) as partial:
            partial.write_text("half")
            raise KeyboardInterrupt
        assert target.read_text() == "old" and os.listdir(tmp_path) == ["out"]

    @pytest.mark.parametrize("directory", [False, True])
    @pytest.mark.parametrize("existing", [False, True])
    def test_replaces_its_like(self, tmp_path: Path, directory: bool, existing: bool) -> None:
        target = tmp_path / "sub" / "out"
        target.parent.mkdir()
        if existing and directory:
            target.mkdir()
            (target / "config.json").write_text("old")
        elif existing:
            target.write_text("old")
        with staged(target, force=True, directory=directory) as partial:
            (partial / "new" if directory else partial).write_text("new")
        assert os.listdir(target.parent) == ["out"]
        assert os.listdir(target) == ["new"] if directory else target.read_text() == "new"

    @pytest.mark.parametrize("directory", [False, True])
    def test_force_never_deletes_what_is_no_model(self, tmp_path: Path, directory: bool) -> None:
        target = tmp_path / "home"
        target.mkdir()
        (target / "thesis.tex").write_text("precious")
        with pytest.raises(OutputError, match="is a folder"), staged(target, force=True, directory=directory):
            raise AssertionError("not reached")
        (tmp_path / "file").write_text("precious")
        with pytest.raises(OutputError, match="not a folder"), staged(tmp_path / "file", force=True, directory=True):
            raise AssertionError("not reached")
        os.mkfifo(tmp_path / "fifo")
        with pytest.raises(OutputError, match="name another output"), staged(tmp_path / "fifo", force=True):
            raise AssertionError("not reached")
        assert (target / "thesis.tex").read_text() == "precious"
        assert sorted(os.listdir(tmp_path)) == ["fifo", "file", "home"]

    def test_an_output_moved_aside_by_a_killed_run_comes_back(self, tmp_path: Path) -> None:
        old = tmp_path / ".o[u]t.replaced-999999999"
        old.mkdir()
        (old / "config.json").write_text("old")
        with pytest.raises(OutputError, match="exists already"), staged(tmp_path / "o[u]t", directory=True):
            raise AssertionError("not reached")
        assert os.listdir(tmp_path) == ["o[u]t"]

    def test_leftovers_of_a_killed_run_are_removed(self, tmp_path: Path) -> None:
        (tmp_path / ".out.partial-999999999").write_text("half")
        (tmp_path / f".out.partial-{os.getppid()}").write_text("of a run that lives")
        with staged(tmp_path / "out") as partial:
            partial.write_text("new")
        assert sorted(os.listdir(tmp_path)) == [f".out.partial-{os.getppid()}", "out"]

    def test_full_disk(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def full(*_: object) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "posix_fallocate", full)
        (tmp_path / "out").write_text("old")
        with pytest.raises(OutputError, match="cannot reserve .* MB: No space left on device; free space"):
            with staged(tmp_path / "out", force=True) as partial:
                make.write(partial)
        assert (tmp_path / "out").read_text() == "old" and os.listdir(tmp_path) == ["out"]

    def test_unwritable_folder(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        with pytest.raises(OutputError, match="cannot be written"):
            with staged(tmp_path / "file" / "out") as partial:
                partial.write_text("")
