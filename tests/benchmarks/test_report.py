from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from benchmarks import counts, report
from benchmarks.claims import CLAIMS, REFERENCE, Change, find_pair
from benchmarks.results import FOLDER, Benchmark, Machine, Result, read_results
from benchmarks.sizes import ADAPTER, full_fine_tuning
from benchmarks.tables import (
    SAMPLING_KEYS,
    forecast_table,
    sampling_speedup,
    sampling_table,
    share_of_peak,
    speedup,
    steps_table,
)

MACHINE = Machine(
    gpu="Test GPU", gpu_memory_gib=80.0, driver="1.2", cpus=8, python="3.12.3", packages={"torch": "2.11.0"}
)
CLAIM = {claim.technique: claim for claim in CLAIMS}
CHECKPOINTING = CLAIM["gradient checkpointing"]


def measured(
    benchmark: Benchmark, seconds: float | None, gib: float | None = 10.0, outcome: str = "ok", **changes: Any
) -> Result:
    return Result(
        benchmark=benchmark,
        date=datetime(2026, 1, 2, tzinfo=UTC),
        command="python bench",
        machine=MACHINE,
        configuration=REFERENCE | changes,
        outcome=outcome,
        seconds=[] if seconds is None else [seconds / 2, seconds, seconds * 9],
        peak_reserved_gib=gib,
    )


def matmul(tflop_per_second: float, precision: str = "fp16") -> Result:
    result = measured("matmul", 1.0)
    speed = {"tflop_per_second": tflop_per_second}
    return result.model_copy(
        update={"configuration": {"precision": precision, "size": 8192}, "figures": speed}
    )


OFFICIAL = measured("official_script", 2.0, 20.0, workers=4)
SLOW = measured("train_step", 0.25, 9.6)
FAST = measured("train_step", 0.2, 25.0, checkpointing="none")


def test_the_median_step_is_reported() -> None:
    assert SLOW.seconds_per_step == 0.25
    assert SLOW.samples_per_second == 3 / 0.25
    assert measured("train_step", 1.0, micro_batch_size=1).samples_per_second == 3.0
    assert measured("train_step", None).samples_per_second is None


def test_speed_is_compared_with_the_official_script_on_the_same_work() -> None:
    assert speedup(SLOW, [OFFICIAL, SLOW]) == pytest.approx(8.0)
    larger = measured("train_step", 0.25, batch_size=6)
    assert speedup(larger, [OFFICIAL, larger]) is None
    assert speedup(SLOW, [SLOW]) is None


@pytest.mark.parametrize(
    "changes",
    [{"precision": "bf16"}, {"checkpointing": "none"}, {"vram_gib": 14.75}, {"attention": "xformers"}],
)
def test_only_the_usual_flags_are_a_baseline(changes: dict[str, Any]) -> None:
    other = measured("official_script", 2.0, **changes)
    assert speedup(SLOW, [other, SLOW]) is None
    assert speedup(other, [OFFICIAL, other]) == pytest.approx(1.0)


def sampled(way: str, seconds: float, **changes: Any) -> Result:
    configuration = dict.fromkeys(SAMPLING_KEYS, 1) | {"way": way, "batch_size": 2} | changes
    result = measured("sample", seconds)
    return result.model_copy(update={"configuration": configuration, "figures": {"psnr_db": 41.25}})


def test_sampling_is_compared_with_diffusers_on_the_same_work() -> None:
    ours, plain, other = sampled("ours", 1.0), sampled("diffusers", 3.0), sampled("ours", 1.0, strength=0.5)
    assert sampling_speedup(ours, [ours, plain]) == pytest.approx(3.0)
    assert sampling_speedup(other, [other, plain]) is None
    lines = sampling_table([ours, plain, other]).splitlines()
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| this project", "| diffusers", "| this project"]
    assert " 2.00 | 3.00 |" in lines[2]  # images per second, and ratio to diffusers
    assert " 41.2 |" in lines[2]


