"""Every code block of the README and of the guides runs, page by page, as a reader would paste it."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import nn

import seedpack
import seedpack.api
import seedpack.image
from seedpack.cli.main import cli
from tests.helpers.bombs import parts_of, write_tensors
from tests.helpers.few_bits import float8_blocks, rewritten
from tests.helpers.gguf_models import write_model
from tests.helpers.hub import TOKEN, standing_in
from tests.helpers.models import llama
from tests.helpers.storage import s3 as s3
from tests.helpers.tokenizers import byte_tokenizer

ROOT = Path(__file__).resolve().parent.parent
GUIDES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "docs" / "codecs").glob("*.md"))]
HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"  # a folder of that name stands in for it
LONG = {"calibration", "commands", "fast-feedforward", "hugging-face", "images", "scale"}  # more than some seconds
ELSEWHERE = {
    "curl": "tests/cli/test_serve.py asks the same",
    "vllm": "tests/vllm starts it where vLLM is installed",
    "make": "what runs these tests",
    "pip": "see require_extras",
    "ray": "tests/converter/test_cluster.py joins a cluster; `ray stop` would end those of others too",
}
SRUN = '#!/bin/sh\nshift; shift\nfor SLURM_PROCID in 0 1; do export SLURM_PROCID; "$@" || exit 1; done\n'
FENCED = re.compile(r"^```(\w+)\n(.*?)^```$", flags=re.MULTILINE | re.DOTALL)
INDENTED = re.compile(r"^    \w(?:.*\n    )*.*\n", flags=re.MULTILINE)


def code_blocks(page: Path) -> list[tuple[str, str]]:
    """Return the blocks of a page, language and content; those of the README that are indented are commands of a shell."""
    text = page.read_text("utf-8")
    if page.name == "README.md":
        text = INDENTED.sub(lambda lines: f"```console\n{lines[0].replace('    ', '$ ')}```\n", text)
    return FENCED.findall(text)


PAGES = [page for page in GUIDES if any(language != "text" for language, _ in code_blocks(page))]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.head = nn.Linear(64, 64), nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(self.fc(x).relu())
        return logits


def language_model(folder: Path, dtype: torch.dtype = torch.float32, **more: Any) -> None:
    """Make a folder with a Llama of one small layer and a tokenizer of bytes."""
    config = {"vocab_size": 258, "num_hidden_layers": 1, "max_position_embeddings": 1024}
    model = llama(**{**config, **more}, bos_token_id=0, eos_token_id=1, pad_token_id=1)
    model.to(dtype).save_pretrained(folder)
    byte_tokenizer("{% for m in messages %}{{ m.content }}{% endfor %}").save_pretrained(folder)


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make what the pages take for granted: models, texts, a picture."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("blocks")
    torch.manual_seed(0)
    language_model(folder / "model")
    seedpack.compress(folder / "model", folder / "packed")
    (folder / HUB_ID).parent.mkdir()
    (folder / HUB_ID).symlink_to(folder / "model")
    torch.save(Net().state_dict(), folder / "net.pt")
    (folder / "model.safetensors").symlink_to(folder / "model/model.safetensors")
    write_model(folder / "model.gguf", "qwen2", ("Q4_K", "Q6_K"), hidden_size=256, intermediate_size=256)
    language_model(folder / "deepseek", torch.bfloat16, hidden_size=256, intermediate_size=256)
    rewritten(
        folder / "deepseek", in_float8, quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128]}
    )
    for name in ("text.txt", "wiki.txt"):
        (folder / name).write_text("The quick brown fox jumps over the lazy dog.\n" * 16)
    rows, columns = torch.meshgrid(torch.arange(48), torch.arange(64), indexing="ij")
    pixels = torch.stack([4 * columns, 5 * rows, 2 * (rows + columns)], 2).to(torch.uint8)
    Image.fromarray(pixels.numpy()).save(folder / "photo.png")
    write_bomb(folder / "someone-elses.safetensors")
    (folder / "bin").mkdir()
    (folder / "bin/srun").write_text(SRUN)
    (folder / "bin/srun").chmod(0o755)
    return folder


def in_float8(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return a state dict with its linear layers in float8."""
    stored = dict(state)
    for name in [name for name in state if name.endswith("_proj.weight")]:
        stored[name], stored[f"{name}_scale_inv"] = float8_blocks(state[name], 128)
    return stored


def write_bomb(path: Path) -> None:
    """Write a file of some hundred bytes whose one tensor has gigabytes."""
    from seedpack.codecs.basis import BasisCodec

    codec, shape = BasisCodec(count=1), (40_000, 50_000)
    write_tensors(path, {"w.weight": (codec, shape, parts_of(codec, shape))})


