"""Comparison of a reproduced run with its record: hashes of outputs, metrics, choices and environment."""

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
"""Entries of time and memory in reports, which differ between two runs on the same machine."""
_NOT_RESULTS = {*paths.ENVIRONMENTS.values(), paths.REPORT}
"""Outputs that are not compared. The page shows times, and nothing that is not in another file."""
_DATA_STAGES = ("download_dataset", "clean_captions")
"""Stages that only handle text and bytes: rounding cannot explain a difference."""


@dataclass(frozen=True)
class _Tolerance:
    """Largest accepted difference from the recorded metric."""

    limit: float
    is_share: bool
    """True: `limit` is a fraction of the recorded value; False: absolute."""


TOLERANCES = {
    "held_out_loss/adapter": _Tolerance(0.0028 / 0.1052, is_share=True),
    "style_probability/adapter": _Tolerance(0.966 - 0.930, is_share=False),
    "other_style_probability/adapter": _Tolerance(0.350 - 0.309, is_share=False),
}
"""The largest difference among three seeds of the demo (docs/experiments.md, 2026-11-24, "Seeds"): another
GPU or library version must not change an adapter more than another seed does. Not measured for SDXL."""
DECISIVE = "held_out_loss/adapter"
"""The metric that a record must have for the outcome `within tolerance`."""


@dataclass(frozen=True)
class _OutputDiff:
    """One file or folder that a stage wrote."""

    stage: str
    path: str
    state: _State


@dataclass(frozen=True)
class _MetricDiff:
    """A metric of the evaluation, as recorded and as found in the reproduction."""

    name: str
    recorded: float
    found: float
    tolerance: float | None
    """Absolute; None: this metric does not decide the outcome."""

    @property
    def is_within(self) -> bool:
        return self.tolerance is None or abs(self.found - self.recorded) <= self.tolerance


@dataclass(frozen=True)
class _EnvironmentDiff:
    """A fact about a stage's environment or choices that differs from the record."""

    stage: str
    name: str
    recorded: object
    found: object


@dataclass(frozen=True)
class ReproductionVerdict:
    """The result of a reproduction."""

    outcome: _ReproductionOutcome
    origin: str
    """The record that was reproduced, in words."""
    commit: str
    """The commit whose code ran."""
    reasons: list[str]
    """Why the outcome is what it is, first the decisive reason."""
    first_difference: str | None
    """The first stage with an output that differs or is missing; None if there is none."""
    outs: list[_OutputDiff]
    figures: list[_MetricDiff]
    choices: list[_EnvironmentDiff]
    """What training selected differently, because the recorded choice is unavailable on this machine."""
    environment: list[_EnvironmentDiff]


