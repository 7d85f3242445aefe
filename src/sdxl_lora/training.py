"""Fine-tuning the adapters: the loop, and what one step is made of. Knows no file, no log and no tracker.

Every random draw is keyed by (seed, position), where position counts examples from the start of training, so
a step does not depend on the steps before it but through the weights.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from itertools import islice
from statistics import fmean
from time import perf_counter

import bitsandbytes
import pandas as pd
import torch
from torch import Tensor
from torch.nn import Parameter

from sdxl_lora.config import TrainingConfig
from sdxl_lora.dataset import Batch, EncodedDataset, example_order
from sdxl_lora.denoising import Denoiser
from sdxl_lora.diffusion import min_snr_weight
from sdxl_lora.hardware import peak_memory_gib
from sdxl_lora.lora import lora_parameters
from sdxl_lora.randomness import generator
from sdxl_lora.sdxl import set_attention


@dataclass(frozen=True)
class Report:
    """What one optimizer step did."""

    step: int
    """1 for the first."""
    loss: float
    """Weighted denoising loss, averaged over the step's examples."""
    grad_norm: float
    """Euclidean norm of all adapters' gradients before clipping."""
    learning_rate: float
    """Of the UNet's adapters."""
    loss_scale: float
    """Factor of fp16 loss scaling; 1 in other precisions."""
    seconds: float
    """Wall time of the step."""


@dataclass(frozen=True)
class Draws:
    """The random part of a batch."""

    latents: Tensor
    """A sample of each image's posterior, fp32, (B, 4, H/8, W/8)."""
    noise: Tensor
    """Standard normal, shaped as `latents`."""
    timesteps: Tensor
    """Uniform in [0, T), int64, (B,)."""
    captioned: Tensor
    """0 where the caption is dropped, else 1, (B,)."""


def train_lora(
    denoiser: Denoiser, dataset: EncodedDataset, config: TrainingConfig, seed: int
) -> Iterator[Report]:
    """Trains the adapters of `denoiser` in place and reports each step; they hold the result at the end.

    Raises:
        FloatingPointError: the loss is not finite; names the step and the images.
    """
    parameters = [parameter for module in denoiser.modules for parameter in lora_parameters(module)]
    optimizer = make_optimizer(denoiser, config)
    scaler = torch.amp.GradScaler(denoiser.device.type, enabled=config.precision == "fp16")
    average = MovingAverage(parameters, config.ema_decay) if config.ema_decay else None
    for module in denoiser.modules:
        module.train()
    for step in range(config.steps):
        start = perf_counter()
        rate = learning_rate_factor(step, config)
        for group in optimizer.param_groups:
            group["lr"] = rate * group["peak_lr"]
        loss = 0.0
        for micro_step in range(step * config.accumulation, (step + 1) * config.accumulation):
            batch_loss = loss_of(denoiser, dataset, config, seed, micro_step) / config.accumulation
            scaler.scale(batch_loss).backward()
            loss += batch_loss.item()
        scaler.unscale_(optimizer)
        grad_norm = torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        if average is not None:
            average.update(step)
        learning_rate, seconds = rate * config.learning_rate, perf_counter() - start
        yield Report(step + 1, loss, grad_norm.item(), learning_rate, scaler.get_scale(), seconds)
    if average is not None:
        average.copy_to_parameters()
    for module in denoiser.modules:
        module.eval()


def prepare(denoiser: Denoiser, config: TrainingConfig) -> None:
    """Sets the attention kernels and gradient checkpointing that `config` asks for.

    Raises:
        ValueError: the attention cannot run here.
    """
    set_attention(denoiser.unet, config.attention)
    if config.gradient_checkpointing:
        denoiser.unet.enable_gradient_checkpointing()
        for text_encoder in denoiser.text_encoders or ():
            text_encoder.gradient_checkpointing_enable({"use_reentrant": False})


def loss_of(
    denoiser: Denoiser, dataset: EncodedDataset, config: TrainingConfig, seed: int, micro_step: int
) -> Tensor:
    """Weighted denoising loss of the batch of one forward pass, a scalar with a gradient."""
    start = micro_step * config.batch_size
    indices = list(islice(example_order(len(dataset), seed, start), config.batch_size))
    batch = dataset.batch(indices)
    draws = draw(batch, start, len(denoiser.noise_schedule.alphas_cumprod), config.caption_dropout, seed)
    torch.manual_seed(generator(seed, "dropout", micro_step).initial_seed())  # the adapters' dropout
    loss = denoising_loss(denoiser, batch.to(denoiser.device), draws, config.min_snr_gamma)
    if not torch.isfinite(loss):
        images = ", ".join(dataset.examples[index].image for index in indices)
        raise FloatingPointError(
            f"loss is {loss.item()} at step {micro_step // config.accumulation + 1}, on the images {images}: "
            "lower training.learning_rate, or set training.precision to bf16 or fp32"
        )
    return loss


