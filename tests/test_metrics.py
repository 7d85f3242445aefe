import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from sdxl_lora.metrics import clip_score, retrieval_at_1, zero_shot_probability


def directions(*degrees: float) -> Tensor:
    """Vectors of length 1 in the plane, (N, 2)."""
    return torch.tensor([[math.cos(math.radians(d)), math.sin(math.radians(d))] for d in degrees])


@pytest.mark.parametrize(("angle", "score"), [(0, 100.0), (60, 50.0), (90, 0.0), (180, 0.0)])
def test_clip_score_is_the_cosine_in_percent_and_never_negative(angle: float, score: float) -> None:
    assert clip_score(directions(0), directions(angle)).tolist() == pytest.approx([score], abs=1e-4)


def test_zero_shot_probability_is_the_softmax_over_an_images_own_candidates() -> None:
    images, texts = normalize(torch.randn(5, 8), dim=-1), normalize(torch.randn(5, 3, 8), dim=-1)
    expected = [
        math.exp(7 * float(image @ candidates[0])) / sum(math.exp(7 * float(image @ c)) for c in candidates)
        for image, candidates in zip(images, texts, strict=True)
    ]
    assert zero_shot_probability(images, texts, 7.0).tolist() == pytest.approx(expected, rel=1e-4)


def test_retrieval_counts_images_nearest_to_their_own_text() -> None:
    images, texts = directions(0, 90, 100), directions(10, 80, 180)
    assert retrieval_at_1(images, texts, ["a", "b", "c"]) == pytest.approx(2 / 3)


def test_retrieval_takes_equal_texts_for_one() -> None:
    """Two seeds of a prompt: whichever of its copies is nearest is right."""
    images, texts = directions(0, 1, 90), directions(0, 0, 90)
    assert retrieval_at_1(images, texts, ["a", "a", "b"]) == 1.0
