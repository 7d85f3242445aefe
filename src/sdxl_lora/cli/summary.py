"""`sdxl-lora summary`: what the last run learned, and where its results are."""

from collections.abc import Mapping
from typing import Any

from sdxl_lora import paths
from sdxl_lora.storage.report_io import read_numbers


def run_summary() -> None:
    """Print the summary.

    Raises:
        FileNotFoundError: a stage has not run yet; names it.
    """
    lines = {
        "learned": learned(read_numbers(paths.METRICS, "evaluate_lora")),
        "images": f"{paths.SAMPLE_GRID} (one row per prompt, one column per strength of the adapter)",
        "adapter": str(paths.EXPORTED_WEIGHTS),
        "report": str(paths.REPORT),
        "MLflow": mlflow_line(read_numbers(paths.MLFLOW_POINTER, "track_run")),
    }
    print("", *(f"  {name:10}{text}" for name, text in lines.items()), sep="\n")


def learned(metrics: Mapping[str, Any]) -> str:
    """Return what the adapter changed: the held-out loss and, where there is a style, its probability."""
    loss = metrics["held_out_loss"]
    text = f"held-out loss {100 * (loss['adapter'] / loss['base'] - 1):+.1f} %"
    if style := metrics.get("style_probability"):
        text += f", style probability {style['base']:.2f} -> {style['adapter']:.2f}"
    if others := metrics.get("other_style_probability"):
        text += f"; prompts in other styles keep {100 * others['adapter'] / others['base']:.1f} % of theirs"
    return text


def mlflow_line(pointer: Mapping[str, object]) -> str:
    """Return where the run is in MLflow, or how to get it there."""
    match pointer:
        case {"mlflow": {"run": str(name), "id": str(run_id)}}:
            return f"run {name} ({run_id}): `make ui` shows it"
    return "not reached during the run: `.venv/bin/dvc repro -sf track_run` logs these results now"