def predefined(folder: Path) -> dict[str, Any]:
    """Return the names that a guide uses without making them."""
    from transformers import AutoModelForCausalLM

    inputs, classes = torch.randn(8, 64), torch.randint(0, 10, (8,))
    return {
        "Net": Net,
        "MyNet": Net,
        "net": Net(),
        "model": Net(),
        "batches": [(inputs, classes)] * 3,
        "images_1": inputs,
        "images_2": inputs + 1,
        "x": inputs,
        "mlp": nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64)),
        "inputs": torch.randn(256, 64),
        "language_model": AutoModelForCausalLM.from_pretrained(folder / "model"),
        "token_ids": torch.randint(0, 258, (4, 64)),
    }


@contextmanager
def at_hand(folder: Path, material: Path, patch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """Work in a folder with the material, where outputs are replaced, beside a stand-in for the hub."""
    for entry in material.iterdir():
        (folder / entry.name).symlink_to(entry)
    (folder / "packed").unlink()
    subprocess.run(["cp", "-r", material / "packed", folder / "packed"], check=True)
    patch.chdir(folder)
    patch.setenv("PATH", f"{folder / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}")
    patch.setenv("HF_TOKEN", TOKEN)
    names = predefined(folder)
    for module, verb in ((seedpack.api, "compress"), (seedpack.api, "save"), (seedpack.image, "compress")):
        patch.setattr(module, verb, partial(getattr(module, verb), force=True))
    with standing_in() as hub:
        patch.setattr("huggingface_hub.constants.ENDPOINT", hub.address)
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        yield names


def commands(block: str) -> Iterator[tuple[str, str]]:
    """Yield the commands of a block of a console, each with what it is shown to print."""
    for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
        line, _, shown = part.partition("\n")
        yield line.partition("  #")[0], shown


def run_console(block: str, names: dict[str, Any]) -> None:
    for line, shown in commands(block):
        program = shlex.split(line)[0]
        if program == "pip":
            require_extras(line)
        if program in ELSEWHERE or line.startswith("seedpack serve") or "--engine ray" in line:
            continue
        subprocess.run(["rm", "-rf", *re.findall(r"-o ([\w.-]+)", line)], check=True)  # of an earlier block
        code, said = (run_seedpack if re.search(r"(^|\| )seedpack ", line) else run_shell)(line)
        assert code == shown.startswith("Error:"), f"{line}\n{said}"
        assert " ".join(shown.split()) in " ".join(said.split())


def run_seedpack(line: str) -> tuple[int, str]:
    """Run a command in this process, fed by what stands before a pipe; return its exit code and what it says."""
    before, _, line = line.rpartition("| ")
    line, _, into = line.partition(" > ")
    fed = (
        subprocess.run(before.strip(" |"), shell=True, capture_output=True, check=True).stdout if before else "Hello\n"
    )
    arguments = shlex.split(line)[1:]
    result = CliRunner().invoke(cli, arguments, input=fed)
    if into:
        Path(into).write_text(result.stdout)
    return result.exit_code, f"{result.output}{result.exception or ''}"


def run_shell(line: str) -> tuple[int, str]:
    done = subprocess.run(line, shell=True, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def require_extras(line: str) -> None:
    """See that an installation of this project names extras that it has."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for name, extras in re.findall(r"([\w.-]+)\[([\w,]+)\]", line):
        assert name in (project["name"], ".") and set(extras.split(",")) <= project["optional-dependencies"].keys(), (
            line
        )


def run_python(block: str, names: dict[str, Any]) -> None:
    exec(compile(block, "example", "exec", dont_inherit=True), names)


def run_toml(block: str, names: dict[str, Any]) -> None:
    """Follow an entry point to a class that an earlier block has made."""
    for entries in tomllib.loads(block)["project"]["entry-points"].values():
        assert all(names[target.partition(":")[2]].id == name for name, target in entries.items())


RUN = {"console": run_console, "python": run_python, "toml": run_toml}
MARKED = [pytest.param(page, marks=pytest.mark.slow if page.stem in LONG else ()) for page in PAGES]


@pytest.mark.parametrize("page", MARKED, ids=lambda page: str(page.stem))
def test_the_blocks_of_a_page_run(
    page: Path, material: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    blocks = code_blocks(page)
    if any("s3://" in block for _, block in blocks):
        bucket = request.getfixturevalue("s3")
        bucket.fs.put(str(material / "model"), "models/llama", recursive=True)
    with at_hand(tmp_path, material, monkeypatch) as names:
        for language, block in blocks:
            if language != "text":  # what is printed
                RUN[language](block, names)
