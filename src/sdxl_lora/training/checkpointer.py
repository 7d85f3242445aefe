"""Checkpoints of a training: what it takes to go on from a step, in files that are whole or not there.

Each training has a folder of its own, named after everything that its result depends on, so that no other
can go on from what lies there. Knows no model and no loop: it is given tensors. (`checkpointing` is about
activations.)
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

_KEPT_CHECKPOINTS = 2  # a newest one that turns out to be damaged is not the end
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
    """The checkpoints of one training, in a folder that is made when the first one is saved."""

    def __init__(self, folder: Path, minutes: float | None) -> None:
        """Knows the folder.

        Args:
            folder: of this training alone.
            minutes: wall time between two checkpoints; None: none is ever due.
        """
        self.folder = folder
        self._minutes = minutes
        self._saved = time.monotonic()

    def are_due(self) -> bool:
        """Whether it is time for the next one."""
        return self._minutes is not None and time.monotonic() - self._saved >= 60 * self._minutes

    def save(self, step: int, tensors: Mapping[str, Tensor], facts: Mapping[str, str]) -> None:
        """Writes the checkpoint of `step`; all but the newest two go.

        A file's name holds the hash of its content, and it gets the name when all of it is on the disk. So
        neither a killed process nor a power failure leaves something that passes for a checkpoint.

        Raises:
            OSError: it could not be written, for lack of space say; the ones before are still there.
        """
        copies = {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}
        content = save(copies, dict(facts))
        path = self.folder / f"step-{step:08d}-{digest(content)}.safetensors"
        write_bytes(path, content, durable=True)
        for old in self._files()[_KEPT_CHECKPOINTS:]:
            old.unlink()
        self._saved = time.monotonic()

    def newest(self) -> Checkpoint | None:
        """The newest checkpoint that is as it was written; None if there is none. To ask before any save."""
        for leftover in self.folder.glob(PARTIAL_GLOB):
            leftover.unlink(missing_ok=True)  # of a process that was killed while it saved
        for path in self._files():
            content = path.read_bytes()
            if path.stem.endswith(f"-{digest(content)}"):
                facts = read_header(path)  # which refuses a file that is something else
                return Checkpoint(load(content), facts)
            logger.warning("%s is damaged: falling back to the checkpoint before it", path.name)
        return None

    def delete(self) -> None:
        """Deletes all of them, and those of other trainings that nobody has gone on with for 30 days."""
        shutil.rmtree(self.folder, ignore_errors=True)
        oldest = time.time() - UNUSED_SECONDS
        for other in self.folder.parent.glob("*"):
            if other.stat().st_mtime < oldest:
                shutil.rmtree(other, ignore_errors=True)

    def _files(self) -> list[Path]:
        """Newest first; names sort as steps do."""
        return sorted(self.folder.glob("step-*.safetensors"), reverse=True)


def training_key(
    seed: int, lora: LoraConfig, model: ModelConfig, config: TrainingConfig, data: Path, device: torch.device
) -> str:
    """A name for the training that all this makes: equal to the bit for equal names.

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


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
