"""The micro-batches that each step trains on: encoded examples and the random numbers drawn for them.

Every random draw is keyed by (seed, position), where position counts examples from the start of training. So
a step depends on earlier steps through the weights alone, and a resumed training needs no generator's state.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from sdxl_lora.config import TrainingConfig
from sdxl_lora.data.batch_sampler import batch_order
from sdxl_lora.data.encoded_dataset import Batch, EncodedDataset, Example, Variant
from sdxl_lora.runtime.distributed import distributed_state
from sdxl_lora.runtime.rng import keyed_generator
from sdxl_lora.training.denoiser import Denoiser


@dataclass(frozen=True)
class NoiseDraws:
    """The random part of a batch."""

    latents: Tensor
    """A sample of each image's posterior, fp32, (B, 4, H/8, W/8)."""
    noise: Tensor
    """Standard normal, shaped as `latents`."""
    timesteps: Tensor
    """Uniform in [0, T), int64, (B,)."""
    caption_mask: Tensor
    """0 where the caption is dropped, else 1, (B,)."""

    def to(self, device: torch.device) -> Self:
        return replace(self, **{name: tensor.to(device) for name, tensor in vars(self).items()})


@dataclass(frozen=True)
class TrainingBatch:
    """A micro-batch with everything that is drawn for it."""

    batch: Batch
    draws: NoiseDraws
    images: list[str]
    """File names, for messages."""
    dropout_seed: int
    """Seed of the adapters' dropout."""

    def to(self, device: torch.device) -> Self:
        return replace(self, batch=self.batch.to(device), draws=self.draws.to(device))

    def tensors(self) -> list[Tensor]:
        return list(self.named_tensors().values())

    def named_tensors(self) -> dict[str, Tensor]:
        """Return the tensors of the batch, then those of the draws."""
        columns = {**self.batch.tensors(), **vars(self.draws)}
        return {name: tensor for name, tensor in columns.items() if tensor is not None}


def training_batches(
    denoiser: Denoiser, dataset: EncodedDataset, config: TrainingConfig, seed: int, first: int = 0
) -> Iterator[TrainingBatch]:
    """Yield this process's micro-batches of an endless training from step `first` on, on the CPU.

    All examples of a step have one size. The processes share a step's micro-batches by turns, so that two
    processes train on the examples that one process with twice the batch size would.
    """
    num_timesteps = len(denoiser.noise_schedule.alphas_cumprod)
    size = config.batch_size // config.accumulation
    rank, num_processes = distributed_state().process_index, distributed_state().num_processes
    parts = config.accumulation * num_processes
    steps = batch_order(dataset.latents_shapes, parts * size, seed, first)
    for step, examples in enumerate(steps, first):
        for part in range(rank, parts, num_processes):
            micro_step = step * parts + part
            start = micro_step * size
            indices = examples[part * size : (part + 1) * size]
            variants = draw_variants([dataset.examples[index] for index in indices], start, seed)
            batch = dataset.batch(indices, variants)
            draws = draw_noise(batch, start, num_timesteps, config.caption_dropout, seed)
            images = [dataset.examples[index].image for index in indices]
            yield TrainingBatch(
                batch, draws, images, keyed_generator(seed, "dropout", micro_step).initial_seed()
            )


def one_batch_per_size(
    denoiser: Denoiser, dataset: EncodedDataset, config: TrainingConfig
) -> Iterator[TrainingBatch]:
    """Yield a micro-batch of each size of latents, the largest first: for captures, not to train on."""
    first = {shape: index for index, shape in reversed(list(enumerate(dataset.latents_shapes)))}
    size = config.batch_size // config.accumulation
    num_timesteps = len(denoiser.noise_schedule.alphas_cumprod)
    for shape in sorted(first, key=lambda shape: shape.numel(), reverse=True):
        batch = dataset.batch([first[shape]] * size)
        draws = draw_noise(batch, 0, num_timesteps, config.caption_dropout, seed=0)
        yield TrainingBatch(batch, draws, images=[], dropout_seed=0)


def draw_variants(examples: Sequence[Example], start: int, seed: int) -> list[Variant]:
    """Draw the image and caption that each example shows at positions start, start + 1, ... of training."""
    variants = []
    for position, example in enumerate(examples, start):
        flip, number = torch.rand(2, generator=keyed_generator(seed, "variant", position)).tolist()
        flipped = bool(example.flipped_digest) and flip < 0.5
        variants.append(Variant(flipped, int(number * (1 + len(example.more_captions)))))
    return variants


def draw_noise(batch: Batch, start: int, num_timesteps: int, caption_dropout: float, seed: int) -> NoiseDraws:
    """Draw the random part of the examples at positions start, start + 1, ... of training; on the CPU."""
    columns = []
    for row in range(len(batch)):
        generator = keyed_generator(seed, "example", start + row)
        mean, std = batch.latents_mean[row].float(), batch.latents_std[row].float()
        latents = mean + std * torch.randn(mean.shape, generator=generator)
        noise = torch.randn(mean.shape, generator=generator)
        timestep = torch.randint(num_timesteps, (), generator=generator)
        caption_mask = (torch.rand((), generator=generator) >= caption_dropout).float()
        columns.append((latents, noise, timestep, caption_mask))
    return NoiseDraws(*(torch.stack(column) for column in zip(*columns, strict=True)))
