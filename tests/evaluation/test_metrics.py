import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from sdxl_lora.evaluation.metrics import (
    clip_score,
    cmmd,
    diversity,
    gaussian_kernel,
    interval,
    nearest,
    pairs,
    resamples,
    retrieval_hits,
    zero_shot_probability,
)
from sdxl_lora.runtime.rng import keyed_generator


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
    assert retrieval_hits(images, texts, ["a", "b", "c"]).tolist() == [1, 1, 0]


def test_retrieval_takes_equal_texts_for_one() -> None:
    """Two seeds of a prompt: whichever of its copies is nearest is right."""
    images, texts = directions(0, 1, 90), directions(0, 0, 90)
    assert retrieval_hits(images, texts, ["a", "a", "b"]).tolist() == [1, 1, 1]


def features(num: int, shift: float, key: str) -> Tensor:
    return normalize(torch.randn(num, 16, generator=keyed_generator(key)) + shift, dim=-1)


def cmmd_of(first: Tensor, second: Tensor) -> float:
    kernels = pairs(gaussian_kernel(first, first)), pairs(gaussian_kernel(second, second))
    return cmmd(*kernels, gaussian_kernel(first, second)).item()


def cmmd_by_loops(first: Tensor, second: Tensor) -> float:
    """Lemma 6 of Gretton et al. 2012, pair by pair."""

    def kernel(x: Tensor, y: Tensor) -> float:
        return math.exp(-sum((a - b) ** 2 for a, b in zip(x.tolist(), y.tolist(), strict=True)) / 200)

    def within(rows: Tensor) -> float:
        found = [kernel(x, y) for i, x in enumerate(rows) for j, y in enumerate(rows) if i != j]
        return sum(found) / (len(rows) * (len(rows) - 1))

    across = [kernel(x, y) for x in first for y in second]
    return 1000 * (within(first) + within(second) - 2 * sum(across) / len(across))


def test_cmmd_is_a_sum_over_pairs() -> None:
    first, second = features(7, 0.0, "a"), features(5, 0.5, "b")
    assert cmmd_of(first, second) == pytest.approx(cmmd_by_loops(first, second), rel=1e-5)


def test_cmmd_tells_sets_apart_and_does_not_grow_as_they_shrink() -> None:
    """The mean over many small sets of one kind is 0; the paper's biased estimate would be about 3."""
    alike = [cmmd_of(features(6, 0.3, f"a{n}"), features(6, 0.3, f"b{n}")) for n in range(200)]
    apart = [cmmd_of(features(6, 0.3, f"a{n}"), features(6, 2.0, f"b{n}")) for n in range(20)]
    assert abs(sum(alike) / 200) < 0.3
    assert min(apart) > 1


def test_image_resampled_twice_is_not_a_pair() -> None:
    rows = features(4, 0.0, "a")
    twice = torch.tensor([0, 0, 1, 2])
    matrix = pairs(rows @ rows.T)[twice][:, twice]
    expected = [float(rows[i] @ rows[j]) for i in twice for j in twice if i != j]
    assert diversity(matrix).item() == pytest.approx(1 - sum(expected) / len(expected), rel=1e-5)


def test_diversity_is_zero_for_equal_images() -> None:
    rows = directions(30, 30, 30)
    assert diversity(pairs(rows @ rows.T)).item() == pytest.approx(0, abs=1e-6)
    rows = directions(0, 90)
    assert diversity(pairs(rows @ rows.T)).item() == pytest.approx(1)


def test_nearest_is_found_with_its_cosine() -> None:
    similarity, index = nearest(directions(0, 85), directions(180, 60, 90))
    assert index.tolist() == [1, 2]
    assert similarity.tolist() == pytest.approx([0.5, math.cos(math.radians(5))], rel=1e-5)


def test_draws_without_a_statistic_are_left_out_of_an_interval() -> None:
    assert interval(torch.tensor([1.0, torch.nan, 2.0, torch.nan, 3.0]), 0.5) == pytest.approx((1.5, 2.5))


def test_intervals_hold_the_mean_as_often_as_they_promise() -> None:
    """Of 40 normal draws, for which percentile intervals are a little narrow; 0.05 are 3 standard errors."""
    held = 0
    for number in range(400):
        values = torch.randn(40, generator=keyed_generator("coverage", number))
        resampled = values[resamples(40, 400, keyed_generator("resamples", number))].mean(-1)
        low, high = interval(resampled, 0.9)
        held += low <= 0 <= high
    assert held / 400 == pytest.approx(0.88, abs=0.05)
