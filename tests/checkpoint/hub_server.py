"""A hub on this machine: folders served as repositories, as much of the real one's API as its client asks for."""

from __future__ import annotations

import hashlib
import json
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
# What the hub says to those who may not see a repository, and of one that there is not.
REFUSALS = {"tests/gated": (403, "GatedRepo"), "tests/missing": (404, "RepoNotFound")}


class HubServer(ThreadingHTTPServer):
    """Serves `root/ORGANISATION/NAME`, and counts what it gives.

    Args:
        root: folder of the repositories.
    """

    def __init__(self, root: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.root = root
        self.sent: dict[str, int] = {}

    @property
    def endpoint(self) -> str:
        """For HF_ENDPOINT."""
        return f"http://127.0.0.1:{self.server_port}"


@contextmanager
def hub_server(root: Path) -> Iterator[HubServer]:
    """A running server, stopped at the end."""
    with HubServer(root) as server:
        thread = Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    server: HubServer

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        parts = urlsplit(self.path).path.strip("/").split("/")
        if parts in (["sent"], ["stop"]):
            if parts == ["stop"]:  # this is the last answer, as without a network
                self.server.socket.shutdown(socket.SHUT_RDWR)  # closed alone, it takes one more connection
                self.server.socket.close()
            self._answer(200, json.dumps(self.server.sent).encode(), {})
            return
        api = parts[:2] == ["api", "models"]
        repository = "/".join(parts[2:4] if api else parts[:2])
        folder = self.server.root / repository
        if repository in REFUSALS or not folder.is_dir():
            status, code = REFUSALS.get(repository, (404, "RepoNotFound"))
            self._answer(status, b"", {"X-Error-Code": code, "X-Error-Message": code})
        elif api:
            listing = self._tree(folder) if "tree" in parts else self._info(repository, folder)
            self._answer(200, json.dumps(listing).encode(), {"Content-Type": "application/json"})
        elif not (file := folder / "/".join(parts[4:])).is_file():
            self._answer(404, b"", {"X-Error-Code": "EntryNotFound"})
        else:
            self._file(file)

    def _info(self, repository: str, folder: Path) -> dict[str, Any]:
        siblings = [{"rfilename": file["path"], "size": file["size"]} for file in self._tree(folder)]
        return {"id": repository, "sha": COMMIT, "siblings": siblings, "private": False, "tags": []}

    def _tree(self, folder: Path) -> list[dict[str, Any]]:
        return [
            {"type": "file", "path": file.name, "size": file.stat().st_size, "oid": _oid(file)}
            for file in sorted(folder.iterdir())
        ]

    def _file(self, file: Path) -> None:
        content = file.read_bytes()
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{_oid(file)}"', "Accept-Ranges": "bytes"}
        wanted = self.headers.get("Range")
        if wanted is None:
            self._answer(200, content, headers)
            return
        first, _, last = wanted.removeprefix("bytes=").partition("-")
        start, stop = int(first), min(int(last or len(content)) + 1, len(content))
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(content)}"
        self._answer(206, content[start:stop], headers)

    def _answer(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            name = Path(urlsplit(self.path).path).name
            if name not in ("sent", "stop"):
                self.server.sent[name] = self.server.sent.get(name, 0) + len(content)
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


def _oid(file: Path) -> str:
    return hashlib.sha1(file.read_bytes()).hexdigest()
