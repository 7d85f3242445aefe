from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import write_adapter
from encoded import write_encoded_dataset
from PIL import Image
from torch import Tensor
from transformers import CLIPModel, CLIPProcessor

from sdxl_lora.config import EvaluationConfig, ModelConfig, Params, StyleConfig, load_params
from sdxl_lora.dataset import EncodedDataset
from sdxl_lora.denoising import load_denoiser
from sdxl_lora.evaluation import (
    HeldOutError,
    ImageTextScorer,
    held_out_errors,
    held_out_jobs,
    held_out_loss,
    loss_by_timestep,
    score_samples,
    style_candidates,
)
from sdxl_lora.lora import load_lora
from sdxl_lora.randomness import generator
from sdxl_lora.samples import Sample

CPU = torch.device("cpu")
STYLE = StyleConfig(target="fluent 3d style", others=["noto style", "twemoji style"])


@pytest.fixture(scope="module")
def params() -> Params:
    return load_params(Path("recipes/demo.yaml"))


@pytest.fixture(scope="module")
def config(params: Params) -> EvaluationConfig:
    changes = {"timesteps": [50, 600], "noises": 2, "batch_size": 3, "max_examples": 2}
    return params.evaluation.model_copy(update=changes)


@pytest.fixture(scope="module", params=["frozen", "trained"])
def model(params: Params, request: pytest.FixtureRequest) -> ModelConfig:
    return params.model.model_copy(update={"text_encoders": request.param})


@pytest.fixture(scope="module")
def dataset(params: Params, tmp_path_factory: pytest.TempPathFactory) -> EncodedDataset:
    return write_encoded_dataset(tmp_path_factory.mktemp("evaluation") / "encoded", params.model)


@torch.no_grad()
def by_a_loop(
    unet: Any, text_encoders: Any, dataset: EncodedDataset, config: EvaluationConfig
) -> list[float]:
    """Errors of one model, by a loop over single examples."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2  # SDXL's noise schedule
    alphas = torch.cumprod(1 - betas, 0)
    errors = []
    for index in range(config.max_examples or len(dataset)):
        example = dataset[index]
        embeds, pooled = example.prompt_embeds, example.pooled_prompt_embeds
        if text_encoders is not None:
            first = text_encoders[0](example.token_ids[:, 0], output_hidden_states=True)
            second = text_encoders[1](example.token_ids[:, 1], output_hidden_states=True)
            embeds = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], -1)
            pooled = second.text_embeds
        for timestep in config.timesteps:
            for number in range(config.noises):
                key = (config.seed, "evaluation", dataset.examples[index].id, timestep, number)
                noise = torch.randn(1, 4, 16, 16, generator=generator(*key))
                noisy = alphas[timestep] ** 0.5 * example.latents_mean + (1 - alphas[timestep]) ** 0.5 * noise
                conditions = {"text_embeds": pooled, "time_ids": example.time_ids.float()}
                prediction = unet(noisy, timestep, embeds, added_cond_kwargs=conditions).sample
                errors.append(float(((prediction - noise) ** 2).mean()))
    return errors


def test_held_out_errors_are_those_of_a_loop_over_base_and_adapted_model(
    params: Params, model: ModelConfig, dataset: EncodedDataset, config: EvaluationConfig, tmp_path: Path
) -> None:
    trained = write_adapter(tmp_path, model, params.lora)
    base = load_denoiser(model, "fp32", CPU)
    denoiser = load_denoiser(model, "fp32", CPU)
    load_lora(tmp_path, denoiser.unet, denoiser.text_encoders)
    errors = [error for batch in held_out_errors(denoiser, dataset, config) for error in batch]
    expected_base = by_a_loop(base.unet, base.text_encoders, dataset, config)
    expected_adapter = by_a_loop(trained.unet, trained.text_encoders, dataset, config)
    assert [error.base for error in errors] == pytest.approx(expected_base, rel=1e-4)
    assert [error.adapter for error in errors] == pytest.approx(expected_adapter, rel=1e-4)
    assert all(abs(e.adapter / e.base - 1) > 1e-3 for e in errors)
    assert [error.timestep for error in errors] == [50, 50, 600, 600] * 2


def test_held_out_errors_do_not_depend_on_the_batch(
    params: Params, dataset: EncodedDataset, config: EvaluationConfig, tmp_path: Path
) -> None:
    denoiser = write_adapter(tmp_path, params.model, params.lora)
    small = [e for batch in held_out_errors(denoiser, dataset, config) for e in batch]
    torch.manual_seed(3)
    larger = config.model_copy(update={"batch_size": 12})
    large = [e for batch in held_out_errors(denoiser, dataset, larger) for e in batch]
    assert [e.base for e in small] == pytest.approx([e.base for e in large], rel=1e-4)
    assert [e.adapter for e in small] == pytest.approx([e.adapter for e in large], rel=1e-4)


@pytest.mark.parametrize(("max_examples", "jobs"), [(None, 8 * 4), (3, 3 * 4), (100, 8 * 4)])
def test_at_most_max_examples_are_measured(
    dataset: EncodedDataset, config: EvaluationConfig, max_examples: int | None, jobs: int
) -> None:
    limited = config.model_copy(update={"max_examples": max_examples})
    assert len(held_out_jobs(dataset, limited)) == jobs


def test_losses_are_means_in_all_and_by_timestep() -> None:
    errors = [HeldOutError(600, 0.2, 0.1), HeldOutError(50, 1.0, 0.5), HeldOutError(50, 0.6, 0.6)]
    assert held_out_loss(errors) == pytest.approx({"base": 0.6, "adapter": 0.4, "change_percent": -100 / 3})
    assert loss_by_timestep(errors) == [
        {"timestep": 50, "base": 0.8, "adapter": 0.55},
        {"timestep": 600, "base": 0.2, "adapter": 0.1},
    ]


@pytest.fixture(scope="module")
def emoji() -> list[tuple[str, Image.Image]]:
    """Real captions and pictures of the demo's data set."""
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


