"""The lineage of an adapter: what identifies its data, code, params and base model.

Equal for equal results: it has no time and no id of a run. MLflow's run is found by the tag `dvc.train_lora`.
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
"""Digest of the tensors in the same file."""


def lineage(
    model: ModelConfig, weights: Mapping[str, str], source: Path, index: Path, lock: Path
) -> dict[str, str]:
    """Return the lineage as entries of a file's header. No path of this machine is among them.

    Args:
        model: the base model.
        weights: SHA-256 of the weights of each of the base model's parts.
        source: the record of the data's source that download_dataset writes.
        index: that of the encoded data set: digests of the images, and their captions.
        lock: dvc.lock. If it is missing, as when a stage runs without DVC, its entries are left out.
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
    """Return the entries of `lineage` in an adapter file's header, without their prefix."""
    header = sorted(read_header(path).items())
    return {key.removeprefix(PREFIX): value for key, value in header if key.startswith(PREFIX)}


def training_digest(lock: Path) -> str:
    """Return a hash of DVC's record of the training: code, data, params, and the resulting adapter."""
    return entry_digest(read_lock(lock).get("train_lora", {}))


def entry_digest(entry: Mapping[str, Any]) -> str:
    """Return the hash for the entry of train_lora in dvc.lock.

    Reports are left out: they contain times, which differ between runs with equal results.
    """
    outs = [out for out in entry.get("outs", []) if not out["path"].startswith("data/reports/")]
    return json_digest([entry.get("deps"), entry.get("params"), outs])


def json_digest(value: object) -> str:
    """Return the SHA-256 of a value's JSON with sorted keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
