"""Whether samples are copies of training images.

A sample is as near to its nearest training image as CLIP's features say. How near a picture of the same kind
comes without being a copy, held-out images show: they are real, and were not trained on.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from torch import Tensor

from sdxl_lora.evaluation.metrics import nearest
from sdxl_lora.inference.samples import Origin, Sample, strength_name


@dataclass(frozen=True)
class Match:
    """A sample and the training image that it is nearest to."""

    file: str
    """Of the sample, below the folder of samples."""
    strength: float
    origin: Origin
    """Of its prompt."""
    training_image: str
    """File name."""
    similarity: float
    """Cosine of their features, at most 1."""
    copied: bool
    """Whether it is above the threshold."""


def copy_threshold(held_out_features: Tensor, training_features: Tensor, quantile: float) -> float:
    """The similarity to the nearest training image that a share `quantile` of held-out images stays below.

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
    """Each sample with its nearest training image.

    Args:
        features: of the samples, (N, D), each of length 1.
        training_images: file names, M of them.
        training_features: (M, D), each of length 1.
    """
    similarities, indices = nearest(features, training_features)
    return [
        Match(s.file, s.strength, s.origin, training_images[index], similarity, similarity > threshold)
        for s, similarity, index in zip(samples, similarities.tolist(), indices.tolist(), strict=True)
    ]


def copied_share(found: Sequence[Match]) -> dict[str, float]:
    """The share of copies among the samples of each strength, in [0, 1]."""
    strengths = dict.fromkeys(match.strength for match in found)
    return {
        strength_name(value).replace(" ", "_"): fmean(m.copied for m in found if m.strength == value)
        for value in strengths
    }
