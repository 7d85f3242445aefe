"""What `make demo` says at its end."""

from sdxl_lora.summary import comparison, mlflow_line


def test_every_metric_of_both_models_is_a_row() -> None:
    metrics = {
        "held_out_loss": {"base": 0.25, "adapter": 0.125, "change_percent": -50.0},
        "style_probability": {"base": 0.1, "strength_0.5": 0.2, "adapter": 0.75},
        "adapter_bytes": 1024,
    }
    rows = [line.split() for line in comparison(metrics).splitlines()]
    assert rows == [
        ["base", "adapter"],
        ["held", "out", "loss", "0.2500", "0.1250"],
        ["style", "probability", "0.1000", "0.7500"],
    ]


def test_tracked_run_is_named() -> None:
    assert mlflow_line({"mlflow": {"run": "able-fox", "id": "abc"}}).startswith("run able-fox (abc)")


def test_run_that_mlflow_missed_can_be_tracked_later() -> None:
    assert "dvc repro -sf track_run" in mlflow_line({"mlflow": {"run": None, "id": None}})
