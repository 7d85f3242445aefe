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

from sdxl_lora.charts import line_chart
from sdxl_lora.images import decode_image
from sdxl_lora.model_card import change_of
from sdxl_lora.samples import Sample, strength_name

PICTURE_SIDE = 256  # pixels
NUM_COPIES = 12
TEMPLATE = "reporting.html.jinja"


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


def page(title: str, results: Results, samples: Path, images: Path) -> str:
    """The page's HTML.

    Args:
        samples: folder of the samples.
        images: folder of the data set's images.
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(TEMPLATE).render(
        title=title,
        gates=results.gates.astype(object).where(results.gates.notna(), None).to_dict("records"),
        num_failed=int((~results.gates["passed"].astype(bool)).sum()),
        strengths=[strength_name(value) for value in strengths_of(results.samples)],
        rows=sample_rows(results.samples, samples),
        figures=figures(results.metrics),
        threshold=results.metrics["copy_threshold"],
        copies=copy_pairs(results.copies, samples, images),
        loss=Markup(line_chart(*curve(results.loss), "step", log=False)),
        loss_by_timestep=Markup(
            line_chart(*curves_by_timestep(results.loss_by_timestep), "timestep", log=True)
        ),
        training=leaves(results.training),
        facts=results.facts,
    )


def strengths_of(samples: Sequence[Sample]) -> list[float]:
    return list(dict.fromkeys(sample.strength for sample in samples))


def sample_rows(samples: Sequence[Sample], folder: Path) -> list[dict[str, Any]]:
    """A row for each prompt and seed, with its picture at each strength."""
    rows: dict[tuple[str, int], list[str]] = {}
    for sample in samples:
        rows.setdefault((sample.prompt, sample.seed), []).append(embedded(folder / sample.file))
    return [{"prompt": prompt, "seed": seed, "pictures": row} for (prompt, seed), row in rows.items()]


def figures(metrics: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Every metric that base model and adapter both have, with its change and the change's interval."""
    return [
        {
            "name": name.replace("_", " "),
            "base": values["base"],
            "adapter": values["adapter"],
            "change": change_of(name, metrics),
        }
        for name, values in metrics.items()
        if isinstance(values, Mapping) and {"base", "adapter"} <= values.keys()
    ]


def copy_pairs(copies: pd.DataFrame, samples: Path, images: Path) -> list[dict[str, Any]]:
    """The strongest samples that come nearest to a training image, each beside it; every copy among them."""
    strongest = copies["strength"] == copies["strength"].max()
    drawn = copies[strongest | copies["copied"]].sort_values("similarity", ascending=False)
    shown = drawn.head(max(NUM_COPIES, int(drawn["copied"].sum())))
    return [
        {
            "sample": embedded(samples / str(row.file)),
            "image": embedded(images / str(row.training_image)),
            "name": row.training_image,
            "strength": strength_name(float(str(row.strength))),
            "similarity": row.similarity,
            "copied": bool(row.copied),
        }
        for row in shown.itertuples()
    ]


def curve(loss: pd.DataFrame) -> tuple[list[float], dict[str, list[float]]]:
    return loss["step"].tolist(), {"training loss": loss["loss"].tolist()}


def curves_by_timestep(loss: pd.DataFrame) -> tuple[list[float], dict[str, list[float]]]:
    lines = {"base model": loss["base"].tolist(), "adapter": loss["adapter"].tolist()}
    return loss["timestep"].tolist(), lines


def leaves(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Values of a nested mapping under readable names."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}".replace("_", " ")
        found |= leaves(value, f"{name}, ") if isinstance(value, Mapping) else {name: value}
    return found


def embedded(path: Path) -> str:
    """A picture as a data URL, at most PICTURE_SIDE pixels wide and high.

    Raises:
        OSError: there is none at `path`.
    """
    image = decode_image(path.read_bytes())
    image.thumbnail((PICTURE_SIDE, PICTURE_SIDE), Image.Resampling.LANCZOS)
    stream = io.BytesIO()
    image.save(stream, "WEBP", quality=85)
    return f"data:image/webp;base64,{base64.b64encode(stream.getvalue()).decode()}"
