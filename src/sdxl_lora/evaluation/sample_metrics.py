"""Metrics of the samples by CLIP, base model against adapter, with bootstrap intervals.

Every metric is a statistic of a set of samples. Each strength has the same prompts and seeds, so the
bootstrap resamples them together: the interval of a change is that of paired differences.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from sdxl_lora.config import EvaluationConfig, StyleConfig
from sdxl_lora.evaluation.clip import ImageTextScorer
from sdxl_lora.evaluation.metrics import (
    clip_score,
    cmmd,
    diversity,
    gaussian_kernel,
    interval,
    pairs,
    resamples,
    retrieval_hits,
    zero_shot_probability,
)
from sdxl_lora.inference.samples import Origin, Sample, strength_key
from sdxl_lora.runtime.rng import keyed_generator

INTERVAL_COLUMNS = ("origin", "metric", "strength", "value", "low", "high")
_MIN_IMAGES = 3
"""For a distance or a diversity: two images are one pair, whose interval would be a point."""

_Statistic = Callable[[Tensor], Tensor]
"""A scalar of the samples at these indices, (N,). Indices may repeat: the bootstrap calls it on resamples."""


class _SizedStatistic(NamedTuple):
    """A statistic and the number of samples that it is computed from."""

    num_samples: int
    statistic: _Statistic


@dataclass(frozen=True)
class Metric:
    """One metric at every strength."""

    name: str
    num_samples: int
    """Number of samples at each strength."""
    statistics: dict[str, _Statistic]
    """By strength."""


@dataclass(frozen=True)
class _Measurement:
    """A metric's values and bootstrap intervals."""

    name: str
    values: dict[str, float]
    """By strength."""
    intervals: dict[str, tuple[float, float]]
    """By strength: low and high end at the confidence that params set."""
    change: tuple[float, float, float] | None
    """Adapter minus base model, and the ends of its interval; None if one of them was not sampled."""


def measure(metric: Metric, config: EvaluationConfig) -> _Measurement:
    """Compute the metric of all samples, with bootstrap intervals (Efron & Tibshirani 1993)."""
    generator = keyed_generator(config.seed, "bootstrap", metric.name)
    rows = resamples(metric.num_samples, config.resamples, generator)
    everyone = torch.arange(metric.num_samples)
    values = {name: statistic(everyone).item() for name, statistic in metric.statistics.items()}
    # The same rows at every strength: this is what pairs the samples of one prompt and seed.
    resampled = {
        name: torch.stack([statistic(indices) for indices in rows])
        for name, statistic in metric.statistics.items()
    }
    intervals = {name: interval(column, config.confidence) for name, column in resampled.items()}
    change = None
    if {"base", "adapter"} <= values.keys():
        ends = interval(resampled["adapter"] - resampled["base"], config.confidence)
        change = (values["adapter"] - values["base"], *ends)
    return _Measurement(metric.name, values, intervals, change)


def as_numbers(measurements: Sequence[_Measurement]) -> dict[str, object]:
    """Return values by name, and under `change` each change by the adapter with the ends of its interval."""
    values = {m.name: m.values for m in measurements}
    numbers: dict[str, object] = {**values}
    if {"base", "adapter"} <= values.get("diversity", {}).keys():
        numbers["diversity_kept"] = values["diversity"]["adapter"] / values["diversity"]["base"]
    numbers["change"] = {
        m.name: dict(zip(("mean", "low", "high"), m.change, strict=True)) for m in measurements if m.change
    }
    return numbers


def interval_rows(measurements: Sequence[_Measurement], origin: Origin) -> list[dict[str, object]]:
    """Return a row with INTERVAL_COLUMNS for each metric and strength; all prompts are of one origin."""
    return [
        {
            "origin": origin,
            "metric": m.name,
            "strength": name,
            "value": m.values[name],
            "low": low,
            "high": high,
        }
        for m in measurements
        for name, (low, high) in m.intervals.items()
    ]


