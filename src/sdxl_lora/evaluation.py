"""What an adapter is worth: base model against adapter on held-out images and on samples.

Every draw is fixed by `evaluation.seed`, so that two adapters meet the same noise.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import fmean

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize
from transformers import CLIPModel, CLIPProcessor

from sdxl_lora.config import EvaluationConfig, StyleConfig
from sdxl_lora.dataset import EncodedDataset
from sdxl_lora.denoising import Denoiser
from sdxl_lora.lora import strength
from sdxl_lora.metrics import clip_score, retrieval_at_1, zero_shot_probability
from sdxl_lora.randomness import generator
from sdxl_lora.samples import Sample, strength_name
from sdxl_lora.sources import open_repository


@dataclass(frozen=True)
class HeldOutError:
    """Mean squared error of one held-out example under one draw of noise."""

    timestep: int
    base: float
    adapter: float


@torch.no_grad()
def held_out_errors(
    denoiser: Denoiser, dataset: EncodedDataset, config: EvaluationConfig
) -> Iterator[list[HeldOutError]]:
    """Unweighted denoising errors of held-out examples with and without the adapter, a batch at a time."""
    jobs = held_out_jobs(dataset, config)
    for start in range(0, len(jobs), config.batch_size):
        batch_jobs = jobs[start : start + config.batch_size]
        batch = dataset.batch(index for index, _, _ in batch_jobs).to(denoiser.device)
        timesteps = torch.tensor([timestep for _, timestep, _ in batch_jobs], device=denoiser.device)
        keys = [(dataset.examples[index].id, timestep, number) for index, timestep, number in batch_jobs]
        latents = batch.latents_mean.float()
        noise = torch.stack([evaluation_noise(latents.shape[1:], config.seed, *key) for key in keys])
        errors = {}
        for name, value in (("base", 0.0), ("adapter", 1.0)):
            with strength(denoiser.modules, value):
                errors[name] = denoiser.errors(batch, latents, noise.to(denoiser.device), timesteps).tolist()
        columns = zip(timesteps.tolist(), errors["base"], errors["adapter"], strict=True)
        yield [HeldOutError(*column) for column in columns]


def held_out_jobs(dataset: EncodedDataset, config: EvaluationConfig) -> list[tuple[int, int, int]]:
    """Example index, timestep and number of the noise, of every error to be measured."""
    num_examples = min(len(dataset), config.max_examples or len(dataset))
    return list(product(range(num_examples), config.timesteps, range(config.noises)))


def evaluation_noise(shape: torch.Size, seed: int, example: str, timestep: int, number: int) -> Tensor:
    """Standard normal noise for one example at one timestep, on the CPU."""
    return torch.randn(shape, generator=generator(seed, "evaluation", example, timestep, number))


def held_out_loss(errors: Sequence[HeldOutError]) -> dict[str, float]:
    """Means over all draws, and by how much the adapter changes the base model's, percent."""
    base, adapter = fmean(error.base for error in errors), fmean(error.adapter for error in errors)
    return {"base": base, "adapter": adapter, "change_percent": 100 * (adapter / base - 1)}


def loss_by_timestep(errors: Sequence[HeldOutError]) -> list[dict[str, float]]:
    """Means at each timestep."""
    groups: dict[int, list[HeldOutError]] = defaultdict(list)
    for error in errors:
        groups[error.timestep].append(error)
    return [
        {
            "timestep": timestep,
            "base": fmean(e.base for e in group),
            "adapter": fmean(e.adapter for e in group),
        }
        for timestep, group in sorted(groups.items())
    ]


