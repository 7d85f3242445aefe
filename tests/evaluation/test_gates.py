import copy
from pathlib import Path
from typing import Any

import pytest

from sdxl_lora.config import GatesConfig
from sdxl_lora.evaluation.gates import Gate, evaluate_gates, gate_verdict, read_gate_failures
from sdxl_lora.storage.report_io import write_records

GATES = GatesConfig(
    held_out_loss_change=-5.0,
    style_distance_change=0.0,
    style_probability=0.5,
    clip_score_change=-2.0,
    diversity_kept=0.5,
    copied=0.1,
)
GOOD: dict[str, Any] = {
    "held_out_loss": {"change_percent": -20.0, "change_percent_high": -5.0},
    "change": {"style_distance": {"mean": -3.0, "high": -1.0}, "clip_score": {"mean": -1.0, "low": -4.0}},
    "style_probability": {"base": 0.1, "adapter": 0.5},
    "diversity_kept": 0.9,
    "copied": {"base": 0.0, "adapter": 0.1},
}
BAD = {
    "held_out_loss_change": (("held_out_loss", "change_percent_high"), -4.9, "is -4.9, should be at most -5"),
    "style_distance_change": (("change", "style_distance", "high"), 0.1, "is 0.1, should be at most 0"),
    "style_probability": (("style_probability", "adapter"), 0.4, "is 0.4, should be at least 0.5"),
    "clip_score_change": (("change", "clip_score", "mean"), -2.5, "is -2.5, should be at least -2"),
    "diversity_kept": (("diversity_kept",), 0.1, "is 0.1, should be at least 0.5"),
    "copied": (("copied", "adapter"), 0.2, "is 0.2, should be at most 0.1"),
}


def with_value(path: tuple[str, ...], value: float) -> dict[str, Any]:
    metrics = copy.deepcopy(GOOD)
    place = metrics
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return metrics


def test_adapter_that_reaches_every_limit_passes() -> None:
    gates = evaluate_gates(GOOD, GATES)
    assert gate_verdict(gates) == {"all": 1, **dict.fromkeys(BAD, 1)}
    assert all(gate.reason == "" for gate in gates)


@pytest.mark.parametrize("name", BAD)
def test_one_figure_beyond_its_limit_fails_its_gate_alone_and_says_why(name: str) -> None:
    path, value, reason = BAD[name]
    gates = evaluate_gates(with_value(path, value), GATES)
    assert gate_verdict(gates) == {"all": 0, **dict.fromkeys(BAD, 1), name: 0}
    failed = next(gate for gate in gates if not gate.passed)
    assert failed.value == value
    assert failed.reason == f"{'.'.join(path)} {reason}"


def test_what_is_not_asked_is_not_judged() -> None:
    few = GATES.model_copy(update=dict.fromkeys(BAD) | {"copied": 0.5})
    assert gate_verdict(evaluate_gates({"copied": {"adapter": 0.2}}, few)) == {"all": 1, "copied": 1}


def test_what_was_not_measured_fails() -> None:
    metrics = {key: value for key, value in GOOD.items() if key != "style_probability"}
    failed = [gate for gate in evaluate_gates(metrics, GATES) if not gate.passed]
    assert [(gate.name, gate.value) for gate in failed] == [("style_probability", None)]
    assert failed[0].reason == "style_probability.adapter was not measured"


@pytest.mark.parametrize(
    ("metrics", "failed"),
    [
        (GOOD, {}),
        (
            with_value(("diversity_kept",), 0.1),
            {"diversity_kept": "diversity_kept is 0.1, should be at least 0.5"},
        ),
    ],
    ids=["good", "bad"],
)
def test_table_tells_who_failed_and_why(
    tmp_path: Path, metrics: dict[str, Any], failed: dict[str, str]
) -> None:
    write_records(tmp_path / "gates.csv", Gate, evaluate_gates(metrics, GATES))
    assert read_gate_failures(tmp_path / "gates.csv") == failed


def test_table_without_gates_has_no_failures(tmp_path: Path) -> None:
    write_records(
        tmp_path / "gates.csv", Gate, evaluate_gates(GOOD, GATES.model_copy(update=dict.fromkeys(BAD)))
    )
    assert read_gate_failures(tmp_path / "gates.csv") == {}


def test_missing_table_names_the_stage_to_run(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="dvc repro evaluate_lora"):
        read_gate_failures(tmp_path / "gates.csv")