def test_a_failed_run_has_no_speed() -> None:
    failed = measured("official_script", 2.0, outcome="out of memory")
    assert speedup(SLOW, [failed, SLOW]) is None
    assert speedup(failed, [OFFICIAL, failed]) is None


def test_share_of_peak_counts_necessary_work_alone() -> None:
    counted = counts.load()
    work = 3 * (counted.forward_tflop["trained"] + counted.backward_tflop["trained"])
    session = [matmul(400.0), SLOW]
    assert share_of_peak(SLOW, session, counted) == pytest.approx(work / 0.25 / 400)
    assert share_of_peak(SLOW, [matmul(400.0, "bf16"), SLOW], counted) is None
    assert share_of_peak(measured("train_step", 0.25, resolution=512), session, counted) is None


def test_a_table_shows_what_varies_and_says_once_what_does_not() -> None:
    text = steps_table([OFFICIAL, SLOW, FAST], [OFFICIAL, SLOW, FAST])
    head, _, *rows = text.splitlines()[2:]
    assert "precision fp16" in text.splitlines()[0]
    assert "checkpointing" in head
    assert "precision" not in head
    assert "workers" not in head  # the official script's alone
    assert "outcome" not in head  # all went well
    assert rows[1].startswith("| this project | all |")
    assert "| 0.2500 | 12.00 | 8.0 | 9.60 |" in rows[1]


def test_a_table_says_what_failed_and_how_far_a_forecast_was_off() -> None:
    failed = measured("official_script", None, None, outcome="out of memory", vram_gib=14.75)
    forecast = SLOW.model_copy(update={"forecast_gib": 9.0})
    text = steps_table([failed, forecast])
    assert "| out of memory |" in text
    assert "9.00 (-6.2%)" in text


def test_forecasts_stand_beside_what_was_measured() -> None:
    result = measured("forecast", 0.1, 10.0, name="all checkpointed").model_copy(
        update={"forecast_gib": 10.2, "figures": {"micro_batch_size": 3, "checkpointed": 130}}
    )
    failed = measured("forecast", None, None, outcome="RuntimeError: x", name="bf16")
    rows = forecast_table([result, failed]).splitlines()[2:]
    assert rows == [
        "| all checkpointed | 3 | 130 | 10.20 | 10.00 | +2.0% | ok |",
        "| bf16 | - | - | - | - | - | RuntimeError: x |",
    ]
    assert rows[0] in report.page({"today": [result]}, counts.load())


def test_a_pair_differs_in_its_technique_alone() -> None:
    pair = find_pair(CHECKPOINTING, "train_step", [SLOW, FAST])
    assert pair is not None
    assert (pair.applied, pair.absent) == (SLOW, FAST)
    assert pair.change is not None
    assert pair.change.memory_ratio == pytest.approx(9.6 / 25)
    assert pair.change.time_ratio == pytest.approx(1.25)
    assert CHECKPOINTING.holds(pair.change)
    other = measured("train_step", 0.2, 25.0, checkpointing="none", precision="bf16")
    assert find_pair(CHECKPOINTING, "train_step", [SLOW, other]) is None


def test_the_pair_nearest_to_the_recipe_is_shown() -> None:
    far = [measured("train_step", 1.0, checkpointing=kind, precision="bf16") for kind in ("all", "none")]
    pair = find_pair(CHECKPOINTING, "train_step", [*far, SLOW, FAST])
    assert pair is not None
    assert pair.deviations == {}
    far_pair = find_pair(CHECKPOINTING, "train_step", far)
    assert far_pair is not None
    assert far_pair.deviations == {"precision": "bf16"}


