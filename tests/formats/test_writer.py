from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import subprocess
import sys
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
        for text in ("old", "new") if existing else ("new",):
            with staged(target, force=True, directory=directory) as partial:
                (partial / text if directory else partial).write_text(text)
        assert os.listdir(target.parent) == ["out"]
        if directory:
            assert sorted(os.listdir(target)) == ["new", "seedpack.json"]
        else:
            assert target.read_text() == "new"

    @pytest.mark.parametrize("directory", [False, True])
    def test_force_never_deletes_what_is_no_output(self, tmp_path: Path, directory: bool) -> None:
        target = tmp_path / "home"
        target.mkdir()
        (target / "config.json").write_text('{"port": 80}')
        message = "holds 1 files, .* and no record" if directory else "is a folder"
        with pytest.raises(OutputError, match=message), staged(target, force=True, directory=directory):
            raise AssertionError("not reached")
        (tmp_path / "file").write_text("precious")
        with pytest.raises(OutputError, match="not a folder"), staged(tmp_path / "file", force=True, directory=True):
            raise AssertionError("not reached")
        os.mkfifo(tmp_path / "fifo")
        with pytest.raises(OutputError, match="name another output"), staged(tmp_path / "fifo", force=True):
            raise AssertionError("not reached")
        assert (target / "config.json").exists()
        assert sorted(os.listdir(tmp_path)) == ["fifo", "file", "home"]

    @pytest.mark.parametrize("name", ["thesis.tex", "data/results.csv", "data/link"])
    def test_force_spares_an_output_with_other_things_in_it(self, tmp_path: Path, name: str) -> None:
        target = tmp_path / "out"
        with staged(target, directory=True) as partial:
            (partial / "config.json").write_text("{}")
        (target / name).parent.mkdir(exist_ok=True)
        (target / name).symlink_to("/nowhere") if name.endswith("link") else (target / name).write_text("precious")
        with pytest.raises(OutputError, match=f"1 files that seedpack did not write, such as '{name}'"):
            with staged(target, force=True, directory=True):
                raise AssertionError("not reached")
        (target / name).unlink()
        with staged(target, force=True, directory=True):
            pass
        assert os.listdir(target) == ["seedpack.json"]

    def test_leftovers_that_cannot_be_removed_stop_no_run(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        target = tmp_path / "out"
        for text in ("old", "new", "newer"):
            with staged(target, directory=True, force=True) as partial:
                (partial / text).write_text(text)
                monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: None)  # as where another process holds the files
        assert sorted(os.listdir(target)) == ["newer", "seedpack.json"]
        left = sorted(name for name in os.listdir(tmp_path) if name != "out")
        assert len(left) == 2 and all(name.startswith(".out.leftover-") for name in left)

    def test_what_is_no_name(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        for name in (".", "..", "a/.."):
            with pytest.raises(OutputError, match="is no name for an output"), staged(Path(name), directory=True):
                raise AssertionError("not reached")
        (tmp_path / "b").mkdir()
        (tmp_path / ".out.partial").symlink_to(tmp_path / "b")
        with pytest.raises(OutputError, match="is a link"), staged(tmp_path / "out"):
            raise AssertionError("not reached")

    def test_what_appears_meanwhile_is_kept(self, tmp_path: Path) -> None:
        with pytest.raises(OutputError, match="exists already"), staged(tmp_path / "out") as partial:
            partial.write_text("mine")
            (tmp_path / "out").write_text("another's")
        assert (tmp_path / "out").read_text() == "another's" and os.listdir(tmp_path) == ["out"]

    def test_an_output_moved_aside_by_a_killed_run_comes_back(self, tmp_path: Path) -> None:
        old = tmp_path / ".o[u]t.partial" / "old"
        old.mkdir(parents=True)
        (old / "config.json").write_text("old")
        with pytest.raises(OutputError, match="exists already"), staged(tmp_path / "o[u]t", directory=True):
            raise AssertionError("not reached")
        assert os.listdir(tmp_path) == ["o[u]t"] and os.listdir(tmp_path / "o[u]t") == ["config.json"]

    @pytest.mark.parametrize("directory", [False, True])
    def test_leftovers_of_a_killed_run_are_removed(self, tmp_path: Path, directory: bool) -> None:
        left = tmp_path / ".out.partial" / "new"
        left.mkdir(parents=True)
        (left / "half").write_text("half")
        (left.parent / "lock").write_text("process 1 on another")
        with staged(tmp_path / "out", directory=directory) as partial:
            if not directory:
                partial.write_text("new")
        assert os.listdir(tmp_path) == ["out"]

    def test_one_run_at_a_time(self, tmp_path: Path) -> None:
        with staged(tmp_path / "out") as partial:
            partial.write_text("first")
            for force in (False, True):
                with pytest.raises(OutputError, match=f"another run is writing it .process {os.getpid()} on"):
                    with staged(tmp_path / "out", force=force):
                        raise AssertionError("not reached")
        assert (tmp_path / "out").read_text() == "first" and os.listdir(tmp_path) == ["out"]

    def test_without_locks_in_the_file_system(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def unable(*_: object) -> None:
            raise OSError(errno.ENOLCK, "No locks available")

        monkeypatch.setattr(fcntl, "flock", unable)
        with staged(tmp_path / "out") as partial:
            partial.write_text("first")
            with pytest.raises(OutputError, match=r"if it is dead remove .*\.out\.partial .*has no locks"):
                with staged(tmp_path / "out", force=True):
                    raise AssertionError("not reached")
        assert os.listdir(tmp_path) == ["out"]

    def test_racing_processes(self, tmp_path: Path) -> None:
        """One of two runs that begin at once finishes and one is refused, whatever the output; nothing is left behind."""
        script = """
import sys, time
from pathlib import Path
from seedpack.errors import OutputError
from seedpack.formats import staged
print("ready", flush=True)
for pair in range(20):
    target = Path(sys.argv[1]) / str(pair)
    sys.stdin.readline()
    try:
        with staged(target, directory=pair % 2 == 1) as partial:
            (partial / "a" if pair % 2 else partial).write_text(sys.argv[2])
            time.sleep(0.01)
        print("done", flush=True)
    except OutputError as error:
        print("refused" if "another run" in str(error) or "exists already" in str(error) else error, flush=True)
"""
        arguments = [sys.executable, "-c", script, str(tmp_path)]
        racers = [
            subprocess.Popen([*arguments, who], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1)
            for who in "ab"
        ]
        with contextlib.ExitStack() as stack:
            pipes = []
            for racer in racers:
                stack.enter_context(racer)
                assert racer.stdin is not None and racer.stdout is not None
                assert racer.stdout.readline() == "ready\n"
                pipes.append((racer.stdin, racer.stdout))
            for pair in range(20):
                for stdin, _ in pipes:
                    stdin.write("go\n")
                said = [stdout.readline().strip() for _, stdout in pipes]
                assert sorted(said) == ["done", "refused"]
                written = tmp_path / str(pair)
                assert (written / "a" if pair % 2 else written).read_text() == "ab"[said.index("done")]
        assert sorted(os.listdir(tmp_path)) == sorted(map(str, range(20)))

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
