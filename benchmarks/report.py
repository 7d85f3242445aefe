"""Writes docs/performance.md from benchmarks/results/*.jsonl: `python -m benchmarks.report`.

The page states only what was measured, counted or calculated.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path

from benchmarks import counts
from benchmarks.claims import CLAIMS, REFERENCE, Claim, find_pair
from benchmarks.counts import Counted
from benchmarks.results import FOLDER, OK, Machine, Result, read_results, select
from benchmarks.sizes import adapter_claims, full_fine_tuning
from benchmarks.tables import (
    NONE,
    SUBJECTS,
    cell,
    encode_table,
    forecast_table,
    number,
    sampling_table,
    steps_table,
    work,
)
from sdxl_lora.reporting.markdown import table

PAGE = Path("docs/performance.md")
NOT_MEASURED = "not measured yet"
INTRODUCTION = """\
# Performance

*`python -m benchmarks.report` writes this page from [benchmarks/results](../benchmarks/results), one file
per measurement session on one machine.*

SDXL in its real shapes with random weights, at 1024 px unless a table says otherwise. Columns:

- **s/step**: median time of a step after the warm-up.
- **x official**: samples per second, divided by those of diffusers' `train_text_to_image_lora_sdxl.py` on
  the same work in the same session: unmodified, fp16, 8-bit Adam, activation checkpointing, SDPA, images
  loaded by 4 workers, no memory limit.
- **reserved**: peak memory that PyTorch's allocator held.
- **device**: peak memory that the driver reported, including CUDA's context.
- **forecast**: forecast of the reserved memory, and its error.
- **of peak**: speed of the step's necessary work, as a share of the speed measured for one large matrix
  product. The necessary work is {tflop:.1f} TFLOP for batch 3 with trained text encoders; with recomputation,
  which does not count, it would be {recomputed:.1f}. See [benchmarks/counts.py](../benchmarks/counts.py).
"""
SAMPLING = """\
From prompts to images, including guidance, text encoders and VAE. **x diffusers** is images per second,
divided by those of diffusers' pipeline with the adapter as loaded by `load_lora_weights`. **PSNR** compares
the images with that pipeline's in fp32; it is measured with the demo model only."""
FORECAST = """\
Peak memory of training as `sdxl-lora plan` forecasts it, without a GPU and before any weight is loaded, and
the memory that PyTorch reserved in four steps. 1024 px, batch 3, fp16 and no activation checkpointing, unless
the row says otherwise."""
MEASURE = """\
## How to measure

On a machine with a CUDA GPU that nothing else uses. DIFFUSERS is a checkout of diffusers:

    python -m benchmarks.matmul --output $FILE
    python -m benchmarks.vae_encode --output $FILE
    python -m benchmarks.official_script --output $FILE --checkout $DIFFUSERS --checkpointing all none
    python -m benchmarks.train_step --output $FILE --checkpointing all none --vram-gib none 14.75
    python -m benchmarks.train_step --output $FILE $BASE --precision fp32
    python -m benchmarks.train_step --output $FILE $BASE --quantization int8 nf4
    python -m benchmarks.train_step --output $FILE $BASE --optimizer adamw
    python -m benchmarks.train_step --output $FILE $BASE --attention math xformers
    python -m benchmarks.train_step --output $FILE $BASE --text-encoders frozen
    python -m benchmarks.train_step --output $FILE $BASE --deterministic true false
    python -m benchmarks.forecast --output $FILE
    python -m benchmarks.sample --output $FILE
    python -m benchmarks.sample --output $FILE $DEMO --precision fp16 bf16
    python -m benchmarks.report

with FILE=benchmarks/results/DATE-GPU.jsonl,
BASE="--checkpointing all --vram-gib none --attention sdpa --deterministic false" and
DEMO="--model demo --resolution 128 --batch-size 8 --num-inference-steps 25". Options with several values run
every combination; `--help` lists all options. Each line of a file contains the command that repeats the
measurement.
"""


def main() -> None:
    sessions = {path.stem: read_results(path) for path in sorted(FOLDER.glob("*.jsonl"))}
    PAGE.write_text(page(sessions, counts.load()), encoding="utf-8")


def page(sessions: dict[str, list[Result]], counted: Counted) -> str:
    """Return the whole page. `sessions` maps a file's name to its lines, oldest first."""
    step, recomputed = (3 * tflop for tflop in work("trained", counted))
    parts = [INTRODUCTION.format(tflop=step, recomputed=recomputed)]
    parts += [session_section(name, sessions[name], counted) for name in reversed(sessions)]
    if not sessions:
        parts.append("## Training step\n\nNot measured yet.\n")
    parts += [claims_section(sessions, counted), full_fine_tuning(counted, reference_peak(sessions)), MEASURE]
    return "\n".join(parts)


