"""Safetensors files that are equal to the byte if their tensors and headers are equal.

safetensors itself writes the header's entries in another order each time, so that DVC would take a result
that was made again for another one.
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

_ALIGNMENT = 8  # bytes: where the format wants its tensors to start
_LENGTH_SIZE = 8  # bytes, little-endian, before the header


def write_tensors(path: Path, tensors: "Mapping[str, Tensor]", header: Mapping[str, str]) -> None:
    """Writes `tensors` with `header` as the file's metadata; `path` never holds half a file."""
    layout, content = _serialised(tensors)
    text = json.dumps(
        {"__metadata__": dict(sorted(header.items())), **layout}, separators=(",", ":")
    ).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    write_bytes(path, len(text).to_bytes(_LENGTH_SIZE, "little") + text + content)


def read_header(path: Path) -> dict[str, str]:
    """The entries that `write_tensors` got as `header`.

    Raises:
        ValueError: the file is something else.
    """
    require_safetensors(path)
    with safe_open(path, "np") as file:  # "pt" would load torch, whatever is read
        return dict(file.metadata() or {})


def content_digest(tensors: "Mapping[str, Tensor]") -> str:
    """SHA-256 of the bytes after a file's header, in hexadecimal."""
    return hashlib.sha256(_serialised(tensors)[1]).hexdigest()


def _serialised(tensors: "Mapping[str, Tensor]") -> tuple[dict[str, object], bytes]:
    """Where each tensor lies in the file's content, and that content."""
    from safetensors.torch import save  # loads torch: seconds, which a header need not wait for

    data = save(dict(tensors))
    start = _LENGTH_SIZE + int.from_bytes(data[:_LENGTH_SIZE], "little")
    return json.loads(data[_LENGTH_SIZE:start]), data[start:]
