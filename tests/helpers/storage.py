"""A server that speaks S3's protocol, on this machine."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Yield a bucket, as a path, of a server that runs in a process of its own."""
    pytest.importorskip("moto")
    pytest.importorskip("s3fs")
    from upath import UPath

    log = tmp_path_factory.mktemp("s3") / "log"
    with log.open("w") as file:
        server = subprocess.Popen(
            [sys.executable, "-u", "-m", "moto.server", "-H", "127.0.0.1", "-p", "0"],
            stdout=subprocess.DEVNULL,
            stderr=file,
        )
    with pytest.MonkeyPatch.context() as patch:
        try:
            deadline, port = time.monotonic() + 60, None
            while port is None and time.monotonic() < deadline:
                time.sleep(0.1)
                port = re.search(r"http://127\.0\.0\.1:(\d+)", log.read_text())
            assert port is not None, "the server did not start"
            for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
                patch.setenv(name, "test")
            patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
            patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port[1]}")
            bucket: Any = UPath("s3://models")
            bucket.fs.mkdir("models")
            yield bucket
        finally:
            server.kill()
            server.wait()
