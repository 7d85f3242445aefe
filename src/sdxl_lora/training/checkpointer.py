"""Checkpoints of a training: the state after a step, in files that are complete or absent.

Each training has its folder, named by a hash of everything that its result depends on, so that no other
training resumes from it. Independent of model and loop: the caller passes tensors.
"""

import hashlib
import logging
import os
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors.torch import load, save
from torch import Tensor

from sdxl_lora.config import LoraConfig, ModelConfig, TrainingConfig
from sdxl_lora.models.weights import open_base
from sdxl_lora.runtime.device import compute_fingerprint
from sdxl_lora.runtime.distributed import distributed_state
from sdxl_lora.runtime.import_closure import INERT, code_digest, import_closure
from sdxl_lora.storage.atomic_io import PARTIAL_GLOB, write_bytes
from sdxl_lora.storage.content_store import UNUSED_SECONDS, content_key
from sdxl_lora.storage.repository import file_digest
from sdxl_lora.storage.safetensors_io import read_header

_KEPT_CHECKPOINTS = 2  # if the newest one is damaged, the one before it serves
_INERT_KEYS = {
    "checkpoint_minutes",
    "deadline_minutes",
    "log_every",
}  # these cannot change a training's result
_INERT_CODE = {
    **INERT,
    "sdxl_lora.memory": "chooses micro-batch size and checkpointed blocks, both in the key",
    "sdxl_lora.storage.hub_client": "downloads the base model, whose commit or digest is in the key",
    "sdxl_lora.training.nonfinite_dump": "writes down why training failed",
}
"""Modules and packages that cannot change what the rest of a training comes to, and why."""
_KEYED_LIBRARIES = ("bitsandbytes", "diffusers", "peft", "torch", "transformers")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checkpoint:
    """The state of a training after a step."""

    tensors: dict[str, Tensor]
    """On the CPU."""
    facts: dict[str, str]
    """What else was saved."""


class Checkpointer:
    """The checkpoints of one training, in a folder that is created when the first one is saved."""

    def __init__(self, folder: Path, minutes: float | None) -> None:
        """Create nothing yet.

        Args:
            folder: of this training alone.
            minutes: wall time between two checkpoints; None: no checkpoint is ever due.
        """
        self.folder = folder
        self._minutes = minutes
        self._saved = time.monotonic()

    def is_empty(self) -> bool:
        """Return whether no checkpoint has been saved."""
        return not self._files()

    def others(self) -> list[Path]:
        """Return the folders of other trainings that were stopped: with other params, data, code or GPU."""
        return [folder for folder in self.folder.parent.glob("*") if folder != self.folder]

    def are_due(self) -> bool:
        """Return whether it is time for the next one."""
        return self._minutes is not None and time.monotonic() - self._saved >= 60 * self._minutes

    def save(self, step: int, tensors: Mapping[str, Tensor], facts: Mapping[str, str]) -> None:
        """Write the checkpoint of `step`, and delete all but the newest two.

        A file's name holds the hash of its content, and it gets this name once all of it is on the disk. So
        neither a killed process nor a power failure leaves a file that looks like a checkpoint.

        Raises:
            OSError: it could not be written, for example for lack of space. The earlier ones are kept.
        """
        # Copies also on the CPU: the tensors are the trainer's, and the next step changes them.
        copies = {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}
        content = save(copies, dict(facts))
        path = self.folder / f"step-{step:08d}-{_content_digest(content)}.safetensors"
        write_bytes(path, content, durable=True)
        for old in self._files()[_KEPT_CHECKPOINTS:]:
            old.unlink()
        self._saved = time.monotonic()

    def newest(self) -> Checkpoint | None:
        """Return the newest undamaged checkpoint; None if there is none. To be called before any save."""
        for leftover in self.folder.glob(PARTIAL_GLOB):
            leftover.unlink(missing_ok=True)  # of a process that was killed while it saved
        for path in self._files():
            content = path.read_bytes()
            if path.stem.endswith(f"-{_content_digest(content)}"):
                facts = read_header(path)  # raises for a file that is not safetensors
                return Checkpoint(load(content), facts)
            logger.warning("%s is damaged: falling back to the checkpoint before it", path.name)
        return None

    def delete(self) -> None:
        """Delete all of them, and those of other trainings that have not been resumed for 30 days."""
        shutil.rmtree(self.folder, ignore_errors=True)
        oldest = time.time() - UNUSED_SECONDS
        for other in self.folder.parent.glob("*"):
            if other.stat().st_mtime < oldest:
                shutil.rmtree(other, ignore_errors=True)

    def _files(self) -> list[Path]:
        """Return the files, newest first: the names sort by step."""
        return sorted(self.folder.glob("step-*.safetensors"), reverse=True)


def training_key(
    seed: int, lora: LoraConfig, model: ModelConfig, config: TrainingConfig, data: Path, device: torch.device
) -> str:
    """Return a key for this training. Trainings with equal keys have bit-identical results.

    Args:
        config: as it will be used, without `auto`.
        data: index of the encoded data set, which holds a digest of each example.
    """
    return content_key(
        "train_lora",
        seed=seed,
        lora=lora.model_dump(mode="json"),
        model=model.model_dump(mode="json"),
        base=open_base(model).name,  # the commit, where the revision is a branch
        training=config.model_dump(mode="json", exclude=_INERT_KEYS),
        accumulation=config.accumulation,  # computed by config.py, whose code is not in the key
        data=file_digest(data),
        # From the stage, which puts the parts together. A module that it imports in future is keyed by that.
        code=code_digest(import_closure("stages.train_lora", without=_INERT_CODE.keys())),
        libraries={library: version(library) for library in _KEYED_LIBRARIES},
        machine=compute_fingerprint(device),
        cublas=os.environ.get("CUBLAS_WORKSPACE_CONFIG"),  # its sums depend on the workspace
        processes=distributed_state().num_processes,
    )


def _content_digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
