"""`seedpack serve` is transformers' server, in a process that knows packed weights."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import seedpack
from seedpack.cli.main import cli
from seedpack.hf.generation import Sampling, TextGenerator
from tests.helpers.models import llama
from tests.helpers.tokenizers import CHAT_TEMPLATE, byte_tokenizer


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    model = llama(vocab_size=258, max_position_embeddings=256, bos_token_id=0, eos_token_id=1, pad_token_id=1)
    model.save_pretrained(tmp_path / "dense")
    byte_tokenizer(CHAT_TEMPLATE).save_pretrained(tmp_path / "dense")
    seedpack.compress(tmp_path / "dense", tmp_path / "packed", settings={"effort": "fast"})
    return tmp_path / "packed"


def asked(port: int, document: dict[str, Any], server: subprocess.Popen[bytes]) -> dict[str, Any]:
    """Post a chat as soon as the server answers."""
    address = f"http://127.0.0.1:{port}/v1/chat/completions"
    request = urllib.request.Request(address, json.dumps(document).encode(), {"Content-Type": "application/json"})
    for _ in range(240):
        assert server.poll() is None, "the server ended"
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                answer: dict[str, Any] = json.load(response)
                return answer
        except urllib.error.URLError as error:
            if isinstance(error, urllib.error.HTTPError):
                raise
            time.sleep(0.5)
    raise AssertionError("the server did not start")


@pytest.mark.rounds
@pytest.mark.slow
def test_it_answers_as_run_does(packed: Path) -> None:
    pytest.importorskip("fastapi")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    server = subprocess.Popen([sys.executable, "-m", "seedpack", "serve", packed, *options])
    try:
        document = {
            "model": str(packed),
            "messages": [{"role": "user", "content": "Hello"}],
            "max_tokens": 16,
            "temperature": 0,
        }
        answer = asked(port, document, server)["choices"][0]["message"]["content"]
    finally:
        server.kill()
        server.wait()
    parts: list[str] = []
    TextGenerator(packed).answer([{"role": "user", "content": "Hello"}], Sampling(max_new_tokens=16), parts.append)
    assert answer == "".join(parts)


def test_what_is_missing_is_named(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.utils.import_utils.is_serve_available", lambda: False)
    result = CliRunner().invoke(cli, ["serve", str(packed)])
    assert result.exit_code == 1 and "pip install 'seedpack-torch[serve]'" in result.output
    assert "no such file or folder" in CliRunner().invoke(cli, ["serve", "nowhere"]).output


def test_options_are_those_of_transformers(packed: Path) -> None:
    pytest.importorskip("fastapi")
    result = CliRunner().invoke(cli, ["serve", str(packed), "--nonsense"])
    assert result.exit_code == 2 and "--continuous-batching" in result.output