def compare_runs(
    record: RunRecord, again: RunRecord, stages: Sequence[str], failure: str | None
) -> ReproductionVerdict:
    """Compare a reproduction with its record.

    Args:
        again: the record of the reproduction, as far as it got.
        stages: the stages that should have run, in order.
        failure: why the reproduction stopped; None if it did not.
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
    """Return the outcome and its reason.

    In this order: a failed run; identical outputs; a difference in data, after which nothing is comparable;
    else the metrics, whose tolerances are the spread of seeds.

    Args:
        first: the first stage with an output that differs or is missing.
    """
    if failure is not None:
        return "failed", failure
    if first is None:
        return "bit-identical", "every output of every stage that ran has the recorded hash"
    start = f"the first output that differs is one of {first}"
    if first in _DATA_STAGES:
        return "different", f"{start}, which handles data: all later stages had other inputs"
    decisive = {figure.name: figure for figure in figures if figure.tolerance is not None}
    if DECISIVE not in decisive:
        return "different", f"{start}, and the record has no {DECISIVE} to compare with"
    beyond = [figure for figure in decisive.values() if not figure.is_within]
    if beyond:
        words = (f"{f.name} by {f.found - f.recorded:+.4g}, of {f.tolerance:.2g} allowed" for f in beyond)
        return (
            "different",
            f"{start}, and metrics differ by more than those of another seed: {'; '.join(words)}",
        )
    return "within tolerance", f"{start}; {', '.join(decisive)} differ by no more than those of another seed"


def _remarks(
    record: RunRecord, outs: Iterable[_OutputDiff], choices: Iterable[_EnvironmentDiff]
) -> Iterator[str]:
    """Yield remarks that qualify or explain the outcome."""
    if changes := [f"training.{c.name} {c.found} instead of {c.recorded}" for c in choices]:
        yield f"training did not select what it did in the record: {', '.join(changes)}"
    if changed := record.changed_code():
        yield f"the recorded run used code that its commit does not have: {', '.join(changed)}"
    for stage, path in paths.ENVIRONMENTS.items():
        if stage in record.stages and path not in record.files:
            yield f"the record lacks the environment of {stage}: {path} was not committed"
    if "train_lora" in record.stages and paths.TRAINING_REPORT not in record.files:
        yield f"the record lacks the values selected for `auto`: {paths.TRAINING_REPORT} was not committed"
    unknown = [out.path for out in outs if out.state == "not compared"]
    if unknown:
        yield (
            "not compared, because these contain times and the record only has their hash: "
            f"{', '.join(unknown)}"
        )


def _compare_outs(record: RunRecord, again: RunRecord, stage: str) -> Iterator[_OutputDiff]:
    """Yield the comparison of each recorded output of a stage, except `_NOT_RESULTS`."""
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
    """Compare a report whose hash differs without its entries of time and memory."""
    if path not in _MEASURED:
        return "different"
    if path not in record.files:
        return "not compared"
    before, after = (_without_measurements(run.files[path], path) for run in (record, again))
    return "identical but for times" if before == after else "different"


def _without_measurements(text: str, path: Path) -> object:
    """Return the content of a report without its entries of time and memory."""
    if path.suffix == ".csv":
        table = pd.read_csv(StringIO(text), dtype=str)
        return table.drop(columns=[*_MEASURED[path]], errors="ignore").to_dict("list")
    report: dict[str, Any] = json.loads(text)
    return {name: value for name, value in report.items() if name not in _MEASURED[path]}


def _compare_figures(record: RunRecord, again: RunRecord) -> Iterator[_MetricDiff]:
    """Yield the adapter's metrics that both runs have."""
    before, after = (_flatten_json(run.files.get(paths.METRICS, "{}")) for run in (record, again))
    for name, value in before.items():
        if name.endswith("/adapter") and isinstance(after.get(name), int | float):
            rule = TOLERANCES.get(name)
            scale = 1.0 if rule is None or not rule.is_share else abs(value)
            yield _MetricDiff(name, value, after[name], None if rule is None else rule.limit * scale)


def _compare_environments(record: RunRecord, again: RunRecord) -> Iterator[_EnvironmentDiff]:
    """Yield the facts that differ, for the stages whose environment both records have."""
    for stage, path in paths.ENVIRONMENTS.items():
        if path in record.files and path in again.files:
            before, after = _flatten_json(record.files[path]), _flatten_json(again.files[path])
            for name in sorted(before.keys() | after.keys()):
                if before.get(name) != after.get(name):
                    yield _EnvironmentDiff(stage, name, before.get(name), after.get(name))


def _compare_choices(record: RunRecord, again: RunRecord) -> Iterator[_EnvironmentDiff]:
    """Yield the choices of training that both reports have and that differ."""
    reports = (json.loads(run.files.get(paths.TRAINING_REPORT, "{}")) for run in (record, again))
    before, after = ({**choices.plan, **choices.attention} for choices in map(choices_in, reports))
    for name in sorted(before.keys() & after.keys()):
        if before[name] != after[name]:
            yield _EnvironmentDiff("train_lora", name, before[name], after[name])


def _flatten_json(text: str) -> dict[str, Any]:
    """Return the values of nested JSON under joined names, `a/b`."""
    return dict(flatten(json.loads(text), "/"))
