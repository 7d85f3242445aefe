"""An adapter's file and its header, without its tensors: for those, no model library is loaded."""

import json
from pathlib import Path
from typing import Any

from sdxl_lora.storage.atomic_io import require_safetensors
from sdxl_lora.storage.safetensors_io import read_header

WEIGHTS_FILE = "pytorch_lora_weights.safetensors"


def saved_lora(folder: Path) -> Path:
    """The file that `save_lora` wrote into `folder`.

    Raises:
        FileNotFoundError: it did not.
        ValueError: it is something else.
    """
    path = folder / WEIGHTS_FILE
    if not path.is_file():
        raise FileNotFoundError(f"{path} not found: run `dvc repro train_lora` first")
    require_safetensors(path)
    return path


def peft_header(path: Path) -> dict[str, Any]:
    """PEFT's configurations in a file's header, under keys such as `unet.r`."""
    header: dict[str, Any] = json.loads(read_header(path)["lora_adapter_metadata"])
    return header


def split_by_part(entries: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Splits keys such as `unet.r` at their first dot."""
    parts: dict[str, dict[str, Any]] = {}
    for key, value in entries.items():
        part, _, rest = key.partition(".")
        parts.setdefault(part, {})[rest] = value
    return parts
