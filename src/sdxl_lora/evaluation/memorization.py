"""Memorization: samples that are copies of training images.

Similarity is the cosine of CLIP features. A sample counts as a copy if it is more similar to a training image
than nearly all held-out images are: these are real images of the same kind that were not trained on.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from torch import Tensor

from sdxl_lora.evaluation.metrics import nearest
from sdxl_lora.inference.samples import Origin, Sample, strength_key


@dataclass(frozen=True)
class Match:
    """A sample and its nearest training image."""

    file: str
    """Path of the sample below the folder of samples."""
    strength: float
    origin: Origin
    """Origin of the sample's prompt."""
    training_image: str
    """File name."""
    similarity: float
    """Cosine of their features, at most 1."""
    copied: bool
    """Whether the similarity is above the threshold."""


def copy_threshold(held_out_features: Tensor, training_features: Tensor, quantile: float) -> float:
    """Return the `quantile` of the held-out images' similarities to their nearest training images.

    Args:
        held_out_features: (N, D), each of length 1.
        training_features: (M, D), each of length 1.
    """
    similarities, _ = nearest(held_out_features, training_features)
    return similarities.double().quantile(quantile).item()


def nearest_training_images(
    samples: Sequence[Sample],
    features: Tensor,
    training_images: Sequence[str],
    training_features: Tensor,
    threshold: float,
) -> list[Match]:
    """Return each sample with its nearest training image.

    Args:
        features: of the samples, (N, D), each of length 1.
        training_images: M file names.
        training_features: (M, D), each of length 1.
    """
    similarities, indices = nearest(features, training_features)
    return [
        Match(s.file, s.strength, s.origin, training_images[index], similarity, similarity > threshold)
        for s, similarity, index in zip(samples, similarities.tolist(), indices.tolist(), strict=True)
    ]


def copied_share(found: Sequence[Match]) -> dict[str, float]:
    """Return the share of copies among the samples of each strength, in [0, 1]."""
    strengths = dict.fromkeys(match.strength for match in found)
    return {strength_key(value): fmean(m.copied for m in found if m.strength == value) for value in strengths}
