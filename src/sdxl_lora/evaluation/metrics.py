"""Metrics on feature vectors; pure functions on tensors, without a model.

Features are CLIP's (Radford et al. 2021, arXiv:2103.00020), of images and texts, normalised to length 1.
"""

import torch
from torch import Tensor

_CMMD_SIGMA = 10.0
_CMMD_SCALE = 1000.0


def clip_score(image_features: Tensor, text_features: Tensor) -> Tensor:
    """Return the CLIPScore of each image and its text (Hessel et al. 2021, arXiv:2104.08718), (N,).

    100 max(cos, 0), in [0, 100], scaled as in torchmetrics; the paper's factor is 2.5.

    Args:
        image_features: (N, D), each of length 1.
        text_features: (N, D), each of length 1.
    """
    return 100 * (image_features * text_features).sum(-1).clamp(min=0)


def zero_shot_probability(image_features: Tensor, text_features: Tensor, logit_scale: float) -> Tensor:
    """Return the probability that each image belongs to its first text (Radford et al. 2021, 3.1.2), (N,).

    Args:
        image_features: (N, D), each of length 1.
        text_features: candidates for each image, (N, C, D), each of length 1.
        logit_scale: the inverse of CLIP's temperature.
    """
    logits = logit_scale * (image_features[:, None] * text_features).sum(-1)
    return logits.softmax(-1)[:, 0]


def retrieval_hits(image_features: Tensor, text_features: Tensor, labels: list[str]) -> Tensor:
    """Return 1 for each image whose nearest text, of all texts, equals its prompt, else 0, fp32, (N,).

    Args:
        image_features: (N, D), each of length 1.
        text_features: the text of each image, (N, D), each of length 1.
        labels: the texts; equal texts count as the same.
    """
    nearest = (image_features @ text_features.T).argmax(-1).tolist()
    hits = [labels[index] == label for index, label in zip(nearest, labels, strict=True)]
    return torch.tensor(hits, dtype=torch.float32)


def cmmd(within_first: Tensor, within_second: Tensor, across: Tensor) -> Tensor:
    """Return the CMMD of two sets of images (Jayasumana et al. 2024, arXiv:2401.09603): 1000 MMD^2.

    MMD^2 is the unbiased estimate (Gretton et al. 2012, lemma 6). The paper's estimate is biased, and with a
    dozen images the bias would outweigh the distance. For similar sets it is near 0, also slightly negative.

    Args:
        within_first: `gaussian_kernel` of each pair of the first set, NaN where there is no pair, (M, M).
        within_second: the same for the second set, (N, N).
        across: `gaussian_kernel` of each pair across, (M, N).
    """
    return _CMMD_SCALE * (within_first.nanmean() + within_second.nanmean() - 2 * across.mean())


def gaussian_kernel(first: Tensor, second: Tensor) -> Tensor:
    """Return exp(-|x - y|^2 / (2 sigma^2)) of each pair, with CMMD's sigma of 10, fp64, (M, N).

    Args:
        first: (M, D), each of length 1.
        second: (N, D), each of length 1.
    """
    return torch.exp(-torch.cdist(first.double(), second.double()).square() / (2 * _CMMD_SIGMA**2))


def pairs(matrix: Tensor) -> Tensor:
    """Return `matrix`, (N, N), with NaN on its diagonal: an image and itself are not a pair.

    The NaN stays with the image when bootstrap resampling takes it twice, off the diagonal of the resample.
    """
    return matrix.masked_fill(torch.eye(len(matrix), dtype=torch.bool), torch.nan)


def diversity(similarities: Tensor) -> Tensor:
    """Return 1 minus the mean cosine similarity of all pairs: 0 if all images are the same.

    Args:
        similarities: NaN where there is no pair, (N, N).
    """
    return 1 - similarities.nanmean()


def nearest(features: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """Return the cosine similarity to the nearest of `others`, (N,), and its index, (N,).

    Args:
        features: (N, D), each of length 1.
        others: (M, D), each of length 1.
    """
    similarity, index = (features @ others.T).max(-1)
    return similarity, index


def resamples(num_values: int, num_resamples: int, generator: torch.Generator) -> Tensor:
    """Draw the indices of bootstrap resamples (Efron & Tibshirani 1993), with replacement, (R, N)."""
    return torch.randint(num_values, (num_resamples, num_values), generator=generator)


def interval(statistics: Tensor, confidence: float) -> tuple[float, float]:
    """Return the percentile interval of a statistic of bootstrap resamples, (R,): its middle `confidence`.

    NaN is ignored: a resample that consists of a single image has no pairs.
    """
    tail = (1 - confidence) / 2
    low, high = statistics.double().nanquantile(torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return low, high
