import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from sdxl_lora import paths
from sdxl_lora.reproducibility.comparison import DECISIVE, TOLERANCES, compare_runs
from sdxl_lora.reproducibility.run_record import RunRecord

STAGES = ["clean_captions", "encode_dataset", "train_lora", "evaluate_lora"]
METRICS = {"held_out_loss": {"adapter": 0.1}, "style_probability": {"adapter": 0.9}}
CURVE = "step,loss,seconds\n1,0.5,{}\n"


def make_run(
    outs: dict[str, str] | None = None,
    metrics: dict[str, Any] | None = None,
    training: dict[str, Any] | None = None,
    environment: dict[str, Any] | None = None,
    seconds: float = 1.0,
    torn: tuple[Path, ...] = (),
) -> RunRecord:
    """A run of four stages; two without arguments are alike.

    Args:
        outs: hashes of cached outputs.
        torn: files that the record does not hold.
    """
    reports = {
        paths.METRICS: ("evaluate_lora", json.dumps(METRICS if metrics is None else metrics)),
        paths.TRAINING_REPORT: (
            "train_lora",
            json.dumps(training or {"final_loss": 0.5, "seconds": seconds}),
        ),
        paths.LOSS_CURVE: ("train_lora", CURVE.format(seconds)),
        paths.TRAINING_ENVIRONMENT: ("train_lora", json.dumps(environment or {"torch": "2.13.0"})),
        paths.ENCODING_ENVIRONMENT: ("encode_dataset", json.dumps(environment or {"torch": "2.13.0"})),
    }
    cached = {"data/captions.jsonl": "1", "data/encoded": "2", "data/lora": "3", **(outs or {})}
    stages: dict[str, Any] = {
        stage: {"outs": [{"path": path, "md5": digest}]}
        for stage, (path, digest) in zip(STAGES, cached.items(), strict=False)
    }
    stages["evaluate_lora"] = {"outs": []}
    for path, (stage, text) in reports.items():
        digest = hashlib.md5(text.encode()).hexdigest()
        stages[stage]["outs"].append({"path": str(path), "md5": digest})
    files = {path: text for path, (_, text) in reports.items() if path not in torn}
    return RunRecord("a run", "c0ffee", {**files, paths.LOCK: yaml.safe_dump({"stages": stages})})


def verdict(record: RunRecord, again: RunRecord, failure: str | None = None) -> Any:
    return compare_runs(record, again, STAGES, failure)


def test_same_hashes_are_bit_identical_whatever_the_time() -> None:
    found = verdict(make_run(), make_run(seconds=2.0))
    assert (found.outcome, found.first_difference) == ("bit-identical", None)
    states = {out.path: out.state for out in found.outs}
    assert states["data/lora"] == "identical"
    assert states[str(paths.LOSS_CURVE)] == states[str(paths.TRAINING_REPORT)] == "identical but for times"


def test_another_loss_is_no_matter_of_time() -> None:
    found = verdict(make_run(), make_run(training={"final_loss": 0.6, "seconds": 1.0}))
    assert (found.outcome, found.first_difference) == ("within tolerance", "train_lora")


@pytest.mark.parametrize(
    ("outs", "first", "outcome"),
    [
        ({"data/lora": "9"}, "train_lora", "within tolerance"),
        ({"data/encoded": "9", "data/lora": "9"}, "encode_dataset", "within tolerance"),
        ({"data/captions.jsonl": "9", "data/lora": "9"}, "clean_captions", "different"),
    ],
    ids=["adapter", "latents", "captions"],
)
def test_first_stage_that_differs_is_named_and_no_rounding_excuses_other_data(
    outs: dict[str, str], first: str, outcome: str
) -> None:
    found = verdict(make_run(), make_run(outs))
    assert (found.outcome, found.first_difference) == (outcome, first)
    assert first in found.reasons[0]


