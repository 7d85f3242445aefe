from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import CLIPModel, CLIPProcessor

from sdxl_lora.config import EvaluationConfig, StyleConfig, load_params
from sdxl_lora.evaluation.clip import ImageTextScorer
from sdxl_lora.evaluation.metrics import cmmd, gaussian_kernel, pairs
from sdxl_lora.evaluation.sample_metrics import (
    INTERVAL_COLUMNS,
    Metric,
    as_numbers,
    interval_rows,
    mean_of,
    measure,
    sample_metrics,
    style_candidates,
)
from sdxl_lora.inference.samples import Sample
from sdxl_lora.runtime.rng import keyed_generator

CPU = torch.device("cpu")
STYLE = StyleConfig(target="fluent 3d style", others=["noto style", "twemoji style"])


@pytest.fixture(scope="module")
def config() -> EvaluationConfig:
    return load_params(Path("recipes/demo.yaml")).evaluation.model_copy(update={"resamples": 200})


@pytest.fixture(scope="module")
def emoji() -> list[tuple[str, Image.Image]]:
    """Real captions and images of the demo's data set."""
    names = ["alien-monster", "antenna-bars", "articulated-lorry"]
    images = [Image.open(f"demo/dataset/images/{name}.webp").convert("RGB") for name in names]
    return list(zip((f"{name.replace('-', ' ')}, fluent 3d style" for name in names), images, strict=True))


@pytest.fixture(scope="module")
def scorer(config: EvaluationConfig) -> ImageTextScorer:
    return ImageTextScorer(config.model_copy(update={"batch_size": 2}), CPU)


@torch.no_grad()
def logits_by_transformers(images: Sequence[Image.Image], texts: Sequence[str]) -> Tensor:
    """CLIPModel's own logits, (images, texts)."""
    model = CLIPModel.from_pretrained("demo/evaluator", dtype=torch.float32).eval()
    processor = CLIPProcessor.from_pretrained("demo/evaluator")
    return model(
        **processor(text=list(texts), images=list(images), return_tensors="pt", padding=True)
    ).logits_per_image


def write_samples(folder: Path, images: Sequence[tuple[str, Image.Image]], strength: float) -> list[Sample]:
    samples = []
    for number, (prompt, image) in enumerate(images):
        samples.append(Sample(f"{strength:g}-{number}.png", prompt, 0, strength))
        image.save(folder / samples[-1].file)
    return samples


def scores(
    samples: Sequence[Sample], folder: Path, scorer: ImageTextScorer, style: StyleConfig | None
) -> dict[str, dict[str, float]]:
    """Values by metric and strength."""
    features = scorer.image_features(Image.open(folder / sample.file) for sample in samples)
    everyone = sample_metrics(samples, features, features[:0], scorer, style)
    return {
        metric.name: {
            name: s(torch.arange(metric.num_samples)).item() for name, s in metric.statistics.items()
        }
        for metric in everyone
    }


def test_scores_are_those_of_transformers(
    scorer: ImageTextScorer, emoji: list[tuple[str, Image.Image]], tmp_path: Path
) -> None:
    prompts, images = [prompt for prompt, _ in emoji], [image for _, image in emoji]
    samples = write_samples(tmp_path, emoji, 1.0)
    found = scores(samples, tmp_path, scorer, STYLE)
    cosines = logits_by_transformers(images, prompts) / scorer.logit_scale
    assert found["clip_score"]["adapter"] == pytest.approx(100 * cosines.diag().mean().item(), rel=1e-4)
    assert found["retrieval_at_1"]["adapter"] == (cosines.argmax(-1) == torch.arange(3)).float().mean().item()
    styles = ["fluent 3d style", "noto style", "twemoji style"]
    probabilities = [
        logits_by_transformers([image], [prompt.replace(styles[0], style) for style in styles]).softmax(-1)
        for prompt, image in emoji
    ]
    expected = torch.cat(probabilities)[:, 0].mean().item()
    assert found["style_probability"]["adapter"] == pytest.approx(expected, rel=1e-3)


def test_each_strength_is_scored_apart(
    scorer: ImageTextScorer, emoji: list[tuple[str, Image.Image]], tmp_path: Path
) -> None:
    prompts, images = [prompt for prompt, _ in emoji], [image for _, image in emoji]
    swapped = list(zip(prompts, [*images[1:], images[0]], strict=True))
    samples = [
        *write_samples(tmp_path, swapped, 0.0),
        *write_samples(tmp_path, emoji, 0.5),
        *write_samples(tmp_path, emoji, 1.0),
    ]
    found = scores(samples, tmp_path, scorer, None)
    assert set(found) == {"clip_score", "retrieval_at_1", "diversity"}
    assert set(found["clip_score"]) == {"base", "strength_0.5", "adapter"}
    assert found["clip_score"]["base"] < found["clip_score"]["adapter"]
    # The same pictures, but one is alone in a batch: off by sqrt(500 products) 2^-24 in each of 10 layers.
    assert found["clip_score"]["strength_0.5"] == pytest.approx(found["clip_score"]["adapter"], rel=1e-5)
    assert found["retrieval_at_1"] == {"base": 0.0, "strength_0.5": 1.0, "adapter": 1.0}


