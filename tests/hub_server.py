"""A small server that speaks as much of the Hub's protocol as a download needs, on 127.0.0.1."""

from __future__ import annotations

import hashlib
import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "hf_test"


@dataclass
class FakeHub:
    """Serves one folder as the repository `repo_id`; keeps what was asked for.

    `breaks` counts down: that many transfers of the `broken` file end half way. `down`: every connection ends without
    an answer. `gated`: files need the token. `private`: everything does.
    """

    folder: Path
    repo_id: str = "owner/tiny-bagel"
    broken: str = ""
    breaks: int = 0
    down: bool = False
    gated: bool = False
    private: bool = False
    asked: list[tuple[str, str, str | None]] = field(default_factory=list)

    def __enter__(self) -> FakeHub:
        hub = self

        class Handler(_Handler):
            state = hub

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01})
        self.thread.start()
        return self

    def __exit__(self, *error) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_address[1]}"

    def names(self) -> list[str]:
        return sorted(str(path.relative_to(self.folder)) for path in self.folder.rglob("*") if path.is_file())

    def fetched(self) -> list[str]:
        """Names of the files whose content was asked for."""
        return [
            path.partition(f"/resolve/{COMMIT}/")[2]
            for method, path, _ in self.asked
            if method == "GET" and "resolve" in path
        ]

    def ranges(self, name: str) -> list[str | None]:
        """Range headers of the requests for a file's content."""
        return [asked for method, path, asked in self.asked if method == "GET" and path.endswith(f"/{name}")]


class _Handler(BaseHTTPRequestHandler):
    state: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, format, *args) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer("HEAD")

    def do_GET(self) -> None:
        self._answer("GET")

    def _answer(self, method: str) -> None:
        hub, path = self.state, urlsplit(self.path).path
        hub.asked.append((method, path, self.headers.get("Range")))
        if hub.down:
            self.close_connection = True
            return
        known = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        api = f"/api/models/{hub.repo_id}"
        files = f"/{hub.repo_id}/resolve/"
        if not path.startswith((api, files)) or (hub.private and not known):
            self._refuse(401, "RepoNotFound")
        elif path.startswith(api):
            self._describe(path.removeprefix(api))
        elif hub.gated and not known:
            self._refuse(403, "GatedRepo")
        else:
            revision, _, name = path.removeprefix(files).partition("/")
            self._serve(method, revision, name)

    def _refuse(self, status: int, code: str) -> None:
        self._send(status, b"{}", {"X-Error-Code": code, "Content-Type": "application/json"})

    def _describe(self, rest: str) -> None:
        parts = rest.strip("/").split("/")
        if len(parts) > 1 and parts[1] not in ("main", COMMIT):
            self._refuse(404, "RevisionNotFound")
            return
        files = [(name, (self.state.folder / name).read_bytes()) for name in self.state.names()]
        answer: object
        if parts[0] == "tree":
            answer = [self._entry(name, content) for name, content in files]
        else:
            siblings = [{"rfilename": name, "size": len(content), "blobId": "0" * 40} for name, content in files]
            answer = {"id": self.state.repo_id, "sha": COMMIT, "private": False, "siblings": siblings}
        self._send(200, json.dumps(answer).encode(), {"Content-Type": "application/json"})

    @staticmethod
    def _entry(name: str, content: bytes) -> dict:
        entry = {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
        if name.endswith(".safetensors"):
            entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}
        return entry

    def _serve(self, method: str, revision: str, name: str) -> None:
        file = self.state.folder / name
        if revision not in ("main", COMMIT) or not file.is_file():
            self._refuse(404, "EntryNotFound")
            return
        content = file.read_bytes()
        digest = hashlib.sha256 if name.endswith(".safetensors") else hashlib.sha1
        headers = {"ETag": f'"{digest(content).hexdigest()}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        asked = self.headers.get("Range")
        if asked:
            first = int(asked.removeprefix("bytes=").partition("-")[0])
            headers["Content-Range"] = f"bytes {first}-{len(content) - 1}/{len(content)}"
            content = content[first:]
        breaks = method == "GET" and name == self.state.broken and self.state.breaks > 0
        if breaks:
            self.state.breaks -= 1
        self._send(206 if asked else 200, content, headers, half=breaks)

    def _send(self, status: int, content: bytes, headers: dict[str, str], *, half: bool = False) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[: len(content) // 2] if half else content)
        if half:
            self.close_connection = True
