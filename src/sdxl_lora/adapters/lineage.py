"""What an adapter was made from: enough to find its data, code and params again, and to tell them apart.

The same for the same results: no time, no id of a run. MLflow's run is found by the tag `dvc.train_lora`.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sdxl_lora.config import ModelConfig
from sdxl_lora.runtime.dvc_lock import read_lock
from sdxl_lora.runtime.git import head_commit
from sdxl_lora.storage.repository import file_digest, public_name
from sdxl_lora.storage.safetensors_io import read_header

PREFIX = "sdxl_lora."
WEIGHTS_KEY = f"{PREFIX}weights.sha256"
"""Of a file's own tensors, as they lie in it."""


def lineage(
    model: ModelConfig, weights: Mapping[str, str], source: Path, index: Path, lock: Path
) -> dict[str, str]:
    """Facts about the adapter in words that a file's header can hold; no place on this machine.

    Args:
        weights: SHA-256 of the weights of each of the base model's parts.
        source: where the data came from, the record that download_dataset left.
        index: of the encoded data set: digests of the images, and their captions.
        lock: dvc.lock. Without it, as where a stage is run by hand, what DVC knows is left out.
    """
    record = json.loads(source.read_text(encoding="utf-8"))
    facts = {
        "data.repository": record["repository"],
        "data.revision": record["revision"],
        "data.sha256": file_digest(index),
        "base.repository": public_name(model.base),
        "base.revision": model.revision,
        "git.commit": head_commit(),
    }
    if model.vae is not None:
        facts |= {"vae.repository": public_name(model.vae), "vae.revision": str(model.vae_revision)}
    facts |= {f"{part}.sha256": digest for part, digest in weights.items()}
    if training := read_lock(lock).get("train_lora"):
        facts["dvc.train_lora"] = entry_digest(training)
        facts["params.sha256"] = json_digest(training.get("params"))
    return {f"{PREFIX}{name}": fact for name, fact in facts.items() if fact}


def read_lineage(path: Path) -> dict[str, str]:
    """The facts in an adapter file's header that `lineage` found, without their prefix."""
    header = sorted(read_header(path).items())
    return {key.removeprefix(PREFIX): value for key, value in header if key.startswith(PREFIX)}


def training_digest(lock: Path) -> str:
    """A hash of what DVC knows of the training: code, data, params, and the adapter that came of them."""
    return entry_digest(read_lock(lock).get("train_lora", {}))


def entry_digest(entry: Mapping[str, Any]) -> str:
    """The same of the entry of train_lora in dvc.lock.

    Reports are left out: they hold times, which differ where nothing else does.
    """
    outs = [out for out in entry.get("outs", []) if not out["path"].startswith("data/reports/")]
    return json_digest([entry.get("deps"), entry.get("params"), outs])


def json_digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
