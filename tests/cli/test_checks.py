"""Mistakes that are told before torch is imported."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from seedpack.cli.checks import check_compress
from seedpack.errors import ModelError, OptionError, OutputError, SeedpackError

DEFAULTS: dict[str, Any] = {"codec": "trellis", "bits": None}


def test_what_can_work_is_let_by(tmp_path: Path) -> None:
    for codec, bits in (("trellis", 3.5), ("svd+trellis", 12.0), ("seedlm", 3.0), ("mask", None), ("field", None)):
        check_compress(str(tmp_path), str(tmp_path / "out"), codec=codec, bits=bits, effort="best")
    check_compress("org/name", None, **DEFAULTS)
    check_compress(str(tmp_path), str(tmp_path), **DEFAULTS, force=True)
    (tmp_path / "net.pt").touch()
    check_compress(str(tmp_path / "net.pt"), str(tmp_path), **DEFAULTS)
    with pytest.raises(OutputError):
        check_compress(str(tmp_path / "net.pt"), str(tmp_path / "net.pt"), **DEFAULTS)


WRONG: dict[str, tuple[dict[str, object], type[SeedpackError], str]] = {
    "path": ({"model": "nothing.pt"}, ModelError, "no such file or folder, and not a hub id"),
    "long path": ({"model": "x" * 5000}, ModelError, "not a valid path"),
    "output": ({"output": "."}, OutputError, "exists already; pass --force"),
    "codec": ({"codec": "zip"}, OptionError, "unknown codec 'zip'; known: basis, field, mask"),
    "inner codec": ({"codec": "svd+"}, OptionError, "unknown codec ''"),
    "bits": ({"bits": 99.0}, OptionError, "99.0 bits: must be from 1 to 8"),
    "no bits": ({"bits": float("nan")}, OptionError, "nan bits"),
    "bits of seedlm": ({"codec": "seedlm", "bits": 5.0}, OptionError, "configurations for 3 and 4"),
    "bits of svd": ({"codec": "svd", "bits": -1.0}, OptionError, "above 0"),
    "bits and size": ({"bits": 4.0, "target_size": "9MB"}, OptionError, "not both"),
    "head bits": ({"head_bits": 9}, OptionError, "head_bits must be from 1 to 8"),
}


@pytest.mark.parametrize("case", WRONG)
def test_refused(case: str, tmp_path: Path) -> None:
    changes, kind, message = WRONG[case]
    arguments: dict[str, Any] = {"model": str(tmp_path), "output": None, **DEFAULTS, **changes}
    if arguments["output"]:
        arguments["output"] = str(tmp_path)
    with pytest.raises(kind, match=message):
        check_compress(**arguments)


PROGRAM = "import sys; sys.argv[1:] = {arguments}\nfrom seedpack.cli.main import main\ntry: main()\nfinally: print('torch' in sys.modules)"


def program(arguments: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    script = PROGRAM.format(arguments=arguments)
    root = str(Path(__file__).resolve().parent.parent.parent)
    return subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=folder, env={"PYTHONPATH": root}
    )


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["inspect", "nothing"], 1, "no such file or folder"),
        (["inspect", "a.safetensors"], 0, ""),
        (["inspect", "a.safetensors", "--tensors", "b*"], 1, "names look like 'a.weight'"),
        (["load", "net.pt"], 1, "net.pt is a torch checkpoint, not a packed checkpoint; run seedpack compress net.pt"),
        (["verify", "net.pt"], 1, "net.pt is a torch checkpoint"),
        (["verify", "a.safetensors"], 1, "a.safetensors is not packed: "),
        (["unpack", "nothing", "-o", "x"], 1, "no such file or folder"),
        (["unpack", "net.pt", "-o", "x"], 1, "net.pt is a torch checkpoint"),
        (["run", "net.pt", "x"], 1, "net.pt is a torch checkpoint"),
        (["run", "nothing", "x"], 1, "no such file or folder"),
        (["run", "net.pt", "x", "--top-k", "3"], 2, "add --temperature"),
        (["eval", "nothing", "nothing", "--text", "nothing"], 2, "does not exist"),
    ],
)
def test_torch_is_not_imported(tmp_path: Path, arguments: list[str], code: int, message: str) -> None:
    from safetensors.torch import save_file

    torch.save({"a.weight": torch.randn(8, 8)}, tmp_path / "net.pt")
    save_file({"a.weight": torch.randn(8, 8)}, tmp_path / "a.safetensors")
    done = program(arguments, tmp_path)
    assert done.returncode == code and message in done.stderr, done.stderr
    assert done.stdout.splitlines()[-1] == "False", "torch is imported"


def test_checks_do_not_import_torch(tmp_path: Path) -> None:
    script = "import seedpack.cli.checks, sys; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_an_import_of_torch_is_found(tmp_path: Path) -> None:
    assert program(["codecs"], tmp_path).stdout.splitlines()[-1] == "True"
