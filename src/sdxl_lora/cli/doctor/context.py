"""The context of the doctor's checks: params and device, and what several checks need, computed once."""

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from math import inf
from pathlib import Path
from tempfile import mkdtemp

import torch

from sdxl_lora.cli.doctor.dry_run import DryRun
from sdxl_lora.config import Params, TrainingConfig
from sdxl_lora.memory.planner import ForecastPlan, Planner, refusal
from sdxl_lora.memory.training_trace import TrainingSpec
from sdxl_lora.models.architecture import SDXLArchitecture, read_architecture
from sdxl_lora.models.weights import local_models
from sdxl_lora.reproducibility.checklist import Check
from sdxl_lora.storage.atomic_io import GIB


class CheckSkippedError(Exception):
    """Raised by a check that needs something whose absence another check reports; says what is missing."""


@dataclass(frozen=True)
class RunContext:
    """A recipe on a machine."""

    params: Params
    device: torch.device

    @property
    def has_its_gpu(self) -> bool:
        """Whether the device is a GPU, or the recipe does not need one."""
        return self.device.type == "cuda" or self.params.training.vram_gib is None

    @cached_property
    def models(self) -> dict[str, Path | None]:
        """Local copies of the base model and its VAE, by params key; None: missing or incomplete."""
        return local_models(self.params.model)

    def require_models(self) -> None:
        """Raise CheckSkippedError unless all models are in the local cache and a suitable device exists."""
        if not self.has_its_gpu:
            raise CheckSkippedError("there is no GPU, and this recipe needs one")
        if missing := [key for key, folder in self.models.items() if folder is None]:
            raise CheckSkippedError(f"{', '.join(missing)} is not downloaded yet")

    @cached_property
    def shapes(self) -> SDXLArchitecture:
        return read_architecture(self.params.model)

    @cached_property
    def spec(self) -> TrainingSpec:
        """The training that the params describe."""
        side = self.params.encoding.resolution // self.shapes.pixels_per_latent
        trained = self.params.model.text_encoders != "frozen"
        size = torch.Size((1, 4, side, side))
        return TrainingSpec(self.shapes, trained, self.params.lora, self.params.training, size)

    @cached_property
    def plan(self) -> ForecastPlan:
        """The fastest plan within training.vram_gib, with its forecast.

        Raises:
            ValueError: no plan fits.
        """
        budget, planner = self.params.training.vram_gib, Planner(self.spec)
        plan = planner.fastest(inf if budget is None else budget * GIB)
        if plan is None:
            raise ValueError(refusal(self.spec, planner.smallest()))
        return plan

    @property
    def config(self) -> TrainingConfig:
        """The section `training` with `auto` replaced by what the plan selects."""
        return self.plan.applied_to(self.params.training)

    @cached_property
    def dry_run(self) -> DryRun:
        """The model with adapters, loaded and ready for training on noise."""
        self.require_models()
        if self.device.type == "cuda":
            self.limit_memory(self.params.training.vram_gib)
        return DryRun(self.params, self.spec, self.config, self.plan.checkpointed, self.device)

    def release_model(self) -> None:
        """Free the memory of the dry run's model for the checks after it."""
        vars(self).pop("dry_run", None)  # where cached_property keeps it
        if self.device.type == "cuda":
            self.limit_memory(None)

    def limit_memory(self, vram_gib: float | None) -> None:
        """Limit PyTorch's GPU memory as the stage does; None: no limit. Free the cached memory first."""
        total = torch.cuda.get_device_properties(self.device).total_memory
        share = 1.0 if vram_gib is None else min(1.0, vram_gib * GIB / total)
        torch.cuda.set_per_process_memory_fraction(share, self.device)
        torch.cuda.empty_cache()

    @cached_property
    def folder(self) -> Path:
        """A folder for files of the dry run, on the disk that stages write to; `cleanup` deletes it."""
        scratch = Path(".dvc/tmp")
        scratch.mkdir(parents=True, exist_ok=True)
        return Path(mkdtemp(prefix="doctor-", dir=scratch))

    def cleanup(self) -> None:
        """Delete the files of the dry run."""
        if "folder" in vars(self):
            shutil.rmtree(self.folder, ignore_errors=True)


CheckFunction = Callable[[RunContext], Iterator[Check]]
