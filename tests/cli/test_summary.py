"""The last lines of `make demo`."""

from typing import Any

import pytest

from sdxl_lora import paths
from sdxl_lora.cli import summary
from sdxl_lora.cli.summary import learned, mlflow_line
from sdxl_lora.storage.report_io import write_numbers

METRICS: dict[str, Any] = {
    "held_out_loss": {"base": 0.25, "adapter": 0.125, "change_percent": -50.0},
    "style_probability": {"base": 0.1, "strength_0.5": 0.2, "adapter": 0.75},
    "other_style_probability": {"base": 0.8, "strength_0.5": 0.7, "adapter": 0.6},
    "adapter_bytes": 3_240_000,
}


def test_what_was_learned_and_forgotten_is_one_line() -> None:
    assert learned(METRICS) == (
        "held-out loss -50.0 %, style probability 0.10 -> 0.75; prompts in other styles keep 75.0 % of theirs"
    )


@pytest.mark.parametrize("missing", ["style_probability", "other_style_probability"])
def test_recipe_without_styles_still_has_its_loss(missing: str) -> None:
    metrics = {name: values for name, values in METRICS.items() if name != missing}
    assert learned(metrics).startswith("held-out loss -50.0 %")


def test_tracked_run_is_named() -> None:
    assert mlflow_line({"mlflow": {"run": "able-fox", "id": "abc"}}).startswith("run able-fox (abc)")


def test_run_that_mlflow_missed_can_be_tracked_later() -> None:
    assert "dvc repro -sf track_run" in mlflow_line({"mlflow": {"run": None, "id": None}})


def test_every_result_has_its_place(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_numbers(paths.METRICS, METRICS)
    write_numbers(paths.MLFLOW_POINTER, {"mlflow": {"run": "able-fox", "id": "abc"}})
    summary.run_summary()
    printed = capsys.readouterr().out
    for place in (paths.SAMPLE_GRID, paths.EXPORTED_WEIGHTS, paths.REPORT, "run able-fox (abc)"):
        assert str(place) in printed
