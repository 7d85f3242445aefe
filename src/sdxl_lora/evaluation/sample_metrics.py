"""What CLIP says of the samples, base model against adapter, and how sure that is.

Every metric is a statistic of a set of samples. The same prompts and seeds are drawn at each strength, so the
bootstrap resamples them together: the interval of a change is that of paired differences.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

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
from sdxl_lora.inference.samples import Origin, Sample, strength_name
from sdxl_lora.runtime.rng import keyed_generator

INTERVAL_COLUMNS = ("origin", "metric", "strength", "value", "low", "high")
_FEWEST_PICTURES = 3
"""Behind a distance or a diversity: two are one pair, whose interval would be a point."""

_Statistic = Callable[[Tensor], Tensor]
"""A figure of the samples at these indices, (N,): a scalar."""


@dataclass
class Metric:
    """One figure of merit at every strength."""

    name: str
    num_samples: int
    """At each strength."""
    statistics: dict[str, _Statistic] = field(default_factory=dict)
    """By strength."""


@dataclass(frozen=True)
class _Measurement:
    """A metric's values, and what the bootstrap says of them."""

    name: str
    values: dict[str, float]
    """By strength."""
    intervals: dict[str, tuple[float, float]]
    """By strength: where the value lies with the confidence that params ask for."""
    change: tuple[float, float, float] | None
    """Adapter minus base model, and the ends of its interval; None if one of them was not sampled."""


def measure(metric: Metric, config: EvaluationConfig) -> _Measurement:
    """The metric of all samples, with bootstrap intervals (Efron & Tibshirani 1993)."""
    draws = resamples(
        metric.num_samples, config.resamples, keyed_generator(config.seed, "bootstrap", metric.name)
    )
    everyone = torch.arange(metric.num_samples)
    values = {name: statistic(everyone).item() for name, statistic in metric.statistics.items()}
    drawn = {
        name: torch.stack([statistic(indices) for indices in draws])
        for name, statistic in metric.statistics.items()
    }
    intervals = {name: interval(column, config.confidence) for name, column in drawn.items()}
    change = None
    if {"base", "adapter"} <= values.keys():
        ends = interval(drawn["adapter"] - drawn["base"], config.confidence)
        change = (values["adapter"] - values["base"], *ends)
    return _Measurement(metric.name, values, intervals, change)


def as_numbers(measurements: Sequence[_Measurement]) -> dict[str, object]:
    """Values under their names, and in `change` what the adapter changes, with the ends of its interval."""
    values = {m.name: m.values for m in measurements}
    numbers: dict[str, object] = {**values}
    if {"base", "adapter"} <= values.get("diversity", {}).keys():
        numbers["diversity_kept"] = values["diversity"]["adapter"] / values["diversity"]["base"]
    numbers["change"] = {
        m.name: dict(zip(("mean", "low", "high"), m.change, strict=True)) for m in measurements if m.change
    }
    return numbers


def interval_rows(measurements: Sequence[_Measurement], origin: Origin) -> list[dict[str, object]]:
    """A row with INTERVAL_COLUMNS for each metric and strength, of samples with prompts of one origin."""
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
    """The metrics that these samples allow.

    `clip_score`; `retrieval_at_1` among the prompts in the trained style (all, if there are no styles) and
    `other_retrieval_at_1` among the others, at each strength; `diversity` of its pictures;
    `style_distance`, CMMD to the held-out images of the prompts in the trained style (all, if there are no
    styles); and, if there are styles, `style_probability` of prompts in the trained style and
    `other_style_probability` of prompts in the others, each for the style that the prompt asks for. The last
    falls where the adapter makes the model forget. Fewer than FEWEST_PICTURES have no distance or diversity.

    Args:
        features: of the samples, (N, D), each of length 1.
        held_out_features: of real images in the trained style, (M, D), each of length 1.
    """
    found: dict[str, Metric] = {}

    def add(name: str, strength: str, num_samples: int, statistic: _Statistic) -> None:
        metric = found.setdefault(name, Metric(name, num_samples))
        assert metric.num_samples == num_samples, "every strength draws the same prompts and seeds"
        metric.statistics[strength] = statistic

    for value in dict.fromkeys(sample.strength for sample in samples):
        rows = torch.tensor([row for row, sample in enumerate(samples) if sample.strength == value])
        strength, images = strength_name(value).replace(" ", "_"), features[rows]
        prompts = [samples[row].prompt for row in rows.tolist()]
        texts = scorer.text_features(prompts)
        add("clip_score", strength, len(rows), mean_of(clip_score(images, texts)))
        trained = [n for n, prompt in enumerate(prompts) if style is None or style.target in prompt]
        others = [n for n in range(len(prompts)) if n not in trained]
        for name, chosen in (("retrieval_at_1", trained), ("other_retrieval_at_1", others)):
            if chosen:
                hits = retrieval_hits(images[chosen], texts[chosen], [prompts[n] for n in chosen])
                add(name, strength, len(chosen), mean_of(hits))
        for name, values in _style_probabilities(prompts, images, scorer, style).items():
            add(name, strength, len(values), mean_of(values))
        in_style = images[trained]
        if len(in_style) >= _FEWEST_PICTURES and len(held_out_features) > 1:
            distance = _distance_to(in_style, held_out_features)
            add("style_distance", strength, len(in_style), distance)
        if len(images) >= _FEWEST_PICTURES:
            add("diversity", strength, len(images), _diversity_of(images))
    return list(found.values())


def mean_of(values: Tensor) -> _Statistic:
    return lambda indices: values[indices].mean()


def _diversity_of(images: Tensor) -> _Statistic:
    similarities = pairs(images @ images.T)
    return lambda indices: diversity(similarities[indices][:, indices])


def _distance_to(images: Tensor, held_out: Tensor) -> _Statistic:
    """CMMD to the held-out images, which are taken as they are: not resampled."""
    within, across = pairs(gaussian_kernel(images, images)), gaussian_kernel(images, held_out)
    within_held_out = pairs(gaussian_kernel(held_out, held_out))
    return lambda indices: cmmd(within[indices][:, indices], within_held_out, across[indices])


def _style_probabilities(
    prompts: Sequence[str], images: Tensor, scorer: ImageTextScorer, style: StyleConfig | None
) -> Mapping[str, Tensor]:
    """Probability of the style that each prompt asks for, apart for the trained style and the others."""
    if style is None:
        return {}
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
    """The prompt, and the prompt with each other style in place of its own; nothing if it names no style."""
    styles = [style.target, *style.others]
    own = next((name for name in styles if name in prompt), None)
    if own is None:
        return []
    return [prompt, *(prompt.replace(own, name) for name in styles if name != own)]
