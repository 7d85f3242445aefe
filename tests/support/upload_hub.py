"""The tests' own Hub, as far as uploads go: repositories are made, large files sent apart, commits taken.

Files named like the large ones of the real Hub go through Git LFS's batch API; the rest lies in the commit.
"""

import base64
import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from tests.support.hub import Handler

LARGE = (".safetensors", ".png")
TOKEN = "hf_a_secret_of_the_tests"


@dataclass(frozen=True)
class Uploads:
    """What clients have written."""

    folder: Path
    """Where repositories are kept."""
    private: dict[str, bool] = field(default_factory=dict)
    """Visibility of each new repository, by name."""
    large: dict[str, bytes] = field(default_factory=dict)
    """Large files by their SHA-256."""


class UploadHandler(Handler):
    """One request of a client that may write if it shows TOKEN."""

    def __init__(self, uploads: Uploads, *arguments: Any) -> None:
        self.uploads = uploads
        super().__init__(*arguments)

    def receive(self) -> None:
        path = unquote(urlsplit(self.path).path).strip("/")
        self.hub.requests.append(f"{self.command} /{path}")
        content = self.rfile.read(int(self.headers["Content-Length"]))
        if self.command == "PUT":  # its address is the permission
            self.keep(path.rpartition("/")[2], content)
        elif self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self.reply(401)
        elif path == "api/repos/create":
            self.create(json.loads(content))
        elif path == "api/validate-yaml":
            assert "library_name: diffusers" in json.loads(content)["content"]
            self.reply_json({"errors": [], "warnings": []})
        elif path.endswith("/info/lfs/objects/batch"):
            self.reply_json({"objects": [self.destination(item) for item in json.loads(content)["objects"]]})
        elif "/preupload/" in path:
            self.reply_json({"files": [upload_mode(file["path"]) for file in json.loads(content)["files"]]})
        elif "/commit/" in path:
            name = "/".join(path.split("/")[2:4])
            self.commit(name, [json.loads(line) for line in content.splitlines()])
        else:
            self.reply(404)

    def keep(self, oid: str, content: bytes) -> None:
        assert hashlib.sha256(content).hexdigest() == oid
        self.uploads.large[oid] = content
        self.reply(200)

    def create(self, asked: dict[str, Any]) -> None:
        name = f"{asked['organization']}/{asked['name']}"
        address = {"url": f"{self.hub.endpoint}/{name}"}
        if ("models", name) in self.hub.repositories:
            self.reply(409, json.dumps(address).encode(), {"Content-Type": "application/json"})
            return
        self.uploads.private[name] = asked.get("visibility") == "private"
        (self.uploads.folder / name).mkdir(parents=True)
        self.hub.add(name, self.uploads.folder / name)
        self.reply_json(address)

    def destination(self, item: dict[str, Any]) -> dict[str, Any]:
        return {**item, "actions": {"upload": {"href": f"{self.hub.endpoint}/large/{item['oid']}"}}}

    def commit(self, name: str, lines: list[dict[str, Any]]) -> None:
        for line in lines:
            value = line["value"]
            match line["key"]:
                case "file":
                    write(self.uploads.folder / name / value["path"], base64.b64decode(value["content"]))
                case "lfsFile":
                    write(self.uploads.folder / name / value["path"], self.uploads.large[value["oid"]])
                case "deletedFile":
                    (self.uploads.folder / name / value["path"]).unlink()
        commit = self.hub.add(name, self.uploads.folder / name).commit
        self.reply_json({"commitUrl": f"{self.hub.endpoint}/{name}/commit/{commit}", "commitOid": commit})


def upload_mode(path: str) -> dict[str, object]:
    mode = "lfs" if path.endswith(LARGE) else "regular"
    return {"path": path, "uploadMode": mode, "shouldIgnore": False}


def write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
