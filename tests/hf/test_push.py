"""A packed folder with its card goes to a stand-in for the hub, and is loaded from there."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

import seedpack
from seedpack.cli.main import cli
from seedpack.errors import DigestError, ModelError
from seedpack.eval.evaluate import evaluate
from seedpack.formats.record import verify_record, write_record
from seedpack.hf.card import write_card
from seedpack.hf.push import write_code
from seedpack.loader.verify import verify
from tests.helpers.hub import TOKEN, Hub, standing_in
from tests.helpers.task_folders import task_folder
from tests.helpers.tokenizers import words

CARD = "---\nlicense: apache-2.0\nlanguage:\n- en\ntags:\n- tiny\n---\n\n# A tiny model\n\nIt knows nothing.\n"
LOAD = """
import sys, transformers
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=sys.argv[2] == "code")
print(type(model).__name__, type(model.lm_head).__name__, "seedpack" in sys.modules)
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("push")
    task_folder(root / "dense", "language-modeling")
    (root / "dense/README.md").write_text(CARD)
    words(root / "text", 40)
    return root


@pytest.fixture
def packed(root: Path, tmp_path: Path) -> Path:
    seedpack.compress(root / "dense", tmp_path / "packed", settings={"effort": "fast"})
    return tmp_path / "packed"


@pytest.fixture
def hub() -> Iterator[Hub]:
    with standing_in() as hub:
        yield hub


def outside(hub: Hub | None, folder: Path, *arguments: str, code: int = 0, token: str = TOKEN) -> str:
    """Run Python in a process of its own, whose hub is the stand-in, and return what it says."""
    found = {"HF_ENDPOINT": hub.address, "HF_HUB_OFFLINE": "0"} if hub else {}
    environment = {**os.environ, "HF_HOME": str(folder / "home"), "HF_TOKEN": token, "HF_HUB_DISABLE_XET": "1", **found}
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment, cwd=folder)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + (done.stderr if code else "")


