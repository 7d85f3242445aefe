"""Results as Markdown tables: samples per second, memory, and ratios within one session."""

from collections.abc import Callable, Sequence
from functools import partial

from benchmarks.counts import RANK, Counted
from benchmarks.results import OK, Benchmark, Result, select
from sdxl_lora.reporting.markdown import table

SUBJECTS: dict[Benchmark, str] = {"official_script": "official script", "train_step": "this project"}
NONE = "-"
WORKLOAD = ("text_encoders", "batch_size", "rank", "resolution")
"""Keys that two training configurations must share for their speeds to be comparable."""
SAMPLING_KEYS = ("model", "precision", "strength", "batch_size", "resolution", "num_inference_steps")
"""Keys that two sampling configurations must share for their speeds to be comparable."""
WAYS = {
    "ours": "this project",
    "diffusers": "diffusers",
    "diffusers_folded": "diffusers, adapter merged",
}
USUAL_16_GB: dict[str, str | None] = {
    "precision": "fp16", "checkpointing": "all", "optimizer": "adamw_8bit", "vram_gib": None
}  # fmt: skip
"""The official script with the flags that tutorials recommend for 16 GB."""


def cell(value: object) -> str:
    return "none" if value is None else str(value)


def number(value: float | None, digits: int) -> str:
    return NONE if value is None else f"{value:,.{digits}f}"


def percent(share: float | None) -> str:
    return NONE if share is None else f"{share:.0%}"


def steps_table(
    steps: Sequence[Result], session: Sequence[Result] = (), counted: Counted | None = None
) -> str:
    """Return a table of training steps; values that all rows share are listed above it.

    Args:
        session: all results of the session, for comparisons.
        counted: counted work; without it, no share of the peak.
    """
    keys = list(dict.fromkeys(key for result in steps for key in result.configuration))
    values = {
        key: {configuration_cell(key, result) for result in steps if key in result.configuration}
        for key in keys
    }
    varying = [key for key in keys if len(values[key]) > 1]
    shared = [f"{key} {next(iter(values[key]))}" for key in keys if key not in varying]
    columns: dict[str, Callable[[Result], str]] = {"": lambda result: SUBJECTS[result.benchmark]}
    columns |= {key.replace("_", " "): partial(configuration_cell, key) for key in varying}
    columns |= {
        "s/step": lambda result: number(result.seconds_per_step, 4),
        "samples/s": lambda result: number(result.samples_per_second, 2),
        "x official": lambda result: number(speedup(result, session), 1),
        "reserved GiB": lambda result: number(result.peak_reserved_gib, 2),
        "device GiB": lambda result: number(result.peak_device_gib, 2),
        "forecast GiB": forecast_cell,
        "of peak": lambda result: percent(share_of_peak(result, session, counted)),
        "outcome": lambda result: result.outcome,
    }
    rows = {title: [show(result) for result in steps] for title, show in columns.items()}
    filled = {title: row for title, row in rows.items() if not title or set(row) - {NONE, OK}}
    return f"All: {', '.join(shared)}.\n\n{table(list(filled), list(zip(*filled.values(), strict=True)))}"


def configuration_cell(key: str, result: Result) -> str:
    """Return a value of a result's configuration."""
    return cell(result.configuration.get(key, NONE))


def encode_table(encodes: Sequence[Result]) -> str:
    """Return a table of the VAE alone: the cost that cached latents save after the first epoch."""
    rows = [
        (
            cell(result.configuration["precision"]),
            cell(result.configuration["batch_size"]),
            cell(result.configuration["resolution"]),
            number(result.seconds_per_step, 4),
            number(result.samples_per_second, 1),
            number(result.peak_reserved_gib, 2),
            result.outcome,
        )
        for result in encodes
    ]
    return table(["VAE", "images", "px", "s", "images/s", "reserved GiB", "outcome"], rows)


