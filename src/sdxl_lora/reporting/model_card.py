"""Model card of the exported adapter in the Hub's format: a YAML header and Markdown."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from sdxl_lora.config import ExportConfig, ModelConfig
from sdxl_lora.inference.samples import Sample
from sdxl_lora.reporting.markdown import code, escape, table
from sdxl_lora.reporting.metric_rows import metric_rows
from sdxl_lora.storage.repository import is_local_folder

TEMPLATE = Path(__file__).parent / "templates/model_card.md.jinja"


@dataclass(frozen=True)
class CardFiles:
    """Names of the files next to the card."""

    grid: str
    """One image of all samples."""
    weights: str
    """For diffusers."""
    kohya: str
    """For ComfyUI, A1111 and Forge."""


@dataclass(frozen=True)
class CardAdapter:
    """What the card says of the adapter."""

    rank: int
    alpha: float
    trigger: str | None
    """Phrase at the beginning of every training caption."""
    lineage: Mapping[str, str]


def model_card(
    config: ExportConfig,
    model: ModelConfig,
    adapter: CardAdapter,
    files: CardFiles,
    samples: Sequence[Sample],
    metrics: Mapping[str, Any],
    failures: Sequence[str],
) -> str:
    """Return the card's text.

    Args:
        samples: those to show, whose images lie at `card_image` next to the card.
        metrics: content of metrics.json.
        failures: reasons of the gates that failed; empty if all passed.
    """
    data = ModelCardData(
        base_model=None if is_local_folder(model.base) else model.base,
        library_name="diffusers",
        license=config.license,
        pipeline_tag="text-to-image",
        tags=["text-to-image", "stable-diffusion-xl", "lora", "diffusers", "template:sd-lora"],
        instance_prompt=adapter.trigger,
        widget=[{"text": sample.prompt, "output": {"url": card_image(sample)}} for sample in samples],
    )
    values = card_values(config, model, adapter, files, samples, metrics, failures)
    return str(ModelCard.from_template(data, template_path=str(TEMPLATE), **values))


def card_values(
    config: ExportConfig,
    model: ModelConfig,
    adapter: CardAdapter,
    files: CardFiles,
    samples: Sequence[Sample],
    metrics: Mapping[str, Any],
    failures: Sequence[str],
) -> dict[str, Any]:
    """Return the template's values. They are Markdown: `ModelCard` renders templates without escaping."""
    rows = metric_rows(metrics)
    results = [(row.name, f"{row.base:.4g}", f"{row.adapter:.4g}", row.change) for row in rows]
    lineage = [(escape(name), code(fact)) for name, fact in adapter.lineage.items()]
    failed = f"**It failed its gates**: {escape('; '.join(failures))}."
    return {
        "title": escape(config.title),
        "files": files,
        "base": escape(model.base),
        "rank": adapter.rank,
        "alpha": f"{adapter.alpha:g}",
        "trigger": escape(adapter.trigger) if adapter.trigger else None,
        # Python literals, in a block of code: there nothing is Markdown, and a literal has no line end.
        "base_literal": repr(model.base),
        "weights_literal": repr(files.weights),
        "prompt_literal": repr(samples[0].prompt if samples else ""),
        "results": table(("", "base model", "adapter", "change (interval)"), results),
        "verdict": failed if failures else "It passed all of its gates.",
        "lineage": table(("", ""), lineage),
        "seeds": ", ".join(str(seed) for seed in sorted({sample.seed for sample in samples})),
    }


def card_samples(samples: Sequence[Sample], limit: int) -> list[Sample]:
    """Return the adapter's first sample of each free prompt, at most `limit`."""
    free = [sample for sample in samples if sample.origin == "free" and sample.strength == 1]
    first = {sample.prompt: sample for sample in reversed(free)}
    chosen = [sample for sample in samples if first.get(sample.prompt) == sample]
    return chosen[:limit]


def card_image(sample: Sample) -> str:
    """Return the path of a sample's image, relative to the card."""
    return f"images/{Path(sample.file).name}"
