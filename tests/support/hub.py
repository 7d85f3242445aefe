"""A Hub of the tests' own: serves folders over HTTP on the loopback, as far as the Hub's clients ask.

Each repository has one commit, on branch `main`. It answers info, tree and file requests, and can be told to
fail. Files are served plainly, with their git blob hash as ETag; Xet is not offered, so clients do without.
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import unquote, urlsplit

from tests.support.patience import patience

RETRIES_END = {"Retry-After": "0"}
REQUEST_TIMEOUT = patience(5)  # seconds


@dataclass(frozen=True)
class Repository:
    """A folder under a name, `owner/name`, as the Hub shows it."""

    kind: str
    """`models` or `datasets`."""
    name: str
    folder: Path

    @cached_property
    def files(self) -> dict[str, bytes]:
        paths = sorted(path for path in self.folder.rglob("*") if path.is_file())
        return {path.relative_to(self.folder).as_posix(): path.read_bytes() for path in paths}

    @cached_property
    def commit(self) -> str:
        content = [f"{name} {blob_hash(data)}" for name, data in self.files.items()]
        return hashlib.sha1(f"{self.name} {content}".encode()).hexdigest()

    def tree(self) -> list[dict[str, Any]]:
        return [
            {"type": "file", "path": name, "size": len(data), "oid": blob_hash(data)}
            for name, data in self.files.items()
        ]

    def info(self) -> dict[str, Any]:
        siblings = [{"rfilename": name} for name in self.files]
        return {"id": self.name, "sha": self.commit, "private": False, "tags": [], "siblings": siblings}


@dataclass
class Hub:
    """What the server serves and what it was asked for."""

    endpoint: str = ""
    repositories: dict[tuple[str, str], Repository] = field(default_factory=dict)
    failures: dict[str, tuple[int, dict[str, str]]] = field(default_factory=dict)
    """Status and headers of every answer about a repository, by its name."""
    requests: list[str] = field(default_factory=list)
    """Method and path, such as `GET /owner/name/resolve/main/config.json`."""

    def add(self, name: str, folder: Path, kind: str = "models") -> Repository:
        repository = self.repositories[kind, name] = Repository(kind, name, folder)
        return repository

    def fail(self, name: str, status: int, code: str = "", message: str = "") -> None:
        self.failures[name] = (status, {"X-Error-Code": code, "X-Error-Message": message})

    def downloads(self) -> list[str]:
        """`owner/name/path` of each file whose content was asked for."""
        files = []
        for request in self.requests:
            method, _, path = request.partition(" ")
            name, found, rest = path.removeprefix("/datasets").strip("/").partition("/resolve/")
            if method == "GET" and found:
                files.append(f"{name}/{rest.partition('/')[2]}")
        return files


class Handler(BaseHTTPRequestHandler):
    """One request of a client."""

    protocol_version = "HTTP/1.1"
    timeout = REQUEST_TIMEOUT

    def __init__(self, hub: Hub, *arguments: Any) -> None:
        self.hub = hub
        super().__init__(*arguments)

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def do_POST(self) -> None:
        self.receive()

    def do_PUT(self) -> None:
        self.receive()

    def receive(self) -> None:
        """Takes nothing."""
        self.reply(405)

    def log_message(self, format: str, *values: Any) -> None:
        """Keeps quiet: `Hub.requests` has it all."""

    def answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        parts = path.strip("/").split("/")
        is_api = parts[0] == "api"
        parts = parts[1:] if is_api else parts
        kind = parts[0] if parts[0] in ("models", "datasets") else "models"
        parts = parts[1:] if parts[0] in ("models", "datasets") else parts
        name, rest = "/".join(parts[:2]), parts[2:]
        repository = self.hub.repositories.get((kind, name))
        if name in self.hub.failures:
            status, headers = self.hub.failures[name]
            self.reply(status, headers=headers)
        elif repository is None:
            self.reply(404, headers={"X-Error-Code": "RepoNotFound"})
        elif len(rest) > 1 and rest[1] not in ("main", repository.commit):
            self.reply(404, headers={"X-Error-Code": "RevisionNotFound"})
        elif is_api and rest[:1] == ["tree"]:
            self.reply_json(repository.tree())
        elif is_api and rest[:1] in ([], ["revision"]):
            self.reply_json(repository.info())
        elif rest[:1] == ["resolve"]:
            self.reply_file(repository, "/".join(rest[2:]))
        else:
            self.reply(404, headers={"X-Error-Code": "EntryNotFound"})

    def reply_json(self, body: object) -> None:
        self.reply(200, json.dumps(body).encode(), {"Content-Type": "application/json"})

    def reply_file(self, repository: Repository, name: str) -> None:
        headers = {"X-Repo-Commit": repository.commit}
        if name not in repository.files:
            self.reply(404, headers={"X-Error-Code": "EntryNotFound", **headers})
            return
        data = repository.files[name]
        headers |= {"ETag": f'"{blob_hash(data)}"', "Accept-Ranges": "bytes"}
        wanted = self.headers.get("Range")
        if wanted is None:
            self.reply(200, data, headers)
            return
        first, _, last = wanted.removeprefix("bytes=").partition("-")
        start, stop = int(first), min(int(last) + 1 if last else len(data), len(data))
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(data)}"
        self.reply(206, data[start:stop], headers)

    def reply(self, status: int, body: bytes = b"", headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {**RETRIES_END, **(headers or {}), "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def blob_hash(data: bytes) -> str:
    """Git's name for a file's content."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@contextmanager
def serving_hub(handler: Callable[..., Handler] = Handler) -> Iterator[Hub]:
    """A Hub on a free port of the loopback, for as long as the block runs."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, hub))
    server.daemon_threads = True
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join(timeout=REQUEST_TIMEOUT)