def sampling_table(samples: Sequence[Result]) -> str:
    """Return a table of sampling, compared with diffusers' pipeline on the same work."""
    titles = [
        "sampled by",
        *(key.replace("_", " ") for key in SAMPLING_KEYS),
        "s/batch",
        "images/s",
        "x diffusers",
    ]
    titles += ["first batch s", "reserved GiB", "forecast GiB", "PSNR dB", "outcome"]
    rows = [
        (
            WAYS[result.configuration["way"]],
            *(cell(result.configuration[key]) for key in SAMPLING_KEYS),
            number(result.seconds_per_step, 3),
            number(result.samples_per_second, 2),
            number(sampling_speedup(result, samples), 2),
            number(result.figures.get("first_batch_seconds"), 1),
            number(result.peak_reserved_gib, 2),
            forecast_cell(result),
            number(result.figures.get("psnr_db"), 1),
            result.outcome,
        )
        for result in samples
    ]
    return table(titles, rows)


def sampling_speedup(result: Result, samples: Sequence[Result]) -> float | None:
    """Return images per second divided by those of diffusers' unmerged pipeline; None without such a run."""
    same = {key: result.configuration[key] for key in SAMPLING_KEYS}
    baselines = select(samples, "sample", {**same, "way": "diffusers"})
    baseline = next((run.samples_per_second for run in baselines if run.outcome == OK), None)
    speed = result.samples_per_second if result.outcome == OK else None
    return speed / baseline if speed and baseline else None


def forecast_table(results: Sequence[Result]) -> str:
    """Return a table of forecast and measured peak memory of training, and the plan."""
    rows = [
        (
            result.configuration["name"],
            number(result.figures.get("micro_batch_size"), 0),
            number(result.figures.get("checkpointed"), 0),
            number(result.forecast_gib, 2),
            number(result.peak_reserved_gib, 2),
            NONE if (error := forecast_error(result)) is None else f"{error:+.1%}",
            result.outcome,
        )
        for result in results
    ]
    titles = ["configuration", "micro-batch size", "checkpointed blocks", "forecast GiB", "reserved GiB"]
    return table([*titles, "error", "outcome"], rows)


def speedup(result: Result, session: Sequence[Result]) -> float | None:
    """Return samples per second divided by the official script's on the same work; None without it."""
    same = {key: result.configuration.get(key) for key in WORKLOAD}
    baselines = select(session, "official_script", {**USUAL_16_GB, "attention": "sdpa", **same})
    baseline = next((run.samples_per_second for run in baselines if run.outcome == OK), None)
    speed = result.samples_per_second if result.outcome == OK else None
    return speed / baseline if speed and baseline else None


def work(text_encoders: str, counted: Counted) -> tuple[float, float]:
    """Return the necessary work of one example, and the work with a recomputed forward pass, TFLOP."""
    forward, backward = counted.forward_tflop[text_encoders], counted.backward_tflop[text_encoders]
    return forward + backward, 2 * forward + backward


def share_of_peak(result: Result, session: Sequence[Result], counted: Counted | None) -> float | None:
    """Return necessary work per second divided by the matrix product's speed; None if either is unknown."""
    configuration, samples = result.configuration, result.samples_per_second
    ceilings = select(session, "matmul", {"precision": configuration["precision"]})
    ceiling = next((run.figures["tflop_per_second"] for run in ceilings), None)
    counted_for = configuration.get("resolution") == 1024 and configuration.get("rank") == RANK
    if counted is None or ceiling is None or samples is None or not counted_for or result.outcome != OK:
        return None
    return work(configuration["text_encoders"], counted)[0] * samples / ceiling


def forecast_cell(result: Result) -> str:
    """Return the forecast and its error."""
    error = forecast_error(result)
    return number(result.forecast_gib, 2) + ("" if error is None else f" ({error:+.1%})")


def forecast_error(result: Result) -> float | None:
    """Return the error of the forecast as a share of the measured peak; None if one of the two is missing."""
    if result.forecast_gib is None or not result.peak_reserved_gib:
        return None
    return result.forecast_gib / result.peak_reserved_gib - 1
