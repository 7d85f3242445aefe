"""What an adapter is worth: base model against adapter on held-out images and on samples.

Every draw is fixed by `evaluation.seed`, so that two adapters meet the same noise.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import torch
from torch import Tensor

from sdxl_lora.adapters.lora import adapter_strength
from sdxl_lora.config import EvaluationConfig
from sdxl_lora.data.encoded_dataset import EncodedDataset
from sdxl_lora.data.images import decode_image
from sdxl_lora.evaluation.clip import ImageTextScorer
from sdxl_lora.evaluation.memorization import Match, copied_share, copy_threshold, nearest_training_images
from sdxl_lora.evaluation.metrics import interval, resamples
from sdxl_lora.evaluation.sample_metrics import as_numbers, interval_rows, measure, sample_metrics
from sdxl_lora.inference.samples import Sample
from sdxl_lora.runtime.rng import keyed_generator
from sdxl_lora.training.denoiser import Denoiser

LOSS_COLUMNS = ("timestep", "base", "adapter", "change_percent", "change_percent_low", "change_percent_high")


_LossMeasurement = tuple[int, int, int]
"""Example index, timestep, and number of the noise, of an error to be measured."""


@dataclass(frozen=True)
class HeldOutError:
    """Mean squared error of one held-out example under one draw of noise."""

    example: str
    """Its id."""
    timestep: int
    base: float
    adapter: float


@torch.no_grad()
def held_out_errors(
    denoiser: Denoiser, dataset: EncodedDataset, config: EvaluationConfig
) -> Iterator[list[HeldOutError]]:
    """Unweighted denoising errors of held-out examples with and without the adapter, a batch at a time."""
    for batch_jobs in _batches_of_one_size(held_out_jobs(dataset, config), dataset, config.batch_size):
        batch = dataset.batch([index for index, _, _ in batch_jobs]).to(denoiser.device)
        timesteps = torch.tensor([timestep for _, timestep, _ in batch_jobs], device=denoiser.device)
        keys = [(dataset.examples[index].id, timestep, number) for index, timestep, number in batch_jobs]
        latents = batch.latents_mean.float()
        noise = torch.stack([_evaluation_noise(latents.shape[1:], config.seed, *key) for key in keys])
        errors = {}
        for name, value in (("base", 0.0), ("adapter", 1.0)):
            with adapter_strength(denoiser.modules, value):
                errors[name] = denoiser.per_example_mse(
                    batch, latents, noise.to(denoiser.device), timesteps
                ).tolist()
        ids = [example for example, _, _ in keys]
        columns = zip(ids, timesteps.tolist(), errors["base"], errors["adapter"], strict=True)
        yield [HeldOutError(*column) for column in columns]


def held_out_jobs(dataset: EncodedDataset, config: EvaluationConfig) -> list[_LossMeasurement]:
    """Every error that is to be measured."""
    num_examples = min(len(dataset), config.max_examples or len(dataset))
    return list(product(range(num_examples), config.timesteps, range(config.noises)))


def _batches_of_one_size(
    jobs: Sequence[_LossMeasurement], dataset: EncodedDataset, most: int
) -> Iterator[list[_LossMeasurement]]:
    """The jobs in batches of at most `most`, with latents of one size each."""
    by_size: dict[torch.Size, list[_LossMeasurement]] = defaultdict(list)
    for job in jobs:
        by_size[dataset.latents_shapes[job[0]]].append(job)
    for alike in by_size.values():
        for start in range(0, len(alike), most):
            yield alike[start : start + most]


def _evaluation_noise(shape: torch.Size, seed: int, example: str, timestep: int, number: int) -> Tensor:
    """Standard normal noise for one example at one timestep, on the CPU."""
    return torch.randn(shape, generator=keyed_generator(seed, "evaluation", example, timestep, number))


def held_out_loss(errors: Sequence[HeldOutError], config: EvaluationConfig) -> dict[str, float]:
    """Means over all draws, and by how much the adapter changes the base model's, percent, with its interval.

    The bootstrap (Efron & Tibshirani 1993) resamples examples, not draws: an example's draws are alike.
    """
    means = _example_means(errors)
    key = (config.seed, "bootstrap", "held_out_loss")
    indices = resamples(len(means), config.resamples, keyed_generator(*key))
    base, adapter = means.mean(0).tolist()
    drawn = _change_percent(*means[indices].mean(1).unbind(-1))
    low, high = interval(drawn, config.confidence)
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
    """Mean error of each example with base model and adapter, fp64, (N, 2)."""
    by_example: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for error in errors:
        by_example[error.example].append((error.base, error.adapter))
    return torch.stack([torch.tensor(e, dtype=torch.float64).mean(0) for e in by_example.values()])


def loss_by_timestep(errors: Sequence[HeldOutError], config: EvaluationConfig) -> list[dict[str, float]]:
    """`held_out_loss` at each timestep."""
    groups: dict[int, list[HeldOutError]] = defaultdict(list)
    for error in errors:
        groups[error.timestep].append(error)
    return [
        {"timestep": timestep, **held_out_loss(group, config)} for timestep, group in sorted(groups.items())
    ]


@dataclass(frozen=True)
class ImageSets:
    """Samples and the real images that they are held against, on disk."""

    samples: Path
    """Folder of the samples."""
    images: Path
    """Folder of the data set's images."""
    held_out: Sequence[str]
    """File names of the held-out images."""
    training: Sequence[str]
    """File names of the images trained on."""


@dataclass(frozen=True)
class _SampleEvaluation:
    """What the samples are worth."""

    figures: dict[str, object]
    """Those that `sample_metrics` names, their changes and the share of `copied` samples, of free prompts;
    the same of captions under `training_captions` and `held_out_captions`; and `copy_threshold`."""
    intervals: list[dict[str, object]]
    """Rows of INTERVAL_COLUMNS."""
    matches: list[Match]
    """Each sample with the training image that it is nearest to."""


def evaluate_samples(
    samples: Sequence[Sample], pictures: ImageSets, scorer: ImageTextScorer, config: EvaluationConfig
) -> _SampleEvaluation:
    """Scores the samples and holds them against the data set's images.

    Raises:
        FileNotFoundError: a picture is missing.
    """
    features = scorer.image_features(
        decode_image((pictures.samples / sample.file).read_bytes()) for sample in samples
    )
    held_out, training = (
        scorer.image_features(decode_image((pictures.images / name).read_bytes()) for name in names)
        for names in (pictures.held_out, pictures.training)
    )
    threshold = copy_threshold(held_out, training, config.copy_quantile)
    found = nearest_training_images(samples, features, pictures.training, training, threshold)
    figures: dict[str, object] = {"copy_threshold": threshold}
    intervals = []
    for origin in dict.fromkeys(sample.origin for sample in samples):
        rows = [row for row, sample in enumerate(samples) if sample.origin == origin]
        group = [samples[row] for row in rows]
        metrics = sample_metrics(group, features[rows], held_out, scorer, config.style)
        measurements = [measure(metric, config) for metric in metrics]
        numbers = {**as_numbers(measurements), "copied": copied_share([found[row] for row in rows])}
        figures |= numbers if origin == "free" else {f"{origin}_captions": numbers}
        intervals += interval_rows(measurements, origin)
    return _SampleEvaluation(figures, intervals, found)
