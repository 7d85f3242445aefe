"""Evaluation of the samples: their metrics for prompts of each origin, and which of them are copies."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from sdxl_lora.config import EvaluationConfig
from sdxl_lora.data.images import decode_image
from sdxl_lora.evaluation.clip import ImageTextScorer
from sdxl_lora.evaluation.memorization import Match, copied_share, copy_threshold, nearest_training_images
from sdxl_lora.evaluation.sample_metrics import as_numbers, interval_rows, measure, sample_metrics
from sdxl_lora.inference.samples import Sample


@dataclass(frozen=True)
class ImageSets:
    """The samples, and the real images that they are compared with, on disk."""

    samples: Path
    """Folder of the samples."""
    images: Path
    """Folder of the data set's images."""
    held_out: Sequence[str]
    """File names of the held-out images."""
    training: Sequence[str]
    """File names of the training images."""


@dataclass(frozen=True)
class _SampleEvaluation:
    """Figures, intervals and nearest training images of the samples."""

    figures: dict[str, object]
    """For metrics.json: metrics of `sample_metrics`, their changes and the share `copied` of free prompts;
    the same for captions under `training_captions` and `held_out_captions`; and `copy_threshold`."""
    intervals: list[dict[str, object]]
    """Rows of INTERVAL_COLUMNS."""
    matches: list[Match]
    """Each sample with its nearest training image."""


def evaluate_samples(
    samples: Sequence[Sample], images: ImageSets, scorer: ImageTextScorer, config: EvaluationConfig
) -> _SampleEvaluation:
    """Compute the samples' metrics and compare the samples with the data set's images.

    Raises:
        FileNotFoundError: an image is missing.
    """
    features = _features(scorer, images.samples, [sample.file for sample in samples])
    held_out = _features(scorer, images.images, images.held_out)
    training = _features(scorer, images.images, images.training)
    threshold = copy_threshold(held_out, training, config.copy_quantile)
    found = nearest_training_images(samples, features, images.training, training, threshold)
    figures: dict[str, object] = {"copy_threshold": threshold}
    intervals = []
    for origin in dict.fromkeys(sample.origin for sample in samples):
        rows = [row for row, sample in enumerate(samples) if sample.origin == origin]
        group = [samples[row] for row in rows]
        metrics = sample_metrics(group, features[rows], held_out, scorer, config.style)
        measurements = [measure(metric, config) for metric in metrics]
        numbers = {**as_numbers(measurements), "copied": copied_share([found[row] for row in rows])}
        # Free prompts stand at the top level, where the gates look for them.
        figures |= numbers if origin == "free" else {f"{origin}_captions": numbers}
        intervals += interval_rows(measurements, origin)
    return _SampleEvaluation(figures, intervals, found)


def _features(scorer: ImageTextScorer, folder: Path, names: Sequence[str]) -> Tensor:
    """Return CLIP's features of image files, (N, D); decodes one batch at a time."""
    return scorer.image_features(decode_image((folder / name).read_bytes()) for name in names)
