"""Denoising loss on held-out images, base model against adapter, with bootstrap intervals.

Every random draw is keyed by `evaluation.seed`, so that two adapters are compared on the same noise.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from sdxl_lora.adapters.lora import adapter_strength
from sdxl_lora.config import EvaluationConfig
from sdxl_lora.data.encoded_dataset import EncodedDataset
from sdxl_lora.evaluation.metrics import interval, resamples
from sdxl_lora.runtime.rng import keyed_generator
from sdxl_lora.training.denoiser import Denoiser

LOSS_COLUMNS = ("timestep", "base", "adapter", "change_percent", "change_percent_low", "change_percent_high")


class _LossMeasurement(NamedTuple):
    """One error to be measured."""

    example: int
    """Index of the example in the data set."""
    timestep: int
    noise: int
    """Number of the noise, from 0 to evaluation.noises - 1."""


@dataclass(frozen=True)
class HeldOutError:
    """Mean squared error of one held-out example at one timestep under one noise."""

    example: str
    """Id of the example."""
    timestep: int
    base: float
    adapter: float


@torch.no_grad()
def held_out_errors(
    denoiser: Denoiser, dataset: EncodedDataset, config: EvaluationConfig
) -> Iterator[list[HeldOutError]]:
    """Yield batches of unweighted denoising errors of held-out examples without and with the adapter."""
    for measurements in _batches_of_one_size(
        held_out_measurements(dataset, config), dataset, config.batch_size
    ):
        batch = dataset.batch([measurement.example for measurement in measurements]).to(denoiser.device)
        timesteps = torch.tensor([m.timestep for m in measurements], device=denoiser.device)
        keys = [(dataset.examples[m.example].id, m.timestep, m.noise) for m in measurements]
        latents = batch.latents_mean.float()
        noise = torch.stack([_evaluation_noise(latents.shape[1:], config.seed, *key) for key in keys])
        errors = {}
        for name, strength in (("base", 0.0), ("adapter", 1.0)):
            with adapter_strength(denoiser.modules, strength):
                errors[name] = denoiser.per_example_mse(
                    batch, latents, noise.to(denoiser.device), timesteps
                ).tolist()
        ids = [example for example, _, _ in keys]
        columns = zip(ids, timesteps.tolist(), errors["base"], errors["adapter"], strict=True)
        yield [HeldOutError(*column) for column in columns]


def held_out_measurements(dataset: EncodedDataset, config: EvaluationConfig) -> list[_LossMeasurement]:
    """Return every error that is to be measured: examples x timesteps x noises."""
    num_examples = min(len(dataset), config.max_examples or len(dataset))
    keys = product(range(num_examples), config.timesteps, range(config.noises))
    return [_LossMeasurement(*key) for key in keys]


def _batches_of_one_size(
    measurements: Sequence[_LossMeasurement], dataset: EncodedDataset, max_size: int
) -> Iterator[list[_LossMeasurement]]:
    """Yield batches of at most `max_size` measurements, whose latents have one size."""
    by_size: dict[torch.Size, list[_LossMeasurement]] = defaultdict(list)
    for measurement in measurements:
        by_size[dataset.latents_shapes[measurement.example]].append(measurement)
    for same_size in by_size.values():
        for start in range(0, len(same_size), max_size):
            yield same_size[start : start + max_size]


def _evaluation_noise(shape: torch.Size, seed: int, example: str, timestep: int, number: int) -> Tensor:
    """Draw standard normal noise for one example at one timestep, on the CPU."""
    return torch.randn(shape, generator=keyed_generator(seed, "evaluation", example, timestep, number))


def held_out_loss(errors: Sequence[HeldOutError], config: EvaluationConfig) -> dict[str, float]:
    """Return the mean errors, and the adapter's change of the base model's, percent, with its interval.

    The bootstrap (Efron & Tibshirani 1993) resamples examples, not single errors: the errors of one example
    are similar, and would make the interval too narrow if they counted as independent.
    """
    means = _example_means(errors)
    key = (config.seed, "bootstrap", "held_out_loss")
    indices = resamples(len(means), config.resamples, keyed_generator(*key))
    base, adapter = means.mean(0).tolist()
    changes = _change_percent(*means[indices].mean(1).unbind(-1))
    low, high = interval(changes, config.confidence)
    return {
        "base": base,
        "adapter": adapter,
        "change_percent": 100 * (adapter / base - 1),
        "change_percent_low": low,
        "change_percent_high": high,
    }


def _change_percent(base: Tensor, adapter: Tensor) -> Tensor:
    return 100 * (adapter / base - 1)


def _example_means(errors: Sequence[HeldOutError]) -> Tensor:
    """Return the mean error of each example with base model and adapter, fp64, (N, 2)."""
    by_example: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for error in errors:
        by_example[error.example].append((error.base, error.adapter))
    return torch.stack([torch.tensor(e, dtype=torch.float64).mean(0) for e in by_example.values()])


def loss_by_timestep(errors: Sequence[HeldOutError], config: EvaluationConfig) -> list[dict[str, float]]:
    """Return `held_out_loss` at each timestep."""
    groups: dict[int, list[HeldOutError]] = defaultdict(list)
    for error in errors:
        groups[error.timestep].append(error)
    return [
        {"timestep": timestep, **held_out_loss(group, config)} for timestep, group in sorted(groups.items())
    ]