class ImageTextScorer:
    """CLIP: images and texts as vectors that can be compared."""

    def __init__(self, config: EvaluationConfig, device: torch.device) -> None:
        """Loads the CLIP that `config` names in fp32, from safetensors. Raises as `open_repository`."""
        patterns = ["*.json", "*.txt", "model.safetensors"]
        folder = open_repository(config.clip_model, config.clip_revision, "evaluation.clip_model", patterns)
        self._model = CLIPModel.from_pretrained(folder, dtype=torch.float32, use_safetensors=True)
        self._model.to(device).eval()
        self._processor = CLIPProcessor.from_pretrained(folder)
        self._batch_size = config.batch_size

    @property
    def logit_scale(self) -> float:
        """The inverse of CLIP's temperature."""
        return self._model.logit_scale.exp().item()

    @torch.no_grad()
    def image_features(self, images: Sequence[Image.Image]) -> Tensor:
        """(N, D), each of length 1, on the CPU."""
        batches = []
        for start in range(0, len(images), self._batch_size):
            batch = list(images[start : start + self._batch_size])
            inputs = self._processor.image_processor(images=batch, return_tensors="pt")
            batches.append(self._model.get_image_features(**inputs.to(self._model.device)).pooler_output)
        return normalize(torch.cat(batches), dim=-1).cpu()

    @torch.no_grad()
    def text_features(self, texts: Sequence[str]) -> Tensor:
        """(N, D), each of length 1, on the CPU. Texts are cut at what the model can read."""
        length = self._model.config.text_config.max_position_embeddings
        inputs = self._processor.tokenizer(
            list(texts), padding=True, truncation=True, max_length=length, return_tensors="pt"
        )
        return normalize(
            self._model.get_text_features(**inputs.to(self._model.device)).pooler_output, dim=-1
        ).cpu()


def score_samples(
    samples: Sequence[Sample], folder: Path, scorer: ImageTextScorer, style: StyleConfig | None
) -> dict[str, dict[str, float]]:
    """CLIP's verdict on the samples at each strength.

    Returns:
        By metric and strength (`base`, `adapter`, else as `strength_0.5`): `clip_score`, `retrieval_at_1`
        among the prompts of that strength, and, if there are styles, `style_probability` of prompts in the
        trained style and `other_style_probability` of prompts in the others, each for the style that the
        prompt asks for. The last falls where the adapter makes the model forget.
    """
    scores: dict[str, dict[str, float]] = defaultdict(dict)
    for value in dict.fromkeys(sample.strength for sample in samples):
        chosen = [sample for sample in samples if sample.strength == value]
        prompts = [sample.prompt for sample in chosen]
        images = scorer.image_features([Image.open(folder / sample.file).convert("RGB") for sample in chosen])
        texts = scorer.text_features(prompts)
        name = strength_name(value).replace(" ", "_")
        scores["clip_score"][name] = clip_score(images, texts).mean().item()
        scores["retrieval_at_1"][name] = retrieval_at_1(images, texts, prompts)
        for metric, probability in style_probabilities(prompts, images, scorer, style).items():
            scores[metric][name] = probability
    return dict(scores)


def style_probabilities(
    prompts: Sequence[str], images: Tensor, scorer: ImageTextScorer, style: StyleConfig | None
) -> dict[str, float]:
    """Mean probability of the style that each prompt asks for, apart for the trained style and the others."""
    if style is None:
        return {}
    found: dict[str, list[float]] = defaultdict(list)
    for prompt, image in zip(prompts, images, strict=True):
        candidates = style_candidates(prompt, style)
        if candidates:
            texts = scorer.text_features(candidates)
            probability = zero_shot_probability(image[None], texts[None], scorer.logit_scale).item()
            metric = "style_probability" if style.target in prompt else "other_style_probability"
            found[metric].append(probability)
    return {metric: fmean(values) for metric, values in found.items()}


def style_candidates(prompt: str, style: StyleConfig) -> list[str]:
    """The prompt, and the prompt with each other style in place of its own; nothing if it names no style."""
    styles = [style.target, *style.others]
    own = next((name for name in styles if name in prompt), None)
    if own is None:
        return []
    return [prompt, *(prompt.replace(own, name) for name in styles if name != own)]