def write_samples(folder: Path, pictures: Sequence[tuple[str, Image.Image]], strength: float) -> list[Sample]:
    samples = []
    for number, (prompt, image) in enumerate(pictures):
        samples.append(Sample(f"{strength:g}-{number}.png", prompt, 0, strength))
        image.save(folder / samples[-1].file)
    return samples


def test_scores_are_those_of_transformers(
    scorer: ImageTextScorer, emoji: list[tuple[str, Image.Image]], tmp_path: Path
) -> None:
    prompts, images = [prompt for prompt, _ in emoji], [image for _, image in emoji]
    samples = write_samples(tmp_path, emoji, 1.0)
    scores = score_samples(samples, tmp_path, scorer, STYLE)
    cosines = logits_by_transformers(images, prompts) / scorer.logit_scale
    assert scores["clip_score"]["adapter"] == pytest.approx(100 * cosines.diag().mean().item(), rel=1e-4)
    assert (
        scores["retrieval_at_1"]["adapter"] == (cosines.argmax(-1) == torch.arange(3)).float().mean().item()
    )
    styles = ["fluent 3d style", "noto style", "twemoji style"]
    probabilities = [
        logits_by_transformers([image], [prompt.replace(styles[0], style) for style in styles]).softmax(-1)
        for prompt, image in emoji
    ]
    expected = torch.cat(probabilities)[:, 0].mean().item()
    assert scores["style_probability"]["adapter"] == pytest.approx(expected, rel=1e-3)


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
    scores = score_samples(samples, tmp_path, scorer, None)
    assert set(scores) == {"clip_score", "retrieval_at_1"}
    assert set(scores["clip_score"]) == {"base", "strength_0.5", "adapter"}
    assert scores["clip_score"]["base"] < scores["clip_score"]["adapter"]
    assert scores["clip_score"]["strength_0.5"] == scores["clip_score"]["adapter"]
    assert scores["retrieval_at_1"] == {"base": 0.0, "strength_0.5": 1.0, "adapter": 1.0}


def test_prompts_in_other_styles_are_scored_for_their_own(
    scorer: ImageTextScorer, emoji: list[tuple[str, Image.Image]], tmp_path: Path
) -> None:
    """A model that draws all in the trained style has forgotten the others, and the score shows it."""
    asked_for_noto = [(prompt.replace(STYLE.target, "noto style"), image) for prompt, image in emoji]
    kept = score_samples(write_samples(tmp_path, emoji, 1.0), tmp_path, scorer, STYLE)
    forgotten = score_samples(write_samples(tmp_path, asked_for_noto, 1.0), tmp_path, scorer, STYLE)
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
