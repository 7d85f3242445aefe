"""Page about a run: samples, metrics, gates, nearest training images, loss, memory and lineage.

One HTML file without scripts that needs no network: images are embedded in it.
"""

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from PIL import Image

from sdxl_lora.data.images import decode_image
from sdxl_lora.inference.samples import ORIGINS, Sample, strength_name
from sdxl_lora.reporting.charts import line_chart, stacked_bar
from sdxl_lora.reporting.metric_rows import metric_rows
from sdxl_lora.reporting.page import render_page
from sdxl_lora.storage.report_io import flatten

_IMAGE_SIDE = 256  # pixels
_MIN_PAIRS = 12
_FORECAST = "forecast_gib"


@dataclass(frozen=True)
class Results:
    """The results of a run, read from its files."""

    samples: Sequence[Sample]
    metrics: Mapping[str, Any]
    training: Mapping[str, Any]
    gates: pd.DataFrame
    copies: pd.DataFrame
    loss: pd.DataFrame
    loss_by_timestep: pd.DataFrame
    facts: Mapping[str, str]
    """Lineage."""


def render_run_page(title: str, results: Results, samples: Path, images: Path) -> str:
    """Return the page's HTML.

    Args:
        samples: folder of the samples.
        images: folder of the data set's images.
    """
    return render_page(
        "run_page.html.jinja",
        title=title,
        gates=results.gates.astype(object).where(results.gates.notna(), None).to_dict("records"),
        num_failed=int((~results.gates["passed"].astype(bool)).sum()),
        strengths=[strength_name(value) for value in _strengths_of(results.samples)],
        groups=_sample_groups(results, samples),
        held_out_loss=metric_rows(results.metrics, ["held_out_loss"]),
        threshold=results.metrics["copy_threshold"],
        copies=_copy_pairs(results.copies, samples, images),
        loss=line_chart(*_loss_curve(results.loss), "step", log=False),
        loss_by_timestep=line_chart(*_loss_by_timestep(results.loss_by_timestep), "timestep", log=True),
        memory=_memory_chart(results.training),
        training=_training_figures(results.training),
        facts=results.facts,
    )


def _strengths_of(samples: Sequence[Sample]) -> list[float]:
    return list(dict.fromkeys(sample.strength for sample in samples))


def _sample_groups(results: Results, folder: Path) -> list[dict[str, Any]]:
    """Return for the prompts of each origin a title, rows of images, and their metrics."""
    groups = []
    for origin in dict.fromkeys(sample.origin for sample in results.samples):
        rows = _sample_rows([sample for sample in results.samples if sample.origin == origin], folder)
        metrics = results.metrics if origin == "free" else results.metrics.get(f"{origin}_captions", {})
        names = [name for name in metrics if name != "held_out_loss"]
        groups.append({"title": ORIGINS[origin], "rows": rows, "metrics": metric_rows(metrics, names)})
    return groups


def _sample_rows(samples: Sequence[Sample], folder: Path) -> list[dict[str, Any]]:
    """Return a row for each prompt and seed, with its image at each strength."""
    rows: dict[tuple[str, int], list[str]] = {}
    for sample in samples:
        rows.setdefault((sample.prompt, sample.seed), []).append(_embedded(folder / sample.file))
    return [{"prompt": prompt, "seed": seed, "images": row} for (prompt, seed), row in rows.items()]


def _copy_pairs(copies: pd.DataFrame, samples: Path, images: Path) -> list[dict[str, Any]]:
    """Return samples with their nearest training images, the most similar first.

    Contains every copy, and samples at the highest strength until there are at least `_MIN_PAIRS`.
    """
    strongest = copies["strength"] == copies["strength"].max()
    candidates = copies[strongest | copies["copied"]].sort_values("similarity", ascending=False)
    # A copy is one by its similarity, so that the copies come first and none is cut off.
    shown = candidates.head(max(_MIN_PAIRS, int(candidates["copied"].sum())))
    return [
        {
            "sample": _embedded(samples / str(row.file)),
            "image": _embedded(images / str(row.training_image)),
            "name": row.training_image,
            "strength": strength_name(float(str(row.strength))),
            "origin": ORIGINS[row.origin],
            "similarity": row.similarity,
            "copied": bool(row.copied),
        }
        for row in shown.itertuples()
    ]


def _loss_curve(loss: pd.DataFrame) -> tuple[list[float], dict[str, list[float]]]:
    return loss["step"].tolist(), {"training loss": loss["loss"].tolist()}


def _loss_by_timestep(loss: pd.DataFrame) -> tuple[list[float], dict[str, list[float]]]:
    lines = {"base model": loss["base"].tolist(), "adapter": loss["adapter"].tolist()}
    return loss["timestep"].tolist(), lines


def _training_figures(training: Mapping[str, Any]) -> dict[str, Any]:
    """Return the training's numbers under readable names, without the forecast, which is a chart."""
    shown = {name: value for name, value in training.items() if name != _FORECAST}
    return {name.replace("_", " "): value for name, value in flatten(shown, ", ")}


def _memory_chart(training: Mapping[str, Any]) -> str:
    """Plot the forecast of training's GPU memory by part, and the measured peak; empty on a CPU."""
    if _FORECAST not in training:
        return ""
    parts = {name: value for name, value in training[_FORECAST].items() if name != "total"}
    measured, forecast = training["peak_memory_gib"], training[_FORECAST]["total"]
    label = f"measured {measured:.2f} GiB, forecast {forecast:.2f} GiB ({measured / forecast:.0%})"
    return stacked_bar(parts, measured, label, "GiB")


def _embedded(path: Path) -> str:
    """Return an image as a data URL, at most `_IMAGE_SIDE` pixels wide and high.

    Raises:
        OSError: there is no file at `path`.
    """
    image = decode_image(path.read_bytes())
    image.thumbnail((_IMAGE_SIDE, _IMAGE_SIDE), Image.Resampling.LANCZOS)
    stream = io.BytesIO()
    image.save(stream, "WEBP", quality=85)
    return f"data:image/webp;base64,{base64.b64encode(stream.getvalue()).decode()}"