@pytest.mark.parametrize(
    ("technique", "change", "verdict"),
    [
        ("fp16 instead of fp32", Change((20.0, 10.0), (2.0, 1.0)), True),
        ("fp16 instead of fp32", Change((20.0, 12.0), (2.0, 1.0)), False),
        ("fp16 instead of fp32", Change((20.0, 10.0), (1.0, 1.1)), False),
        ("8-bit Adam instead of AdamW", Change((20.0, 17.0), (1.0, 1.0)), True),
        ("8-bit Adam instead of AdamW", Change((10.0, 9.8), (1.0, 1.0)), False),
        ("gradient checkpointing", Change((25.0, 10.0), (1.0, 1.2)), True),
        ("gradient checkpointing", Change((25.0, 10.0), (1.0, 1.7)), False),
        ("xformers instead of PyTorch's SDPA", Change((10.0, 9.0), (1.0, 0.9)), True),
        ("xformers instead of PyTorch's SDPA", Change((10.0, 10.1), (1.0, 0.9)), False),
        ("PyTorch's SDPA instead of plain attention", Change((20.0, 10.0), (2.0, 1.0)), True),
        ("PyTorch's SDPA instead of plain attention", Change((20.0, 10.0), (1.0, 1.2)), False),
        ("training the text encoders too", Change((10.0, 10.4), (1.0, 1.3)), True),
        ("training the text encoders too", Change((8.0, 9.7), (1.0, 1.0)), False),
    ],
)
def test_a_verdict_follows_from_the_figures(technique: str, change: Change, verdict: bool) -> None:
    assert CLAIM[technique].holds(change) is verdict


def test_what_nobody_measured_is_called_so() -> None:
    text = report.page({}, counts.load())
    for technique in (*CLAIM, "cached latents"):
        (row,) = [line for line in text.splitlines() if line.startswith(f"| {technique} |")]
        assert row.count("not measured yet") == 3
    assert "Not measured yet." in text


def test_a_measured_claim_has_figures_and_a_verdict() -> None:
    text = report.page({"2026-01-02-test": [OFFICIAL, SLOW, FAST]}, counts.load())
    (row,) = [line for line in text.splitlines() if line.startswith("| gradient checkpointing")]
    assert "| this project | 25 -> 9.6 GiB (-62%) | 0.2 -> 0.25 s (+25%) | yes (" in row
    assert "## 2026-01-02-test" in text
    assert "2026-01-02, Test GPU (80.0 GiB), driver 1.2; 8 CPUs; Python 3.12.3, torch 2.11.0." in text
    assert text.count("    python bench") == 3


def test_a_claim_whose_run_failed_says_why() -> None:
    failed = measured("train_step", None, None, outcome="ValueError: no xformers", attention="xformers")
    text = report.page({"2026-01-02-test": [failed, SLOW]}, counts.load())
    (row,) = [line for line in text.splitlines() if line.startswith("| xformers")]
    assert "ValueError: no xformers" in row


def test_full_fine_tuning_is_forecast_from_bytes_and_a_measured_rest() -> None:
    counted = counts.load()
    frozen = 2 * (counted.parameters["text_encoder"] + counted.parameters["text_encoder_2"])
    states = (16 * counted.parameters["unet"] + frozen) / 2**30
    lora = (frozen + 2 * counted.parameters["unet"] + ADAPTER * 29_548_544) / 2**30
    unmeasured = full_fine_tuning(counted, None)
    assert f"| {states:.1f} | not measured yet | {1 - lora / states:.0%} |" in unmeasured
    rest = 3.0
    peak = states + rest
    assert f"| {states:.1f} | {peak:.1f} | {1 - (lora + rest) / peak:.0%} |" in full_fine_tuning(
        counted, lora + rest
    )


def test_the_forecast_rests_on_the_reference_run() -> None:
    assert report.reference_peak({"old": [SLOW], "new": [FAST]}) == 9.6
    assert report.reference_peak({"new": [FAST, OFFICIAL]}) is None


def test_the_page_is_that_of_the_committed_results() -> None:
    sessions = {path.stem: read_results(path) for path in sorted(FOLDER.glob("*.jsonl"))}
    assert Path("docs/performance.md").read_text() == report.page(sessions, counts.load())
