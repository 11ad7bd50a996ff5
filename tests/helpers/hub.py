"""A stand-in for the Hugging Face hub: repositories of models in memory, by its HTTP API, as far as uploads and downloads use it."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlparse

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "hf_standin"


class Hub:
    """The repositories, by id: their files, and whether they are private."""

    def __init__(self) -> None:
        self.files: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.address = ""


@contextmanager
def standing_in() -> Iterator[Hub]:
    """Serve a stand-in on loopback."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            """Say nothing."""

        def _answer(self, document: Any, code: int = 200, headers: dict[str, str] | None = None) -> None:
            body = document if isinstance(document, bytes) else json.dumps(document).encode()
            self.send_response(code)
            for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if self.headers.get("Transfer-Encoding") == "chunked":
                body = b"".join(self._chunks())
            path = unquote(urlparse(self.path).path)
            if path == "/api/validate-yaml":
                return self._answer({"errors": [], "warnings": []})
            if self.headers.get("Authorization") != f"Bearer {TOKEN}":
                return self._answer({"error": "Invalid username or password."}, 401)
            if path == "/api/repos/create":
                asked = json.loads(body)
                repo = "/".join(filter(None, (asked.get("organization"), asked["name"])))
                known = repo in hub.files
                hub.files.setdefault(repo, {})
                hub.private.setdefault(repo, asked.get("visibility") == "private")
                return self._answer({"url": f"{hub.address}/{repo}", "name": repo}, 409 if known else 200)
            repo, _, verb = path.removeprefix("/api/models/").rpartition("/main")[0].rpartition("/")
            if verb == "preupload":
                files = [
                    {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False}
                    for f in json.loads(body)["files"]
                ]
                return self._answer({"files": files})
            if verb == "commit":
                for line in map(json.loads, body.splitlines()):
                    if line["key"] == "file":
                        hub.files[repo][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                return self._answer(
                    {"success": True, "commitOid": COMMIT, "commitUrl": f"{hub.address}/{repo}/commit/{COMMIT}"}
                )
            return self._answer({"error": f"no {path}"}, 404)

        def _chunks(self) -> Iterator[bytes]:
            while size := int(self.rfile.readline(), 16):
                yield self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()

        def do_GET(self) -> None:
            path = unquote(urlparse(self.path).path)
            if path.startswith("/api/models/") and "/auth-check" in path:
                return self._answer({}, 200 if self.headers.get("Authorization") == f"Bearer {TOKEN}" else 403)
            if path.startswith("/api/models/"):
                repo = "/".join(path.split("/")[3:5])
                if repo not in hub.files:
                    return self._answer({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
                entries = [{"rfilename": name} for name in hub.files[repo]]
                if "/tree/" in path:
                    sizes = hub.files[repo].items()
                    return self._answer([{"type": "file", "path": n, "size": len(d), "oid": _sha(d)} for n, d in sizes])
                return self._answer(
                    {"id": repo, "modelId": repo, "sha": COMMIT, "siblings": entries, "tags": [], "private": False}
                )
            repo, resolve, rest = path[1:].partition("/resolve/")
            name = rest.partition("/")[2]
            if not resolve or name not in hub.files.get(repo, {}):
                return self._answer({"error": "Entry not found"}, 404, {"X-Error-Code": "EntryNotFound"})
            data = hub.files[repo][name]
            return self._answer(data, headers={"ETag": f'"{_sha(data)}"', "X-Repo-Commit": COMMIT})

        do_HEAD = do_GET

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.address = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


def _sha(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()