def head(text: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(text.split("---\n")[1])
    return found


def test_the_card(root: Path, packed: Path) -> None:
    found = evaluate(root / "dense", [packed], root / "text", context=64, tokens=4096)
    text = write_card(packed, [found], base_model="some/tiny", command="seedpack compress some/tiny")
    assert text == (packed / "README.md").read_text()
    data = head(text)
    assert (
        data["license"] == "apache-2.0" and data["language"] == ["en"] and data["tags"] == ["tiny", "seedpack", "5-bit"]
    )
    assert data["base_model"] == "some/tiny" and data["base_model_relation"] == "quantized"
    (entry,) = data["model-index"]
    metrics = {m["type"]: m["value"] for result in entry["results"] for m in result["metrics"]}
    report: Any = found.packed[0][1]
    assert metrics["kl_mean"] == report.kl_mean and metrics["perplexity_packed"] == report.perplexity_packed
    assert f"| perplexity | {report.perplexity_original:.4g} | {report.perplexity_packed:.4g} |" in text
    assert f"{(packed / 'model.safetensors').stat().st_size:,} bytes" in text and "seedpack compress some/tiny" in text
    assert text.endswith("# A tiny model\n\nIt knows nothing.\n")
    with seedpack.formats.Checkpoint(packed) as checkpoint:
        assert all(result.error is None for result in verify(checkpoint))
    again = write_card(packed)  # what is not known any more is left out, the base and the original's text stay
    assert (
        head(again)["base_model"] == "some/tiny" and "perplexity" not in again and again.count("It knows nothing.") == 1
    )


def test_what_is_refused(root: Path, packed: Path) -> None:
    with pytest.raises(ModelError, match="is no folder of a packed Hugging Face model"):
        write_card(root)
    (packed / "tokenizer.json").write_text("{}")
    with pytest.raises(DigestError, match=r"tokenizer.json: its bytes changed since they were written"):
        write_card(packed)


def test_up_and_down(root: Path, packed: Path, hub: Hub, tmp_path: Path) -> None:
    said = outside(
        hub, tmp_path, "-m", "seedpack", "push", "packed", "me/tiny", "--private", "--base-model", "some/tiny", "--json"
    )
    assert json.loads(said) == {"folder": "packed", "repo": "me/tiny", "address": f"{hub.address}/me/tiny"}
    assert hub.private == {"me/tiny": True}
    uploaded = hub.files["me/tiny"]
    assert {file.name: file.read_bytes() for file in packed.iterdir()} == {
        k: v for k, v in uploaded.items() if k != ".gitattributes"
    }
    assert head(uploaded["README.md"].decode())["base_model"] == "some/tiny"
    loaded = outside(hub, tmp_path, "-c", "import seedpack" + LOAD, "me/tiny", "")
    assert loaded.split() == ["LlamaForCausalLM", "PackedLinear", "True"]
    said = outside(hub, tmp_path, "-m", "seedpack", "push", "packed", "me/tiny", code=1, token="hf_wrong")
    assert "me/tiny: cannot be uploaded" in said and "Traceback" not in said


@pytest.mark.slow
def test_compressed_and_uploaded(root: Path, hub: Hub, tmp_path: Path) -> None:
    command = [
        "-m",
        "seedpack",
        "compress",
        str(root / "dense"),
        "-o",
        "out",
        "--effort",
        "fast",
        "--push-to-hub",
        "me/new",
    ]
    outside(hub, tmp_path, *command)
    assert "--push-to-hub me/new" in hub.files["me/new"]["README.md"].decode()
    refused = CliRunner().invoke(cli, ["compress", str(root / "dense"), "--dry-run", "--push-to-hub", "me/new"])
    assert refused.exit_code == 2 and "--push-to-hub uploads what is packed" in refused.output
    failed = outside(hub, tmp_path, *command[:5], "other", *command[6:], code=1, token="hf_wrong")
    assert "me/new: cannot be uploaded" in failed and not (tmp_path / "other").exists()


@pytest.mark.slow
def test_it_says_how_it_is_loaded(packed: Path, tmp_path: Path) -> None:
    """With the modelling file nobody imports seedpack; where it is missing, the error says what to install."""
    write_code(packed)
    assert outside(None, tmp_path, "-c", LOAD, "packed", "code").split() == ["LlamaForCausalLM", "PackedLinear", "True"]
    without = "import sys; sys.modules['seedpack'] = None" + LOAD
    assert "pip install seedpack-torch" in outside(None, tmp_path, "-c", without, "packed", "code", code=1)
    with pytest.raises(ModelError, match="has modelling code of its own"):
        write_code(packed)


def test_names_of_architectures_are_no_code(root: Path, tmp_path: Path) -> None:
    """They come from a config, which may be somebody else's."""
    dense = tmp_path / "dense"
    shutil.copytree(root / "dense", dense)
    seedpack.compress(dense, tmp_path / "packed", settings={"effort": "fast"})
    config = json.loads((tmp_path / "packed/config.json").read_text())
    config["architectures"].append("A\nimport os")
    (tmp_path / "packed/config.json").write_text(json.dumps(config))
    write_record(tmp_path / "packed")
    write_code(tmp_path / "packed")
    assert "import os" not in (tmp_path / "packed/modeling_seedpack.py").read_text()


def test_measured_into_the_card(root: Path, packed: Path) -> None:
    arguments = ["eval", str(root / "dense"), str(packed), "--text", str(root / "text"), "--context", "64", "--card"]
    result = CliRunner().invoke(cli, [*arguments, "--dataset", "org/texts:plain"])
    assert result.exit_code == 0, result.output
    assert "| perplexity |" in (packed / "README.md").read_text()
    (entry,) = yaml.safe_load((packed / ".eval_results/org--texts--plain.yaml").read_text())
    assert entry["dataset"] == {"id": "org/texts", "task_id": "plain"} and entry["value"] > 1
    assert entry["notes"].startswith("perplexity; ") and "KL divergence from the original 0.0" in entry["notes"]
    assert all(error is None for _, error in verify_record(packed))
    for datasets, message in (
        (["a"], "expected a data set of the hub as org/name"),
        (["a/b", "c/d"], "2 data sets for 1 texts"),
    ):
        refused = CliRunner().invoke(cli, [*arguments, *(f"--dataset={dataset}" for dataset in datasets)])
        assert refused.exit_code and message in f"{refused.output}{refused.exception}"
