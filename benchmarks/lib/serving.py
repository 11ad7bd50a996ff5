"""vLLM's server, in a Python environment of its own, and a client that speaks to it."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

VARIABLE = "SEEDPACK_VLLM"  # names the Python that has vLLM and seedpack; `make .venv-vllm/ready` makes one
ROOT = Path(__file__).resolve().parents[2]
STARTS_WITHIN = 600  # seconds
CLIENT = """
import json, sys, time
from concurrent.futures import ThreadPoolExecutor
from openai import OpenAI

url, prompts, tokens, at_once = json.loads(sys.stdin.read())
client = OpenAI(base_url=f"{url}/v1", api_key="none", timeout=600)
model = client.models.list().data[0].id

def complete(prompt):
    found = client.completions.create(
        model=model, prompt=prompt, max_tokens=tokens, temperature=0, extra_body={"ignore_eos": True, "return_token_ids": True}
    )
    return found.choices[0].token_ids

started = time.perf_counter()
with ThreadPoolExecutor(at_once) as pool:
    found = list(pool.map(complete, prompts))
print(json.dumps([found, time.perf_counter() - started]))
"""


def python() -> str | None:
    """Return the Python that has vLLM, or None."""
    made = ROOT / ".venv-vllm/bin/python"
    return os.environ.get(VARIABLE) or (str(made) if (ROOT / ".venv-vllm/ready").exists() else None)


@contextmanager
def served(folder: Path, *options: str) -> Iterator[str]:
    """Serve a folder on loopback, and yield the server's address.

    Raises:
        RuntimeError: it does not start, with what it said.
    """
    interpreter = python()
    assert interpreter is not None
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [str(Path(interpreter).parent / "vllm"), "serve", str(folder), "--host", "127.0.0.1", "--port", str(port)]
    environment = {"VLLM_CPU_KVCACHE_SPACE": "1", **os.environ, "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(
            [*command, *options], stdout=said, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
        try:
            _wait(process, f"http://127.0.0.1:{port}/health", said)
            yield f"http://127.0.0.1:{port}"
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, 15)
            with suppress(subprocess.TimeoutExpired):
                process.wait(30)
            with suppress(ProcessLookupError):
                os.killpg(process.pid, 9)


def _wait(process: subprocess.Popen[bytes], url: str, said: Any) -> None:
    started = time.monotonic()
    while process.poll() is None and time.monotonic() - started < STARTS_WITHIN:
        with suppress(OSError):
            urllib.request.urlopen(url, timeout=5)
            return
        time.sleep(0.5)
    said.seek(0)
    raise RuntimeError(f"vLLM does not start:\n{said.read()[-40_000:]}")


def complete(
    url: str, prompts: Sequence[Sequence[int]], tokens: int, at_once: int = 1
) -> tuple[list[list[int]], float]:
    """Have a server go on with prompts, greedily, so many at once: return the tokens of each, and the seconds it took."""
    interpreter = python()
    assert interpreter is not None
    asked = json.dumps([url, [list(prompt) for prompt in prompts], tokens, at_once])
    found = subprocess.run([interpreter, "-c", CLIENT], input=asked, capture_output=True, text=True)
    if found.returncode:
        print(found.stderr, file=sys.stderr)
        found.check_returncode()
    texts, seconds = json.loads(found.stdout.splitlines()[-1])
    return texts, seconds
