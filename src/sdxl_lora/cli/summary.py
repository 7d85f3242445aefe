"""What the last run made and where it lies, read from its reports: `python -m sdxl_lora.cli.summary`."""

import sys
from collections.abc import Mapping
from typing import Any

import pandas as pd

from sdxl_lora import paths
from sdxl_lora.storage.report_io import read_numbers

_Metrics = Mapping[str, Any]


def comparison(metrics: _Metrics) -> str:
    """A table of every metric that has a value for the base model and for the adapter."""
    rows = {
        name.replace("_", " "): values
        for name, values in metrics.items()
        if isinstance(values, Mapping) and {"base", "adapter"} <= values.keys()
    }
    table = pd.DataFrame.from_dict(rows, orient="index")
    strengths = [name for name in map(str, table) if name == "base" or name.startswith("strength_")]
    table = table[[*strengths, "adapter"]].rename(columns=lambda name: name.replace("_", " "))
    text: str = table.to_string(float_format="{:.4f}".format, na_rep="")
    return "\n".join(f"  {line}" for line in text.splitlines())


def findings(metrics: _Metrics, training: _Metrics) -> dict[str, str]:
    """What the figures say: what was learned, what was forgotten, what it took."""
    minutes, seconds = divmod(round(training["seconds"]), 60)
    loss = metrics["held_out_loss"]
    found = {"learned": f"held-out loss {100 * (loss['adapter'] / loss['base'] - 1):+.1f} %"}
    if style := metrics.get("style_probability"):
        found["learned"] += f", style probability {style['base']:.2f} -> {style['adapter']:.2f}"
    if others := metrics.get("other_style_probability"):
        kept = others["adapter"] / others["base"]
        found["forgotten"] = f"prompts in other styles keep {100 * kept:.1f} % of their style probability"
    found["training"] = (
        f"{training['steps']} steps in {minutes} min {seconds:02d} s, "
        f"{training['peak_memory_gib']:.1f} GiB at most, adapter of {metrics['adapter_bytes'] / 1e6:.1f} MB"
    )
    return found


def mlflow_line(pointer: Mapping[str, object]) -> str:
    """Where the run is in MLflow, or how to get it there."""
    match pointer:
        case {"mlflow": {"run": str(name), "id": str(run_id)}}:
            return f"run {name} ({run_id}): `make ui` shows it"
    return "not reached during the run: `.venv/bin/dvc repro -sf track_run` logs these results now"


def _summary() -> str:
    """What the last run found, its metrics, and the places of its results.

    Raises:
        FileNotFoundError: a stage has not run yet; names it.
    """
    metrics = read_numbers(paths.METRICS, "evaluate_lora")
    training = read_numbers(paths.TRAINING_REPORT, "train_lora")
    pointer = read_numbers(paths.MLFLOW_POINTER, "track_run")
    places = {
        "pictures": f"{paths.SAMPLE_GRID} (a row a prompt, a column a strength of the adapter)",
        "adapter": str(paths.LORA),
        "metrics": str(paths.METRICS),
        "MLflow": mlflow_line(pointer),
    }
    return "\n".join(["", comparison(metrics), "", *_lines(findings(metrics, training)), "", *_lines(places)])


def _lines(facts: Mapping[str, str]) -> list[str]:
    return [f"  {name:10}{fact}" for name, fact in facts.items()]


def main() -> None:
    try:
        print(_summary())
    except FileNotFoundError as error:
        sys.exit(f"summary: {error}")


if __name__ == "__main__":
    main()
