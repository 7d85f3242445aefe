"""Recorded choices in place of `auto`, with a stand-in for what plans and chooses."""

import json
from pathlib import Path
from typing import Any

import pytest

from sdxl_lora import paths
from sdxl_lora.config import TrainingConfig, load_params
from sdxl_lora.training.auto_choices import (
    RecordedChoices,
    choices_in,
    recorded_choices,
    with_recorded_choices,
)

REPORT = {
    "steps": 3,
    "attention": "cudnn",
    "plan": {"micro_batch_size": 2, "checkpointing": 5, "recomputed": 0.1},
}


@pytest.fixture(scope="module")
def config() -> TrainingConfig:
    config = load_params(Path("recipes/demo.yaml")).training
    assert (config.attention, config.micro_batch_size, config.checkpointing) == ("auto", "auto", "auto")
    return config


def plan_of(config: TrainingConfig) -> tuple[object, object]:
    return config.micro_batch_size, config.checkpointing


def refuse_cudnn(config: TrainingConfig) -> str:
    if config.attention == "cudnn":
        raise ValueError("no such kernels")
    return config.attention


def test_report_says_what_was_chosen() -> None:
    plan = {"micro_batch_size": 2, "checkpointing": 5}
    assert choices_in(REPORT) == RecordedChoices(plan, {"attention": "cudnn"})
    assert choices_in({"steps": 3}) == RecordedChoices()


def test_project_without_a_note_has_no_recorded_choices(tmp_path: Path) -> None:
    assert recorded_choices(tmp_path) == RecordedChoices()
    note = tmp_path / paths.RECORDED_TRAINING
    note.parent.mkdir(parents=True)
    note.write_text(json.dumps(REPORT))
    assert recorded_choices(tmp_path) == choices_in(REPORT)


def test_recorded_choices_stand_in_for_auto(config: TrainingConfig) -> None:
    assert with_recorded_choices(plan_of, config, choices_in(REPORT).plan) == (2, 5)
    assert with_recorded_choices(plan_of, config, {}) == ("auto", "auto")


@pytest.mark.parametrize("given", [{"checkpointing": "none"}, {"micro_batch_size": 1}])
def test_what_params_say_is_kept(config: TrainingConfig, given: dict[str, Any]) -> None:
    expected = {**choices_in(REPORT).plan, **given}
    found = with_recorded_choices(plan_of, config.model_copy(update=given), choices_in(REPORT).plan)
    assert found == (expected["micro_batch_size"], expected["checkpointing"])


def test_unavailable_choice_is_named_and_selected_again(
    config: TrainingConfig, caplog: pytest.LogCaptureFixture
) -> None:
    assert with_recorded_choices(refuse_cudnn, config, choices_in(REPORT).attention) == "auto"
    (warning,) = caplog.messages
    assert "training.attention cudnn" in warning
    assert "no such kernels" in warning


def test_what_params_say_and_cannot_be_had_is_refused(config: TrainingConfig) -> None:
    with pytest.raises(ValueError, match="no such kernels"):
        with_recorded_choices(
            refuse_cudnn, config.model_copy(update={"attention": "cudnn"}), {"attention": "math"}
        )
