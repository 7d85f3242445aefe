"""What the doctor looks at: params and device, and what is found out about them once for several checks."""

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
    """A check cannot be made, since something that another check is about is not there; says what."""


@dataclass(frozen=True)
class RunContext:
    """A recipe on a machine."""

    params: Params
    device: torch.device

    @property
    def has_its_gpu(self) -> bool:
        """Whether there is a GPU, or the recipe needs none."""
        return self.device.type == "cuda" or self.params.training.vram_gib is None

    @cached_property
    def models(self) -> dict[str, Path | None]:
        """Where the base model and its VAE are, by params key."""
        return local_models(self.params.model)

    def require_models(self) -> None:
        """Lets pass who has a model, and a device to compute with it.

        Raises:
            NotTriedError: one is missing.
        """
        if not self.has_its_gpu:
            raise CheckSkippedError("there is no GPU, and this recipe is made for one")
        if missing := [key for key, folder in self.models.items() if folder is None]:
            raise CheckSkippedError(f"{', '.join(missing)} is not here yet")

    @cached_property
    def shapes(self) -> SDXLArchitecture:
        return read_architecture(self.params.model)

    @cached_property
    def work(self) -> TrainingSpec:
        """The training that the params ask for."""
        side = self.params.encoding.resolution // self.shapes.pixels_per_latent
        trained = self.params.model.text_encoders != "frozen"
        size = torch.Size((1, 4, side, side))
        return TrainingSpec(self.shapes, trained, self.params.lora, self.params.training, size)

    @cached_property
    def plan(self) -> ForecastPlan:
        """The fastest plan within training.vram_gib, with its forecast.

        Raises:
            ValueError: none fits.
        """
        budget, planner = self.params.training.vram_gib, Planner(self.work)
        plan = planner.fastest(inf if budget is None else budget * GIB)
        if plan is None:
            raise ValueError(refusal(self.work, planner.smallest()))
        return plan

    @property
    def config(self) -> TrainingConfig:
        """Training as it will be done, without `auto`."""
        return self.plan.applied_to(self.params.training)

    @cached_property
    def dry_run(self) -> DryRun:
        """The model with adapters, ready to be trained on noise."""
        self.require_models()
        if self.device.type == "cuda":
            self.limit_memory(self.params.training.vram_gib)
        return DryRun(self.params, self.work, self.config, self.plan.checkpointed, self.device)

    def release_model(self) -> None:
        """Gives its memory to what comes after it."""
        vars(self).pop("trial", None)
        if self.device.type == "cuda":
            self.limit_memory(None)

    def limit_memory(self, vram_gib: float | None) -> None:
        """Lets PyTorch have so much of the GPU, as the stage does, or all of it. Frees what is cached."""
        total = torch.cuda.get_device_properties(self.device).total_memory
        share = 1.0 if vram_gib is None else min(1.0, vram_gib * GIB / total)
        torch.cuda.set_per_process_memory_fraction(share, self.device)
        torch.cuda.empty_cache()

    @cached_property
    def folder(self) -> Path:
        """A place for files of the trial, on the disk that the run will write to; `leave` deletes it."""
        scratch = Path(".dvc/tmp")
        scratch.mkdir(parents=True, exist_ok=True)
        return Path(mkdtemp(prefix="doctor-", dir=scratch))

    def cleanup(self) -> None:
        """Deletes what the trial wrote."""
        if "folder" in vars(self):
            shutil.rmtree(self.folder, ignore_errors=True)


CheckFunction = Callable[[RunContext], Iterator[Check]]
