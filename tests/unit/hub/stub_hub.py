"""A hub of a few files on 127.0.0.1, as far as huggingface_hub asks."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class StubHub(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, files: Mapping[str, bytes], refuse: Mapping[str, tuple[int, str]]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files, self.refuse = files, refuse
        self.asked: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: StubHub

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        self.server.asked.append(f"{self.command} {path}")
        for prefix, (status, code) in self.server.refuse.items():
            if prefix in path:
                return self._send(status, b"{}", {"X-Error-Code": code, "X-Error-Message": code})
        if path.startswith("/api/models/") and "/tree/" in path:
            return self._json([_entry(name, data) for name, data in self.server.files.items()])
        if path.startswith("/api/models/"):
            siblings = [{"rfilename": name} for name in self.server.files]
            return self._json({"id": "org/name", "modelId": "org/name", "sha": COMMIT, "siblings": siblings})
        return self._file(self.server.files[path.split("/resolve/")[1].partition("/")[2]])

    def _file(self, data: bytes) -> None:
        self._send(200, data, {"X-Repo-Commit": COMMIT, "ETag": f'"{hashlib.sha1(data).hexdigest()}"'})

    def _json(self, tree: object) -> None:
        self._send(200, json.dumps(tree).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, body: bytes, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


def _entry(name: str, data: bytes) -> dict[str, object]:
    return {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}


@contextmanager
def serving(
    files: Mapping[str, bytes], refuse: Mapping[str, tuple[int, str]] | None = None
) -> Iterator[StubHub]:
    hub = StubHub(files, refuse or {})
    thread = Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()