def test_prompts_in_other_styles_are_scored_for_their_own(
    scorer: ImageTextScorer, emoji: list[tuple[str, Image.Image]], tmp_path: Path
) -> None:
    """A model that generates all in the trained style has forgotten the others, and the score shows it."""
    asked_for_noto = [(prompt.replace(STYLE.target, "noto style"), image) for prompt, image in emoji]
    kept = scores(write_samples(tmp_path, emoji, 1.0), tmp_path, scorer, STYLE)
    forgotten = scores(write_samples(tmp_path, asked_for_noto, 1.0), tmp_path, scorer, STYLE)
    assert "style_probability" not in forgotten
    assert "other_style_probability" not in kept
    assert forgotten["other_style_probability"]["adapter"] < 0.5 < kept["style_probability"]["adapter"]


@pytest.mark.parametrize(
    ("prompt", "candidates"),
    [
        ("pizza, fluent 3d style", ["fluent 3d style", "noto style", "twemoji style"]),
        ("pizza, twemoji style", ["twemoji style", "fluent 3d style", "noto style"]),
    ],
)
def test_style_competes_with_all_others_own_first(prompt: str, candidates: list[str]) -> None:
    assert style_candidates(prompt, STYLE) == [f"pizza, {style}" for style in candidates]


def test_prompt_without_a_style_is_left_out() -> None:
    assert style_candidates("pizza", STYLE) == []


def test_long_prompt_is_cut_rather_than_refused(scorer: ImageTextScorer) -> None:
    assert scorer.text_features(["pizza " * 200]).shape[0] == 1


def test_missing_evaluator_names_its_key(config: EvaluationConfig) -> None:
    with pytest.raises(FileNotFoundError, match=r"evaluation\.clip_model"):
        ImageTextScorer(config.model_copy(update={"clip_model": "./nowhere"}), CPU)


def test_style_distance_and_diversity_are_of_the_images_in_the_trained_style(
    scorer: ImageTextScorer, emoji: list[tuple[str, Image.Image]], tmp_path: Path
) -> None:
    other = ("pizza, noto style", Image.new("RGB", (128, 128), "red"))
    samples = write_samples(tmp_path, [*emoji, other], 1.0)
    features = scorer.image_features(Image.open(tmp_path / sample.file) for sample in samples)
    held_out = torch.nn.functional.normalize(
        torch.randn(4, features.shape[1], generator=keyed_generator("held out")), dim=-1
    )
    found = {m.name: m for m in sample_metrics(samples, features, held_out, scorer, STYLE)}
    kernels = pairs(gaussian_kernel(features[:3], features[:3])), pairs(gaussian_kernel(held_out, held_out))
    expected = cmmd(*kernels, gaussian_kernel(features[:3], held_out))
    assert found["style_distance"].num_samples == 3
    # Kernels between 0 and 1, 1,000 times their means' difference: some roundings of numbers up to 2,000.
    distance = found["style_distance"].statistics["adapter"](torch.arange(3))
    torch.testing.assert_close(distance, expected, rtol=0, atol=8 * 2000 * 2**-24)
    assert found["diversity"].num_samples == 4


def test_single_image_has_neither_distance_nor_diversity(
    scorer: ImageTextScorer, emoji: list[tuple[str, Image.Image]], tmp_path: Path
) -> None:
    samples = write_samples(tmp_path, emoji[:1], 1.0)
    assert set(scores(samples, tmp_path, scorer, None)) == {"clip_score", "retrieval_at_1"}


def test_change_is_of_pairs_and_surer_than_its_parts(config: EvaluationConfig) -> None:
    """Prompts differ much, the adapter lifts each a little: the pairs show what the means cannot."""
    base = torch.randn(20, generator=keyed_generator("base"))
    adapter = base + 0.1 + 0.01 * torch.randn(20, generator=keyed_generator("lift"))
    found = measure(Metric("m", 20, {"base": mean_of(base), "adapter": mean_of(adapter)}), config)
    assert found.change is not None
    mean, low, high = found.change
    assert mean == pytest.approx(0.1, abs=0.01)
    assert 0.08 < low < mean < high < 0.12
    assert found.intervals["base"][1] > found.intervals["adapter"][0]
    assert measure(Metric("m", 20, {"base": mean_of(base), "adapter": mean_of(adapter)}), config) == found


def test_there_is_no_change_without_both_sides(config: EvaluationConfig) -> None:
    found = measure(Metric("m", 3, {"adapter": mean_of(torch.rand(3))}), config)
    assert found.change is None
    assert as_numbers([found])["change"] == {}


def test_numbers_are_a_tree_that_dvc_can_compare(config: EvaluationConfig) -> None:
    statistics = {"base": mean_of(torch.full((2,), 0.4)), "adapter": mean_of(torch.full((2,), 0.1))}
    measurement = measure(Metric("diversity", 2, statistics), config)
    numbers = as_numbers([measurement])
    assert numbers == {
        "diversity": {"base": pytest.approx(0.4), "adapter": pytest.approx(0.1)},
        "diversity_kept": pytest.approx(0.25),
        "change": {"diversity": {name: pytest.approx(-0.3) for name in ("mean", "low", "high")}},
    }
    rows = interval_rows([measurement], "free")
    assert all(tuple(row) == INTERVAL_COLUMNS for row in rows)
    assert [tuple(row.values()) for row in rows] == [
        ("free", "diversity", "base", *[pytest.approx(0.4)] * 3),
        ("free", "diversity", "adapter", *[pytest.approx(0.1)] * 3),
    ]
