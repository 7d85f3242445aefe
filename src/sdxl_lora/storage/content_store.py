"""A content-addressed store: tensors under the hash of everything that they were computed from.

Entries are written atomically and verified when read. A missing or damaged entry is computed again, so the
store may be deleted at any time, shared by processes, and abandoned by a killed one.
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
    """Return `kind/` and the SHA-256 of `parts`: equal parts give equal keys, different parts different ones.

    Args:
        kind: kind of the entry, a folder of the store.
        parts: strings, numbers, and lists and mappings of them.
    """
    text = json.dumps(parts, sort_keys=True, ensure_ascii=True)
    return f"{kind}/{hashlib.sha256(text.encode()).hexdigest()}"


class ContentStore:
    """Entries below a folder, which is created with the first entry."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __contains__(self, key: str) -> bool:
        """Return whether the entry exists; only `get` checks its content."""
        return self._path(key).is_file()

    def put(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        """Write an entry. If two processes write the same key, either may win: their contents are equal."""
        payload = safetensors.torch.save({name: tensor.contiguous() for name, tensor in tensors.items()})
        write_bytes(self._path(key), hashlib.sha256(payload).digest() + payload)

    def get(self, key: str) -> dict[str, Tensor] | None:
        """Return an entry's tensors; None if it is missing, or damaged, in which case it is deleted."""
        path = self._path(key)
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            return None
        digest, payload = content[:DIGEST_BYTES], content[DIGEST_BYTES:]
        if hashlib.sha256(payload).digest() != digest:
            path.unlink(missing_ok=True)
            return None
        os.utime(path)  # `prune` goes by the time of the last read, which file systems may not record
        try:
            tensors: dict[str, Tensor] = safetensors.torch.load(payload)
        except SafetensorError:
            path.unlink(missing_ok=True)
            return None
        return tensors

    def prune(self) -> None:
        """Delete entries that were not read for 30 days, and temporary files of killed processes."""
        oldest = time.time() - UNUSED_SECONDS
        for path in self._folder.glob("*/*/*"):
            if path.stat().st_mtime < oldest:
                path.unlink(missing_ok=True)

    def _path(self, key: str) -> Path:
        kind, _, digest = key.partition("/")
        return self._folder / kind / digest[:2] / digest