def sample_metrics(
    samples: Sequence[Sample],
    features: Tensor,
    held_out_features: Tensor,
    scorer: ImageTextScorer,
    style: StyleConfig | None,
) -> list[Metric]:
    """Return the metrics that these samples allow.

    - `clip_score` of all samples;
    - `retrieval_at_1` among the prompts in the trained style, `other_retrieval_at_1` among the others;
    - `style_probability` of prompts in the trained style and `other_style_probability` of the others, each
      for the style that the prompt names; the latter falls if the adapter makes the model forget styles;
    - `style_distance`, CMMD between the samples of prompts in the trained style and the held-out images;
    - `diversity` of all samples.

    Without `style` all prompts count as in the trained style, and there are no probabilities. Distance and
    diversity need at least `_MIN_IMAGES` images.

    Args:
        features: of the samples, (N, D), each of length 1.
        held_out_features: of real images in the trained style, (M, D), each of length 1.
    """
    by_strength: dict[str, dict[str, _SizedStatistic]] = {}
    for value in dict.fromkeys(sample.strength for sample in samples):
        rows = [row for row, sample in enumerate(samples) if sample.strength == value]
        prompts = [samples[row].prompt for row in rows]
        by_strength[strength_key(value)] = _statistics(
            prompts, features[rows], held_out_features, scorer, style
        )
    names = dict.fromkeys(name for statistics in by_strength.values() for name in statistics)
    return [_metric(name, by_strength) for name in names]


def _metric(name: str, by_strength: Mapping[str, Mapping[str, _SizedStatistic]]) -> Metric:
    """Collect one metric's statistics from every strength that has it."""
    found = {strength: sized[name] for strength, sized in by_strength.items() if name in sized}
    (num_samples,) = {sized.num_samples for sized in found.values()}  # all strengths share prompts and seeds
    return Metric(name, num_samples, {strength: sized.statistic for strength, sized in found.items()})


def _statistics(
    prompts: Sequence[str],
    images: Tensor,
    held_out: Tensor,
    scorer: ImageTextScorer,
    style: StyleConfig | None,
) -> dict[str, _SizedStatistic]:
    """Return the statistics of the samples of one strength, by metric."""
    texts = scorer.text_features(prompts)
    in_style = [n for n, prompt in enumerate(prompts) if style is None or style.target in prompt]
    others = [n for n in range(len(prompts)) if n not in in_style]
    values = {"clip_score": clip_score(images, texts)}
    for name, chosen in (("retrieval_at_1", in_style), ("other_retrieval_at_1", others)):
        if chosen:
            values[name] = retrieval_hits(images[chosen], texts[chosen], [prompts[n] for n in chosen])
    if style is not None:
        values |= _style_probabilities(prompts, images, scorer, style)
    found = {name: _SizedStatistic(len(column), mean_of(column)) for name, column in values.items()}
    if len(in_style) >= _MIN_IMAGES and len(held_out) > 1:
        distance = _distance_to(images[in_style], held_out)
        found["style_distance"] = _SizedStatistic(len(in_style), distance)
    if len(images) >= _MIN_IMAGES:
        found["diversity"] = _SizedStatistic(len(images), _diversity_of(images))
    return found


def mean_of(values: Tensor) -> _Statistic:
    return lambda indices: values[indices].mean()


def _diversity_of(images: Tensor) -> _Statistic:
    similarities = pairs(images @ images.T)  # once: a resample only picks rows and columns
    return lambda indices: diversity(similarities[indices][:, indices])


def _distance_to(images: Tensor, held_out: Tensor) -> _Statistic:
    """Return CMMD to the held-out images, which are not resampled."""
    within, across = pairs(gaussian_kernel(images, images)), gaussian_kernel(images, held_out)
    within_held_out = pairs(gaussian_kernel(held_out, held_out))
    return lambda indices: cmmd(within[indices][:, indices], within_held_out, across[indices])


def _style_probabilities(
    prompts: Sequence[str], images: Tensor, scorer: ImageTextScorer, style: StyleConfig
) -> dict[str, Tensor]:
    """Return the probability of the style that each prompt names, trained style and others apart."""
    found: dict[str, list[Tensor]] = {}
    for prompt, image in zip(prompts, images, strict=True):
        candidates = style_candidates(prompt, style)
        if candidates:
            texts = scorer.text_features(candidates)
            probability = zero_shot_probability(image[None], texts[None], scorer.logit_scale)
            name = "style_probability" if style.target in prompt else "other_style_probability"
            found.setdefault(name, []).append(probability)
    return {name: torch.cat(values) for name, values in found.items()}


def style_candidates(prompt: str, style: StyleConfig) -> list[str]:
    """Return the prompt, and the prompt with its style replaced by each other one; empty without a style."""
    styles = [style.target, *style.others]
    named = next((name for name in styles if name in prompt), None)
    if named is None:
        return []
    return [prompt, *(prompt.replace(named, name) for name in styles if name != named)]
