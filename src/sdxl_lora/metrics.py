"""Figures of merit on feature vectors; knows tensors, no model.

Features are what CLIP (Radford et al. 2021, arXiv:2103.00020) makes of images and texts, of length 1.
"""

from torch import Tensor


def clip_score(image_features: Tensor, text_features: Tensor) -> Tensor:
    """CLIPScore of each image and its text (Hessel et al. 2021, arXiv:2104.08718), in [0, 100], (N,).

    100 max(cos, 0), as torchmetrics scales it; the paper's own factor is 2.5.

    Args:
        image_features: (N, D), each of length 1.
        text_features: (N, D), each of length 1.
    """
    return 100 * (image_features * text_features).sum(-1).clamp(min=0)


def zero_shot_probability(image_features: Tensor, text_features: Tensor, logit_scale: float) -> Tensor:
    """Probability that each image belongs to the first of its texts (Radford et al. 2021, 3.1.2), (N,).

    Args:
        image_features: (N, D), each of length 1.
        text_features: candidates for each image, (N, C, D), each of length 1.
        logit_scale: the inverse of CLIP's temperature.
    """
    logits = logit_scale * (image_features[:, None] * text_features).sum(-1)
    return logits.softmax(-1)[:, 0]


def retrieval_at_1(image_features: Tensor, text_features: Tensor, labels: list[str]) -> float:
    """Share of the images whose nearest text, of all texts, reads as their own, in [0, 1].

    Args:
        image_features: (N, D), each of length 1.
        text_features: the text of each image, (N, D), each of length 1.
        labels: what each text says; equal texts count as the same.
    """
    nearest = (image_features @ text_features.T).argmax(-1).tolist()
    hits = sum(labels[index] == label for index, label in zip(nearest, labels, strict=True))
    return hits / len(labels)
