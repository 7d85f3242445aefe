"""An adapter's file and its header, without its tensors: importing this loads no model library."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sdxl_lora.storage.atomic_io import require_safetensors
from sdxl_lora.storage.safetensors_io import read_header

WEIGHTS_FILE = "pytorch_lora_weights.safetensors"


def saved_lora(folder: Path) -> Path:
    """Return the path of the file that `save_lora` wrote into `folder`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not a safetensors file.
    """
    path = folder / WEIGHTS_FILE
    if not path.is_file():
        raise FileNotFoundError(f"{path} not found: run `dvc repro train_lora` first")
    require_safetensors(path)
    return path


def peft_header(path: Path) -> dict[str, Any]:
    """Return PEFT's configurations from a file's header, under keys such as `unet.r`."""
    header: dict[str, Any] = json.loads(read_header(path)["lora_adapter_metadata"])
    return header


def split_by_part(entries: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Split keys such as `unet.r` at their first dot."""
    parts: dict[str, dict[str, Any]] = {}
    for key, value in entries.items():
        part, _, rest = key.partition(".")
        parts.setdefault(part, {})[rest] = value
    return parts


def peft_scale(config: Mapping[str, Any]) -> float:
    """Return the factor s of B A that PEFT gives to an adapter with this configuration, from a file's header.

    PEFT computes it on a layer of the `meta` device, because options such as `use_rslora` change the formula.
    Imports PEFT, which takes seconds.
    """
    from peft import LoraConfig, inject_adapter_in_model
    from torch import nn

    probe = nn.Sequential(nn.Linear(1, 1, device="meta"))
    options = {**config, "target_modules": ["0"], "layers_to_transform": None, "layers_pattern": None}
    inject_adapter_in_model(LoraConfig(**options), probe, "probe", low_cpu_mem_usage=True)
    layer: Any = probe[0]
    return float(layer.scaling["probe"])
