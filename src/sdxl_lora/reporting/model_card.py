"""The page that introduces the adapter, in the Hub's format: a YAML header and Markdown."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from sdxl_lora.config import ExportConfig, ModelConfig
from sdxl_lora.inference.samples import Sample
from sdxl_lora.storage.repository import is_local_folder

_PAGE = """\
{header}
# {title}

![Samples: a row a prompt, a column a strength of the adapter]({grid})

A LoRA for {base}, rank {rank}, alpha {alpha:g}.{trigger}

## Use

With [diffusers](https://huggingface.co/docs/diffusers):

```python
import torch
from diffusers import StableDiffusionXLPipeline

pipeline = StableDiffusionXLPipeline.from_pretrained({base!r}, torch_dtype=torch.float16).to("cuda")
pipeline.load_lora_weights(".", weight_name={weights!r})  # or the name of this repository
image = pipeline({prompt!r}).images[0]
```

In ComfyUI, put `{kohya}` into `models/loras` and choose it in a *Load LoRA* node between checkpoint and
prompts; in A1111 and Forge, into `models/Lora`. Strength 1 is the adapter as it was trained.

## Results

| | base model | adapter | change, with its interval |
|---|---|---|---|
{results}

{verdict}

## Where it comes from

| | |
|---|---|
{facts}

Both files' headers say the same. The samples were drawn with seeds {seeds}; each PNG says how.
"""


def model_card(
    config: ExportConfig,
    model: ModelConfig,
    pictures: Sequence[tuple[str, Sample]],
    details: Mapping[str, Any],
    metrics: Mapping[str, Any],
    failures: Sequence[str],
    facts: Mapping[str, str],
) -> str:
    """The card's text.

    Args:
        pictures: path beside the card and sample, of pictures to show.
        details: `grid`, `weights`, `kohya`, names of files; `rank`, `alpha`; `trigger`, phrase or None.
        metrics: content of metrics.json.
        failures: why gates failed; none if all passed.
        facts: lineage.
    """
    data = ModelCardData(
        base_model=None if is_local_folder(model.base) else model.base,
        library_name="diffusers",
        license=config.license,
        pipeline_tag="text-to-image",
        tags=["text-to-image", "stable-diffusion-xl", "lora", "diffusers", "template:sd-lora"],
        instance_prompt=details["trigger"],
        widget=[{"text": sample.prompt, "output": {"url": path}} for path, sample in pictures],
    )
    trigger = (
        f" Prompts that begin with *{escape_markdown(details['trigger'])}* call it."
        if details["trigger"]
        else ""
    )
    return _PAGE.format(
        **{**details, "trigger": trigger},
        header=f"---\n{data.to_yaml()}\n---\n",
        title=escape_markdown(config.title),
        base=model.base,
        prompt=pictures[0][1].prompt if pictures else "",
        results="\n".join(_result_rows(metrics)),
        verdict="It passed all of its gates." if not failures else _failed_gates(failures),
        facts="\n".join(f"| {name} | `{fact}` |" for name, fact in facts.items()),
        seeds=", ".join(str(seed) for seed in sorted({sample.seed for _, sample in pictures})),
    )


def _result_rows(metrics: Mapping[str, Any]) -> list[str]:
    """A row of Markdown for each metric that base model and adapter both have."""
    rows = []
    for name, values in metrics.items():
        if isinstance(values, Mapping) and {"base", "adapter"} <= values.keys():
            change = change_of(name, metrics)
            title = name.replace("_", " ")
            rows.append(f"| {title} | {values['base']:.4g} | {values['adapter']:.4g} | {change} |")
    return rows


def change_of(name: str, metrics: Mapping[str, Any]) -> str:
    """By how much the adapter changes a metric, with the ends of its interval; empty if that is not known."""
    if name == "held_out_loss":
        loss = metrics[name]
        ends = f"{loss['change_percent_low']:+.3g} to {loss['change_percent_high']:+.3g}"
        return f"{loss['change_percent']:+.3g} % ({ends})"
    if change := metrics["change"].get(name):
        return f"{change['mean']:+.3g} ({change['low']:+.3g} to {change['high']:+.3g})"
    return ""


def _failed_gates(failures: Sequence[str]) -> str:
    return "**It failed its gates**: " + "; ".join(failures) + "."


def escape_markdown(text: str) -> str:
    """`text` with nothing in it that Markdown or HTML would take for its own."""
    for mark in "\\`*_{}[]<>#|":
        text = text.replace(mark, f"\\{mark}")
    return text


def card_pictures(samples: Sequence[Sample], limit: int) -> list[Sample]:
    """The adapter's first picture of each free prompt, at most `limit`."""
    free = [sample for sample in samples if sample.origin == "free" and sample.strength == 1]
    first = {sample.prompt: sample for sample in reversed(free)}
    chosen = [sample for sample in samples if first.get(sample.prompt) == sample]
    return chosen[:limit]


def picture_name(sample: Sample) -> str:
    """Where a sample lies beside the card."""
    return f"images/{Path(sample.file).name}"
