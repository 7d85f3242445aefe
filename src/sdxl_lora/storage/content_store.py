"""A content-addressed store: tensors under the hash of everything that they were made from.

An entry is a file written whole or not at all, and checked when it is read. Whatever is missing or damaged
can be made again, so the store may be deleted at any time, shared by processes, and left by them half way.
"""

import hashlib
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from sdxl_lora.storage.atomic_io import write_bytes

DIGEST_BYTES = hashlib.sha256().digest_size
UNUSED_SECONDS = 30 * 24 * 3600


def content_key(kind: str, **parts: object) -> str:
    """`kind/` and the hash of `parts`: equal parts, equal key; any other part, another key.

    Args:
        kind: what the entry is, a folder of the store.
        parts: strings, numbers, and lists and mappings of them.
    """
    text = json.dumps(parts, sort_keys=True, ensure_ascii=True)
    return f"{kind}/{hashlib.sha256(text.encode()).hexdigest()}"


class ContentStore:
    """Entries below a folder, which is made when the first one is put into it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __contains__(self, key: str) -> bool:
        """Whether there is such an entry; only `get` tells whether it is whole."""
        return self._path(key).is_file()

    def put(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        """Writes an entry. Of two processes that put the same one, either may win: they are equal."""
        payload = safetensors.torch.save({name: tensor.contiguous() for name, tensor in tensors.items()})
        write_bytes(self._path(key), hashlib.sha256(payload).digest() + payload)

    def get(self, key: str) -> dict[str, Tensor] | None:
        """An entry's tensors; None if there is none, or if its bytes are not those that were put there."""
        path = self._path(key)
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            return None
        digest, payload = content[:DIGEST_BYTES], content[DIGEST_BYTES:]
        if hashlib.sha256(payload).digest() != digest:
            path.unlink(missing_ok=True)
            return None
        os.utime(path)
        try:
            tensors: dict[str, Tensor] = safetensors.torch.load(payload)
        except SafetensorError:
            path.unlink(missing_ok=True)
            return None
        return tensors

    def prune(self) -> None:
        """Deletes what nobody has read for 30 days, and what killed processes left half written."""
        oldest = time.time() - UNUSED_SECONDS
        for path in self._folder.glob("*/*/*"):
            if path.stat().st_mtime < oldest:
                path.unlink(missing_ok=True)

    def _path(self, key: str) -> Path:
        kind, _, digest = key.partition("/")
        return self._folder / kind / digest[:2] / digest