def session_section(name: str, results: Sequence[Result], counted: Counted) -> str:
    """Return the section with the figures of one session."""
    peaks = [
        f"{r.configuration['precision']} {r.figures['tflop_per_second']:.0f}"
        for r in select(results, "matmul", {})
    ]
    ceiling = f"Matrix product: {', '.join(peaks)} TFLOP/s." if peaks else "Matrix product: not measured."
    date = f"{results[0].date:%Y-%m-%d}"
    lines = [f"## {name}", "", f"{date}, {machine(results[0].machine)}. {ceiling}", ""]
    steps = [result for result in results if result.benchmark in SUBJECTS]
    if steps:
        lines += ["### Training step", "", steps_table(steps, results, counted), ""]
    if encodes := list(select(results, "vae_encode", {})):
        lines += ["### VAE encoding", "", encode_table(encodes), ""]
    if forecasts := list(select(results, "forecast", {})):
        lines += ["### Memory forecast", "", FORECAST, "", forecast_table(forecasts), ""]
    if samples := list(select(results, "sample", {})):
        lines += ["### Sampling", "", SAMPLING, "", sampling_table(samples), ""]
    lines += [
        "<details><summary>Commands</summary>",
        "",
        *(f"    {r.command}" for r in results),
        "",
        "</details>",
        "",
    ]
    return "\n".join(lines)


def machine(of_run: Machine) -> str:
    """Describe hardware and versions in one sentence."""
    gpu = "CPU only"
    if of_run.gpu is not None:
        gpu = f"{of_run.gpu} ({of_run.gpu_memory_gib:.1f} GiB), driver {of_run.driver}"
    packages = ", ".join(f"{name} {version}" for name, version in of_run.packages.items())
    return f"{gpu}; {of_run.cpus} CPUs; Python {of_run.python}, {packages}"


def claims_section(sessions: dict[str, list[Result]], counted: Counted) -> str:
    """Return the section that compares common claims with measurements."""
    reference = ", ".join(f"{key} {cell(value)}" for key, value in REFERENCE.items())
    rows = [row for claim in CLAIMS for row in claim_rows(claim, sessions)]
    rows += [cached_latents_row(sessions), *adapter_claims(counted)]
    return (
        "## Common claims\n\n"
        "Each row compares two runs of one session that differ only in one technique, the pair nearest to\n"
        f"{reference}. Memory is the peak that PyTorch reserved.\n\n"
        f"{table(['technique', 'common claim', 'measured on', 'memory', 'time per step', 'true'], rows)}\n"
    )


def claim_rows(claim: Claim, sessions: dict[str, list[Result]]) -> Iterable[tuple[str, ...]]:
    """Return a row per measured subject, from the newest session with a pair; at least one row."""
    rows = []
    for benchmark, subject in SUBJECTS.items():
        pairs = (find_pair(claim, benchmark, sessions[name]) for name in reversed(sessions))
        pair = next((pair for pair in pairs if pair is not None), None)
        if pair is None:
            continue
        context = ", ".join(f"{key} {cell(value)}" for key, value in pair.deviations.items())
        subject = f"{subject} ({context})" if context else subject
        if (change := pair.change) is None:
            memory = f"{pair.applied.outcome} / without: {pair.absent.outcome}"
            rows.append((claim.technique, claim.usual, subject, memory, NONE, NONE))
            continue
        memory, time = format_change(*change.gib, "GiB"), format_change(*change.seconds, "s")
        verdict = f"{'yes' if claim.holds(change) else 'no'} ({claim.rule})"
        rows.append((claim.technique, claim.usual, subject, memory, time, verdict))
    return rows or [(claim.technique, claim.usual, NONE, NOT_MEASURED, NOT_MEASURED, NOT_MEASURED)]


def format_change(before: float, after: float, unit: str) -> str:
    """Return both values and the change in percent."""
    return f"{before:.3g} -> {after:.3g} {unit} ({after / before - 1:+.0%})"


def cached_latents_row(sessions: dict[str, list[Result]]) -> tuple[str, ...]:
    """Return the row on cached latents, which save the official script's encoding at every step."""
    technique, usual = "cached latents", "save the time and memory of the VAE"
    for name in reversed(sessions):
        for result in select(sessions[name], "vae_encode", {"precision": "fp32", "batch_size": 3}):
            memory = f"the VAE alone takes {number(result.peak_reserved_gib, 2)} GiB"
            time = f"{number(result.seconds_per_step, 3)} s saved"
            return (technique, usual, "VAE in fp32, 3 images", memory, time, NONE)
    return (technique, usual, NONE, NOT_MEASURED, NOT_MEASURED, NOT_MEASURED)


def reference_peak(sessions: dict[str, list[Result]]) -> float | None:
    """Return the peak memory of this project's newest run in the reference configuration, GiB."""
    for name in reversed(sessions):
        for result in select(sessions[name], "train_step", REFERENCE):
            if result.outcome == OK:
                return result.peak_reserved_gib
    return None


if __name__ == "__main__":
    main()