@pytest.mark.parametrize("sign", [-1, 1])
@pytest.mark.parametrize(("share", "outcome"), [(0.99, "within tolerance"), (1.01, "different")])
@pytest.mark.parametrize("name", ["held_out_loss", "style_probability"])
def test_figures_may_be_as_far_as_another_seeds(name: str, share: float, outcome: str, sign: int) -> None:
    recorded = METRICS[name]["adapter"]
    rule = TOLERANCES[f"{name}/adapter"]
    limit = rule.limit * (recorded if rule.is_share else 1)
    metrics = {**METRICS, name: {"adapter": recorded + sign * share * limit}}
    assert verdict(make_run(), make_run({"data/lora": "9"}, metrics)).outcome == outcome


def test_without_the_decisive_figure_nothing_is_within_tolerance() -> None:
    metrics = {"style_probability": {"adapter": 0.9}}
    found = verdict(make_run(metrics=metrics), make_run({"data/lora": "9"}, metrics))
    assert found.outcome == "different"
    assert DECISIVE in found.reasons[0]


def test_environment_is_compared_fact_by_fact() -> None:
    before = {"libraries": {"torch": "2.13.0"}, "gpu": None, "deterministic": True}
    after = {"libraries": {"torch": "2.12.0"}, "gpu": {"model": "T4"}, "deterministic": True}
    found = verdict(make_run(environment=before), make_run({"data/lora": "9"}, environment=after))
    facts = [(d.name, d.recorded, d.found) for d in found.environment if d.stage == "train_lora"]
    assert (
        facts
        == [
            ("gpu", None, None),
            ("gpu/model", None, "T4"),
            ("libraries/torch", "2.13.0", "2.12.0"),
        ][1:]
    )


def test_what_training_chose_otherwise_is_named() -> None:
    plan = {"micro_batch_size": 2, "checkpointing": 5, "recomputed": 0.1}
    before = {"final_loss": 0.5, "attention": "cudnn", "plan": plan}
    after = {**before, "attention": "sdpa", "plan": {**plan, "checkpointing": 7}}
    found = verdict(make_run(training=before), make_run(training=after))
    assert (found.outcome, found.first_difference) == ("within tolerance", "train_lora")
    choices = {(choice.name, choice.recorded, choice.found) for choice in found.choices}
    assert choices == {("attention", "cudnn", "sdpa"), ("checkpointing", 5, 7)}
    (remark,) = [reason for reason in found.reasons if "did not select" in reason]
    assert "training.attention sdpa instead of cudnn" in remark
    assert "training.checkpointing 7 instead of 5" in remark


def test_same_choices_are_no_remark() -> None:
    training = {"final_loss": 0.5, "attention": "cudnn", "plan": {"micro_batch_size": 2, "checkpointing": 5}}
    found = verdict(make_run(training=training), make_run({"data/lora": "9"}, training=training))
    assert found.choices == []
    assert not [reason for reason in found.reasons if "did not select" in reason]


def test_choices_that_the_record_lacks_are_said() -> None:
    found = verdict(make_run(torn=(paths.TRAINING_REPORT,)), make_run())
    assert f"the record lacks the values selected for `auto`: {paths.TRAINING_REPORT}" in " ".join(
        found.reasons
    )


def test_what_the_record_lacks_is_said() -> None:
    record = make_run(torn=(paths.LOSS_CURVE, paths.TRAINING_ENVIRONMENT))
    found = verdict(record, make_run(seconds=2.0))
    assert found.outcome == "bit-identical"
    assert {out.path: out.state for out in found.outs}[str(paths.LOSS_CURVE)] == "not compared"
    remarks = " ".join(found.reasons[1:])
    assert "lacks the environment of train_lora" in remarks
    assert (
        f"not compared, because these contain times and the record only has their hash: {paths.LOSS_CURVE}"
        in remarks
    )


def test_run_that_stopped_failed_at_the_first_stage_without_output() -> None:
    again = make_run()
    stages = yaml.safe_load(again.files[paths.LOCK])["stages"]
    del stages["train_lora"], stages["evaluate_lora"]
    stopped = RunRecord("again", "c0ffee", {paths.LOCK: yaml.safe_dump({"stages": stages})})
    found = verdict(make_run(), stopped, "no GPU")
    assert (found.outcome, found.first_difference, found.reasons[0]) == ("failed", "train_lora", "no GPU")
