"""The run on one page: what an adapter draws, how good it is, whether it copies, and where it comes from.

One HTML file that needs no network: pictures lie in it, scripts there are none. Captions and prompts are
other people's words; the template escapes all that it is given but the charts.
"""

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

from sdxl_lora.data.images import decode_image
from sdxl_lora.inference.samples import ORIGINS, Sample, strength_name
from sdxl_lora.reporting.charts import line_chart, stacked_bar
from sdxl_lora.reporting.model_card import change_of
from sdxl_lora.storage.report_io import flatten

_PICTURE_SIDE = 256  # pixels
_NUM_COPIES = 12
_TEMPLATES = Path(__file__).parent / "templates"
_FORECAST = "forecast_gib"


@dataclass(frozen=True)
class Results:
    """What a run left behind, read from its files."""

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
    """The page's HTML.

    Args:
        samples: folder of the samples.
        images: folder of the data set's images.
    """
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("run_page.html.jinja").render(
        title=title,
        gates=results.gates.astype(object).where(results.gates.notna(), None).to_dict("records"),
        num_failed=int((~results.gates["passed"].astype(bool)).sum()),
        strengths=[strength_name(value) for value in _strengths_of(results.samples)],
        groups=_sample_groups(results, samples),
        held_out_loss=_figures(results.metrics, ["held_out_loss"]),
        threshold=results.metrics["copy_threshold"],
        copies=_copy_pairs(results.copies, samples, images),
        loss=Markup(line_chart(*_curve(results.loss), "step", log=False)),
        loss_by_timestep=Markup(
            line_chart(*_curves_by_timestep(results.loss_by_timestep), "timestep", log=True)
        ),
        memory=Markup(_memory_chart(results.training)),
        training=_figures_of_training(results.training),
        facts=results.facts,
    )


def _strengths_of(samples: Sequence[Sample]) -> list[float]:
    return list(dict.fromkeys(sample.strength for sample in samples))


def _sample_groups(results: Results, folder: Path) -> list[dict[str, Any]]:
    """For prompts of each origin their name, rows of pictures, and what was measured of these."""
    groups = []
    for origin in dict.fromkeys(sample.origin for sample in results.samples):
        rows = _sample_rows([sample for sample in results.samples if sample.origin == origin], folder)
        metrics = results.metrics if origin == "free" else results.metrics.get(f"{origin}_captions", {})
        names = [name for name in metrics if name != "held_out_loss"]
        groups.append({"title": ORIGINS[origin], "rows": rows, "figures": _figures(metrics, names)})
    return groups


def _sample_rows(samples: Sequence[Sample], folder: Path) -> list[dict[str, Any]]:
    """A row for each prompt and seed, with its picture at each strength."""
    rows: dict[tuple[str, int], list[str]] = {}
    for sample in samples:
        rows.setdefault((sample.prompt, sample.seed), []).append(_embedded(folder / sample.file))
    return [{"prompt": prompt, "seed": seed, "pictures": row} for (prompt, seed), row in rows.items()]


def _figures(metrics: Mapping[str, Any], names: Sequence[str]) -> list[dict[str, Any]]:
    """Those metrics that base model and adapter both have, with their change and the change's interval."""
    return [
        {
            "name": name.replace("_", " "),
            "base": values["base"],
            "adapter": values["adapter"],
            "change": change_of(name, metrics),
        }
        for name, values in ((name, metrics.get(name)) for name in names)
        if isinstance(values, Mapping) and {"base", "adapter"} <= values.keys()
    ]


def _copy_pairs(copies: pd.DataFrame, samples: Path, images: Path) -> list[dict[str, Any]]:
    """The strongest samples that come nearest to a training image, each beside it; every copy among them."""
    strongest = copies["strength"] == copies["strength"].max()
    drawn = copies[strongest | copies["copied"]].sort_values("similarity", ascending=False)
    shown = drawn.head(max(_NUM_COPIES, int(drawn["copied"].sum())))
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


def _curve(loss: pd.DataFrame) -> tuple[list[float], dict[str, list[float]]]:
    return loss["step"].tolist(), {"training loss": loss["loss"].tolist()}


def _curves_by_timestep(loss: pd.DataFrame) -> tuple[list[float], dict[str, list[float]]]:
    lines = {"base model": loss["base"].tolist(), "adapter": loss["adapter"].tolist()}
    return loss["timestep"].tolist(), lines


def _figures_of_training(training: Mapping[str, Any]) -> dict[str, Any]:
    """Its numbers but the forecast, which is a chart, under readable names."""
    shown = {name: value for name, value in training.items() if name != _FORECAST}
    return {name.replace("_", " "): value for name, value in flatten(shown, ", ")}


def _memory_chart(training: Mapping[str, Any]) -> str:
    """The forecast of training's GPU memory by part, and the peak that was measured; on a CPU, nothing."""
    if _FORECAST not in training:
        return ""
    parts = {name: value for name, value in training[_FORECAST].items() if name != "total"}
    measured, forecast = training["peak_memory_gib"], training[_FORECAST]["total"]
    label = f"measured {measured:.2f} GiB, forecast {forecast:.2f} GiB ({measured / forecast:.0%})"
    return stacked_bar(parts, measured, label, "GiB")


def _embedded(path: Path) -> str:
    """A picture as a data URL, at most PICTURE_SIDE pixels wide and high.

    Raises:
        OSError: there is none at `path`.
    """
    image = decode_image(path.read_bytes())
    image.thumbnail((_PICTURE_SIDE, _PICTURE_SIDE), Image.Resampling.LANCZOS)
    stream = io.BytesIO()
    image.save(stream, "WEBP", quality=85)
    return f"data:image/webp;base64,{base64.b64encode(stream.getvalue()).decode()}"
