"""What `make demo` says at its end."""

from typing import Any

import pytest

from sdxl_lora.cli.summary import comparison, findings, mlflow_line

METRICS: dict[str, Any] = {
    "held_out_loss": {"base": 0.25, "adapter": 0.125, "change_percent": -50.0},
    "style_probability": {"base": 0.1, "strength_0.5": 0.2, "adapter": 0.75},
    "other_style_probability": {"base": 0.8, "strength_0.5": 0.7, "adapter": 0.6},
    "adapter_bytes": 3_240_000,
}
TRAINING = {"steps": 600, "seconds": 184.6, "peak_memory_gib": 1.04}


def test_every_metric_of_both_models_is_a_row_and_every_strength_a_column() -> None:
    rows = [line.split() for line in comparison(METRICS).splitlines()]
    assert rows == [
        ["base", "strength", "0.5", "adapter"],
        ["held", "out", "loss", "0.2500", "0.1250"],
        ["style", "probability", "0.1000", "0.2000", "0.7500"],
        ["other", "style", "probability", "0.8000", "0.7000", "0.6000"],
    ]


def test_findings_say_what_was_learned_forgotten_and_spent() -> None:
    assert findings(METRICS, TRAINING) == {
        "learned": "held-out loss -50.0 %, style probability 0.10 -> 0.75",
        "forgotten": "prompts in other styles keep 75.0 % of their style probability",
        "training": "600 steps in 3 min 05 s, 1.0 GiB at most, adapter of 3.2 MB",
    }


@pytest.mark.parametrize("missing", ["style_probability", "other_style_probability"])
def test_recipe_without_styles_has_fewer_findings(missing: str) -> None:
    metrics = {name: values for name, values in METRICS.items() if name != missing}
    assert "held-out loss -50.0 %" in findings(metrics, TRAINING)["learned"]


def test_tracked_run_is_named() -> None:
    assert mlflow_line({"mlflow": {"run": "able-fox", "id": "abc"}}).startswith("run able-fox (abc)")


def test_run_that_mlflow_missed_can_be_tracked_later() -> None:
    assert "dvc repro -sf track_run" in mlflow_line({"mlflow": {"run": None, "id": None}})
