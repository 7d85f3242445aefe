"""Whether a run that was made again is the one that was recorded: its bits, its figures, its environment."""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any, Literal

import pandas as pd

from sdxl_lora import paths
from sdxl_lora.reproducibility.run_record import RunRecord
from sdxl_lora.storage.report_io import flatten
from sdxl_lora.training.auto_choices import choices_in

_ReproductionOutcome = Literal["bit-identical", "within tolerance", "different", "failed"]
_State = Literal["identical", "identical but for times", "different", "missing", "not compared"]

_MEASURED = {
    paths.TRAINING_REPORT: ("seconds", "examples_per_second", "peak_memory_gib", "forecast_gib"),
    paths.LOSS_CURVE: ("seconds",),
}
"""What reports say of time and memory, which differ from one run to the next on the same machine."""
_NOT_RESULTS = {*paths.ENVIRONMENTS.values(), paths.REPORT}
"""The page shows times, and holds nothing that other files do not."""
_DATA_STAGES = ("download_dataset", "clean_captions")
"""They compute with text and bytes alone: no rounding excuses a difference."""


@dataclass(frozen=True)
class _Tolerance:
    """How far a figure may be from the recorded one."""

    limit: float
    is_share: bool
    """Whether `limit` is a share of the recorded figure."""


TOLERANCES = {
    "held_out_loss/adapter": _Tolerance(0.0028 / 0.1052, is_share=True),
    "style_probability/adapter": _Tolerance(0.966 - 0.930, is_share=False),
    "other_style_probability/adapter": _Tolerance(0.350 - 0.309, is_share=False),
}
"""Largest difference among three seeds of the demo (docs/experiments.md, 2026-11-24, "Seeds"): another card
or library must not move an adapter farther than another seed would. SDXL's own spread was not measured."""
DECISIVE = "held_out_loss/adapter"
"""Without this figure, nothing is within tolerance."""


@dataclass(frozen=True)
class _OutputDiff:
    """One file or folder that a stage wrote."""

    stage: str
    path: str
    state: _State


@dataclass(frozen=True)
class _MetricDiff:
    """A figure of the evaluation, recorded and found again."""

    name: str
    recorded: float
    found: float
    tolerance: float | None
    """Absolute; None: this figure does not decide."""

    @property
    def is_within(self) -> bool:
        return self.tolerance is None or abs(self.found - self.recorded) <= self.tolerance


@dataclass(frozen=True)
class _EnvironmentDiff:
    """A fact about the environment of a stage that was another when it was recorded."""

    stage: str
    name: str
    recorded: object
    found: object


@dataclass(frozen=True)
class ReproductionVerdict:
    """What became of a reproduction."""

    outcome: _ReproductionOutcome
    origin: str
    """What was made again."""
    commit: str
    reasons: list[str]
    first_difference: str | None
    """The first stage whose output differs, or that failed."""
    outs: list[_OutputDiff]
    figures: list[_MetricDiff]
    choices: list[_EnvironmentDiff]
    """What training chose otherwise: what was recorded could not be had here."""
    environment: list[_EnvironmentDiff]


def compare_runs(
    record: RunRecord, again: RunRecord, stages: Sequence[str], failure: str | None
) -> ReproductionVerdict:
    """Holds a run against its record.

    Args:
        again: the same of the run that was made now, as far as it got.
        stages: those that should have run, in their order.
        failure: why the run stopped; None if it did not.
    """
    outs = [out for stage in stages for out in _compare_outs(record, again, stage)]
    figures, environment = list(_compare_figures(record, again)), list(_compare_environments(record, again))
    choices = list(_compare_choices(record, again))
    first = next((out.stage for out in outs if out.state in ("different", "missing")), None)
    outcome, reason = _decide(first, figures, failure)
    reasons = [reason, *_remarks(record, outs, choices)]
    return ReproductionVerdict(
        outcome, record.origin, record.code_commit, reasons, first, outs, figures, choices, environment
    )


def _decide(
    first: str | None, figures: Iterable[_MetricDiff], failure: str | None
) -> tuple[_ReproductionOutcome, str]:
    """The outcome, and why.

    Args:
        first: the first stage whose output differs.
    """
    if failure is not None:
        return "failed", failure
    if first is None:
        return "bit-identical", "every output of every stage that ran has the recorded hash"
    start = f"the first output that differs is one of {first}"
    if first in _DATA_STAGES:
        return "different", f"{start}, which handles data: nothing after it was made from the same"
    decisive = {figure.name: figure for figure in figures if figure.tolerance is not None}
    if DECISIVE not in decisive:
        return "different", f"{start}, and the record has no {DECISIVE} to compare"
    beyond = [figure for figure in decisive.values() if not figure.is_within]
    if beyond:
        words = (f"{f.name} by {f.found - f.recorded:+.4g}, of {f.tolerance:.2g} allowed" for f in beyond)
        return (
            "different",
            f"{start}, and figures differ by more than another seed's would: {'; '.join(words)}",
        )
    return "within tolerance", f"{start}; {', '.join(decisive)} are as near as another seed's would be"


