"""Safetensors files that are byte-identical if their tensors and metadata are equal.

`safetensors.torch.save_file(metadata=...)` writes the metadata in a random order, the iteration order of a
Rust HashMap: 20 saves of the same content gave 20 different files with 0.8.0. DVC would take each for a new
result. Upstream: https://github.com/safetensors/safetensors/issues/584, pull request #790. Without metadata
its output is deterministic, which `_serialize` relies on.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import safe_open

from sdxl_lora.storage.atomic_io import require_safetensors, write_bytes

if TYPE_CHECKING:
    from torch import Tensor

_ALIGNMENT = 8  # bytes; the format requires tensors to start at a multiple of it
_LENGTH_SIZE = 8  # bytes, little-endian, before the header


def write_tensors(path: Path, tensors: "Mapping[str, Tensor]", header: Mapping[str, str]) -> None:
    """Write `tensors` with `header` as the file's metadata, atomically and deterministically."""
    layout, content = _serialize(tensors)
    text = json.dumps(
        {"__metadata__": dict(sorted(header.items())), **layout}, separators=(",", ":")
    ).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    write_bytes(path, len(text).to_bytes(_LENGTH_SIZE, "little") + text + content)


def read_header(path: Path) -> dict[str, str]:
    """Return the file's metadata, which `write_tensors` calls `header`.

    Raises:
        ValueError: the file is not a safetensors file.
    """
    require_safetensors(path)
    with safe_open(path, "np") as file:  # "pt" would load torch, whatever is read
        return dict(file.metadata() or {})


def content_digest(tensors: "Mapping[str, Tensor]") -> str:
    """Return the SHA-256 of the bytes after a file's header, in hexadecimal."""
    return hashlib.sha256(_serialize(tensors)[1]).hexdigest()


def _serialize(tensors: "Mapping[str, Tensor]") -> tuple[dict[str, object], bytes]:
    """Return the header's entry of each tensor (dtype, shape, offsets) and the bytes after the header."""
    from safetensors.torch import save  # loads torch: seconds that reading a header need not wait for

    data = save(dict(tensors))
    start = _LENGTH_SIZE + int.from_bytes(data[:_LENGTH_SIZE], "little")
    return json.loads(data[_LENGTH_SIZE:start]), data[start:]
