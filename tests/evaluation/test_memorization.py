import math

import pytest
import torch
from torch import Tensor

from sdxl_lora.evaluation.memorization import copied_share, copy_threshold, nearest_training_images
from sdxl_lora.inference.samples import Sample

TRAINING = ["first.png", "second.png"]


def directions(*degrees: float) -> Tensor:
    """Vectors of length 1 in the plane, (N, 2)."""
    return torch.tensor([[math.cos(math.radians(d)), math.sin(math.radians(d))] for d in degrees])


def cosine(degrees: float) -> float:
    return math.cos(math.radians(degrees))


@pytest.mark.parametrize(
    ("quantile", "angle"), [(0.0, 40), (0.5, 30), (1.0, 20)], ids=["farthest", "middle", "nearest"]
)
def test_threshold_is_how_near_real_images_come_without_copying(quantile: float, angle: float) -> None:
    held_out = directions(20, 120, 180 - 50)  # 20 from the first, 30 and 40 from the second
    threshold = copy_threshold(held_out, directions(0, 90), quantile)
    assert threshold == pytest.approx(cosine(angle), rel=1e-5)


def test_samples_nearer_than_the_threshold_are_copies_of_their_nearest_image() -> None:
    samples = [Sample("a.png", "p", 0, 1.0), Sample("b.png", "q", 0, 1.0), Sample("c.png", "p", 0, 0.0)]
    found = nearest_training_images(samples, directions(3, 60, 40), TRAINING, directions(0, 90), cosine(10))
    assert [(m.file, m.training_image, m.copied) for m in found] == [
        ("a.png", "first.png", True),
        ("b.png", "second.png", False),
        ("c.png", "first.png", False),
    ]
    assert [m.similarity for m in found] == pytest.approx([cosine(3), cosine(30), cosine(40)], rel=1e-5)
    assert copied_share(found) == {"adapter": 0.5, "base": 0.0}
