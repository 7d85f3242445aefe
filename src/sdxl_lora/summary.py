"""What the last run made and where it lies, read from its reports: `python -m sdxl_lora.summary`."""

import sys
from collections.abc import Mapping

from sdxl_lora import paths
from sdxl_lora.reports import read_numbers


def comparison(metrics: Mapping[str, object]) -> str:
    """A table of every metric that has a value for the base model and for the adapter."""
    rows = [
        (name.replace("_", " "), f"{values['base']:.4f}", f"{values['adapter']:.4f}")
        for name, values in metrics.items()
        if isinstance(values, Mapping) and {"base", "adapter"} <= values.keys()
    ]
    table = [("", "base", "adapter"), *rows]
    return "\n".join(f"  {name:28}{base:>10}{adapter:>10}" for name, base, adapter in table)


def mlflow_line(pointer: Mapping[str, object]) -> str:
    """Where the run is in MLflow, or how to get it there."""
    match pointer:
        case {"mlflow": {"run": str(name), "id": str(run_id)}}:
            return f"run {name} ({run_id}): `make ui` shows it"
    return "not reached during the run: `.venv/bin/dvc repro -sf track_run` logs these results now"


def summary() -> str:
    """The places of the last run's results, and its metrics.

    Raises:
        FileNotFoundError: a stage has not run yet; names it.
    """
    metrics = read_numbers(paths.METRICS, "evaluate_lora")
    pointer = read_numbers(paths.MLFLOW_POINTER, "track_run")
    places = {
        "pictures": f"{paths.SAMPLE_GRID} (a row a prompt, a column a strength of the adapter)",
        "adapter": str(paths.LORA),
        "metrics": str(paths.METRICS),
        "MLflow": mlflow_line(pointer),
    }
    lines = [f"  {name:10}{place}" for name, place in places.items()]
    return "\n".join(["", comparison(metrics), "", *lines])


def main() -> None:
    try:
        print(summary())
    except FileNotFoundError as error:
        sys.exit(f"summary: {error}")


if __name__ == "__main__":
    main()