def _remarks(
    record: RunRecord, outs: Iterable[_OutputDiff], choices: Iterable[_EnvironmentDiff]
) -> Iterator[str]:
    """What weakens or explains the outcome."""
    if changes := [f"training.{c.name} {c.found} in place of {c.recorded}" for c in choices]:
        yield f"training did not choose as the recorded one did: {', '.join(changes)}"
    if changed := record.changed_code():
        yield f"the record was made with code that its commit does not hold: {', '.join(changed)}"
    for stage, path in paths.ENVIRONMENTS.items():
        if stage in record.stages and path not in record.files:
            yield f"the record does not hold the environment of {stage}: {path} was not committed"
    if "train_lora" in record.stages and paths.TRAINING_REPORT not in record.files:
        yield f"the record does not hold what `auto` was: {paths.TRAINING_REPORT} was not committed"
    unknown = [out.path for out in outs if out.state == "not compared"]
    if unknown:
        yield f"not compared, as they hold times and the record has their hash alone: {', '.join(unknown)}"


def _compare_outs(record: RunRecord, again: RunRecord, stage: str) -> Iterator[_OutputDiff]:
    """Each output of a stage, but for what is no result."""
    found = again.outs(stage)
    for path, digest in record.outs(stage).items():
        if Path(path) in _NOT_RESULTS:
            continue
        if path not in found:
            yield _OutputDiff(stage, path, "missing")
        elif found[path] == digest:
            yield _OutputDiff(stage, path, "identical")
        else:
            yield _OutputDiff(stage, path, _compare_measured(record, again, Path(path)))


def _compare_measured(record: RunRecord, again: RunRecord, path: Path) -> _State:
    """Whether a report whose hash differs says the same of everything but time and memory."""
    if path not in _MEASURED:
        return "different"
    if path not in record.files:
        return "not compared"
    before, after = (_without_measurements(run.files[path], path) for run in (record, again))
    return "identical but for times" if before == after else "different"


def _without_measurements(text: str, path: Path) -> object:
    """What a report says beside time and memory."""
    if path.suffix == ".csv":
        table = pd.read_csv(StringIO(text), dtype=str)
        return table.drop(columns=[*_MEASURED[path]], errors="ignore").to_dict("list")
    report: dict[str, Any] = json.loads(text)
    return {name: value for name, value in report.items() if name not in _MEASURED[path]}


def _compare_figures(record: RunRecord, again: RunRecord) -> Iterator[_MetricDiff]:
    """The adapter's figures that both runs have."""
    before, after = (_flatten_json(run.files.get(paths.METRICS, "{}")) for run in (record, again))
    for name, value in before.items():
        if name.endswith("/adapter") and isinstance(after.get(name), int | float):
            rule = TOLERANCES.get(name)
            scale = 1.0 if rule is None or not rule.is_share else abs(value)
            yield _MetricDiff(name, value, after[name], None if rule is None else rule.limit * scale)


def _compare_environments(record: RunRecord, again: RunRecord) -> Iterator[_EnvironmentDiff]:
    """All facts that differ, of the stages whose environment both runs know."""
    for stage, path in paths.ENVIRONMENTS.items():
        if path in record.files and path in again.files:
            before, after = _flatten_json(record.files[path]), _flatten_json(again.files[path])
            for name in sorted(before.keys() | after.keys()):
                if before.get(name) != after.get(name):
                    yield _EnvironmentDiff(stage, name, before.get(name), after.get(name))


def _compare_choices(record: RunRecord, again: RunRecord) -> Iterator[_EnvironmentDiff]:
    """What training did otherwise of what its report says was chosen."""
    reports = (json.loads(run.files.get(paths.TRAINING_REPORT, "{}")) for run in (record, again))
    before, after = ({**choices.plan, **choices.attention} for choices in map(choices_in, reports))
    for name in sorted(before.keys() & after.keys()):
        if before[name] != after[name]:
            yield _EnvironmentDiff("train_lora", name, before[name], after[name])


def _flatten_json(text: str) -> dict[str, Any]:
    """The values of nested JSON under joined names, `a/b`."""
    return dict(flatten(json.loads(text), "/"))
