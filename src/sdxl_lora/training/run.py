"""One training of the project: its model, its state and its checkpoints, new or resumed, and its results.

There are three configs, each with fewer `auto` values than the one before: params.training as written;
`planned`, with micro-batches and checkpointing as they fit the GPU; `resolved`, with the attention that runs.
The planned one names the checkpoints' folder. The checkpoints store the attention, because another
measurement could choose another one.
"""

import logging
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from sdxl_lora import paths
from sdxl_lora.adapters.lora import add_adapters, save_lora
from sdxl_lora.config import LoraConfig, ModelConfig, TrainingConfig
from sdxl_lora.data.encoded_dataset import EncodedDataset
from sdxl_lora.runtime.environment import describe_environment
from sdxl_lora.storage.atomic_io import write_text
from sdxl_lora.storage.report_io import write_numbers
from sdxl_lora.training.auto_choices import recorded_choices, with_recorded_choices
from sdxl_lora.training.checkpointer import Checkpointer, training_key
from sdxl_lora.training.denoiser import Denoiser, load_denoiser
from sdxl_lora.training.trainer import Trainer, loss_curve, prepare_modules, summarise

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainingRun:
    """A training that is ready to go on from its newest checkpoint or from the start."""

    denoiser: Denoiser
    trainer: Trainer
    resolved: TrainingConfig
    """Without `auto`."""
    checkpoints: Checkpointer

    @property
    def choices(self) -> dict[str, str]:
        """Params that were `auto` after planning, with the values that were chosen."""
        return {"attention": self.resolved.attention}

    def write_results(self, plan: Mapping[str, object]) -> None:
        """Write the adapter, the loss curve and the reports, then delete the checkpoints.

        Args:
            plan: the report's entries about the plan.
        """
        history = self.trainer.history
        save_lora(paths.LORA, self.denoiser.parts)
        write_text(paths.LOSS_CURVE, loss_curve(history, self.resolved.log_every).to_csv(index=False))
        summary = summarise(history, self.denoiser, self.resolved)
        write_numbers(paths.TRAINING_REPORT, {**summary, **self.choices, **plan})
        environment = describe_environment(
            self.denoiser.device, deterministic=self.resolved.deterministic, **self.choices
        )
        write_numbers(paths.TRAINING_ENVIRONMENT, environment)
        self.checkpoints.delete()


def start_or_resume(
    model: ModelConfig,
    lora: LoraConfig,
    planned: TrainingConfig,
    checkpointed: Collection[str],
    dataset: EncodedDataset,
    device: torch.device,
    seed: int,
    root: Path,
) -> TrainingRun:
    """Load the base model with new adapters or, if this training has a checkpoint, with the saved ones.

    Args:
        planned: of the training, with micro-batches and checkpointing chosen.
        checkpointed: names of the units that recompute their activations.
        dataset: the training examples.
        seed: key of every random draw.
        root: the project's root, which holds the checkpoints.
    """
    key = training_key(seed, lora, model, planned, paths.ENCODED_INDEX, device)
    checkpoints = Checkpointer(root / paths.CHECKPOINTS / key, planned.checkpoint_minutes)
    checkpoint = checkpoints.newest()
    pinned = planned if checkpoint is None else planned.model_copy(update=checkpoint.facts)
    denoiser = load_denoiser(model, planned.precision, device, planned.quantization)
    add_adapters(denoiser.parts, lora, seed)
    prepare = partial(prepare_modules, denoiser, latents=dataset.largest_latents, checkpointed=checkpointed)
    attention = with_recorded_choices(prepare, pinned, recorded_choices(root).attention)
    resolved = pinned.model_copy(update={"attention": attention})
    trainer = Trainer(denoiser, dataset, resolved, seed)
    if checkpoint is not None:
        trainer.load_state_dict(checkpoint.tensors)
    elif checkpoints.others():
        logger.info("no checkpoint of this training (params, data, code, libraries, GPU): starting at step 1")
    return TrainingRun(denoiser, trainer, resolved, checkpoints)