def denoising_loss(denoiser: Denoiser, batch: Batch, draws: Draws, min_snr_gamma: float | None) -> Tensor:
    """Mean over the batch of each example's squared error, times its Min-SNR weight if there is a gamma."""
    device = denoiser.device
    timesteps = draws.timesteps.to(device)
    latents, noise, captioned = (t.to(device) for t in (draws.latents, draws.noise, draws.captioned))
    errors = denoiser.errors(batch, latents, noise, timesteps, captioned)
    if min_snr_gamma is not None:
        schedule = denoiser.noise_schedule
        errors = errors * min_snr_weight(
            schedule.alphas_cumprod[timesteps], min_snr_gamma, schedule.prediction_type
        )
    return errors.mean()


def draw(batch: Batch, start: int, num_timesteps: int, caption_dropout: float, seed: int) -> Draws:
    """The random part of the examples at positions start, start + 1, ... of training; on the CPU."""
    columns = []
    for row in range(len(batch)):
        generator_ = generator(seed, "example", start + row)
        mean, std = batch.latents_mean[row].float(), batch.latents_std[row].float()
        latents = mean + std * torch.randn(mean.shape, generator=generator_)
        noise = torch.randn(mean.shape, generator=generator_)
        timestep = torch.randint(num_timesteps, (), generator=generator_)
        captioned = (torch.rand((), generator=generator_) >= caption_dropout).float()
        columns.append((latents, noise, timestep, captioned))
    return Draws(*(torch.stack(column) for column in zip(*columns, strict=True)))


def learning_rate_factor(step: int, config: TrainingConfig) -> float:
    """Share of the peak learning rate at `step`, counted from 0: a linear rise, then a cosine or nothing.

    The cosine reaches 0 just after the last step (Loshchilov & Hutter 2017, arXiv:1608.03983).
    """
    if step < config.warmup_steps:
        return (step + 1) / (config.warmup_steps + 1)
    if config.schedule == "constant":
        return 1.0
    progress = (step - config.warmup_steps) / (config.steps - config.warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * progress))


def make_optimizer(denoiser: Denoiser, config: TrainingConfig) -> torch.optim.Optimizer:
    """AdamW over the adapters: one group for the UNet, one for the text encoders, each with its peak rate."""
    rates = [config.learning_rate, config.text_encoder_learning_rate, config.text_encoder_learning_rate]
    groups = [
        {"params": lora_parameters(module), "peak_lr": rate}
        for module, rate in zip(denoiser.modules, rates, strict=False)
    ]
    kind = bitsandbytes.optim.AdamW8bit if config.optimizer == "adamw_8bit" else torch.optim.AdamW
    return kind(groups, betas=config.betas, weight_decay=config.weight_decay)


def mean_report(reports: Sequence[Report]) -> dict[str, float]:
    """One point of the curves: the last report's step and the means of everything else."""
    columns = {field.name: [getattr(report, field.name) for report in reports] for field in fields(Report)}
    return {"step": columns.pop("step")[-1], **{name: fmean(values) for name, values in columns.items()}}


def loss_curve(reports: Sequence[Report], every: int) -> pd.DataFrame:
    """The curves of a whole run, a point every `every` steps."""
    starts = range(0, len(reports), every)
    return pd.DataFrame([mean_report(reports[start : start + every]) for start in starts])


def summarise(reports: Sequence[Report], denoiser: Denoiser, config: TrainingConfig) -> dict[str, float]:
    """The whole run in a few numbers."""
    seconds = sum(report.seconds for report in reports)
    examples = len(reports) * config.batch_size * config.accumulation
    last_tenth = reports[-max(1, len(reports) // 10) :]
    return {
        "steps": len(reports),
        "final_loss": fmean(report.loss for report in last_tenth),
        "trainable_parameters": sum(p.numel() for m in denoiser.modules for p in lora_parameters(m)),
        "peak_memory_gib": peak_memory_gib(denoiser.device),
        "seconds": seconds,
        "examples_per_second": examples / seconds,
    }


class MovingAverage:
    """Exponential moving average of parameters, warmed up so that the start is soon forgotten."""

    def __init__(self, parameters: list[Parameter], decay: float) -> None:
        self._weights: list[Tensor] = [parameter.detach() for parameter in parameters]
        self._decay = decay
        self._averages = [weight.clone() for weight in self._weights]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Moves the average towards the weights after `step`, counted from 0."""
        weight = 1 - min(self._decay, (step + 1) / (step + 10))
        torch._foreach_lerp_(self._averages, self._weights, weight)

    @torch.no_grad()
    def copy_to_parameters(self) -> None:
        torch._foreach_copy_(self._weights, self._averages)
