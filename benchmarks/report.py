"""benchmarks/results/*.jsonl -> docs/performance.md: `python -m benchmarks.report`.

Says nothing that was not measured, counted or stated as arithmetic.
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

*Written by `python -m benchmarks.report` from [benchmarks/results](../benchmarks/results), one file a
sitting on one machine.*

SDXL in its real shapes with random weights, 1024 px unless a table says otherwise. A step's time is the
median of those after the warm-up. **Reserved** is the most memory that PyTorch's allocator held, **device**
the most that the driver saw in use, with CUDA's context. **x official** compares samples a second with
diffusers' `train_text_to_image_lora_sdxl.py` on the same work in the same sitting: unmodified, fp16, 8-bit
Adam, checkpointing, SDPA, no cap, images loaded by 4 workers. **Of peak** is the share of the measured
speed of one large matrix product that goes into the step's necessary work: {tflop:.1f} TFLOP for batch 3
({recomputed:.1f} with recomputation, which is not counted in its favour), text encoders trained; see
[benchmarks/counts.py](../benchmarks/counts.py).
"""
DRAWING = """\
Prompts to pictures, with guidance, text encoders and VAE. **x diffusers** is images a second over diffusers'
own pipeline with the adapter as `load_lora_weights` leaves it. **PSNR** is of the pictures against that
pipeline's in fp32; only those of the demo model mean something."""
FORECAST = """\
Peak memory of training as `make plan` foretells it, without a GPU and before any weight is loaded, beside
what PyTorch reserved in four steps. 1024 px, batch 3, fp16, nothing checkpointed unless the row says
otherwise."""
MEASURE = """\
## Measure it

On a machine with a CUDA GPU and nothing else on it; DIFFUSERS is a checkout of diffusers:

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
DEMO="--model demo --resolution 128 --batch-size 8 --num-inference-steps 25". An option that takes several
values runs every combination; `--help` names the others. Each line of a file holds the command that
repeats it.
"""


def main() -> None:
    sittings = {path.stem: read_results(path) for path in sorted(FOLDER.glob("*.jsonl"))}
    PAGE.write_text(page(sittings, counts.load()), encoding="utf-8")


def page(sittings: dict[str, list[Result]], counted: Counted) -> str:
    """The whole page. `sittings` maps a file's name to its lines, oldest first."""
    step, recomputed = (3 * tflop for tflop in work("trained", counted))
    parts = [INTRODUCTION.format(tflop=step, recomputed=recomputed)]
    parts += [sitting_section(name, sittings[name], counted) for name in reversed(sittings)]
    if not sittings:
        parts.append("## Training step\n\nNot measured yet.\n")
    parts += [claims_section(sittings, counted), full_fine_tuning(counted, reference_peak(sittings)), MEASURE]
    return "\n".join(parts)


def sitting_section(name: str, results: Sequence[Result], counted: Counted) -> str:
    """One machine's figures."""
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
        lines += ["### Encoding images", "", encode_table(encodes), ""]
    if forecasts := list(select(results, "forecast", {})):
        lines += ["### Forecast memory", "", FORECAST, "", forecast_table(forecasts), ""]
    if samples := list(select(results, "sample", {})):
        lines += ["### Drawing pictures", "", DRAWING, "", sampling_table(samples), ""]
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
    """Hardware and versions in a sentence."""
    gpu = "CPU alone"
    if of_run.gpu is not None:
        gpu = f"{of_run.gpu} ({of_run.gpu_memory_gib:.1f} GiB), driver {of_run.driver}"
    packages = ", ".join(f"{name} {version}" for name, version in of_run.packages.items())
    return f"{gpu}; {of_run.cpus} CPUs; Python {of_run.python}, {packages}"


def claims_section(sittings: dict[str, list[Result]], counted: Counted) -> str:
    """The usual claims beside what was measured here."""
    reference = ", ".join(f"{key} {cell(value)}" for key, value in REFERENCE.items())
    rows = [row for claim in CLAIMS for row in claim_rows(claim, sittings)]
    rows += [cached_latents_row(sittings), *adapter_claims(counted)]
    return (
        "## The usual claims\n\nPairs of runs of one sitting that differ in a technique alone, nearest to\n"
        f"{reference}. Memory is the peak that PyTorch reserved.\n\n"
        f"{table(['technique', 'usually said', 'on', 'memory', 'time of a step', 'holds'], rows)}\n"
    )


def claim_rows(claim: Claim, sittings: dict[str, list[Result]]) -> Iterable[tuple[str, ...]]:
    """A row for each subject that was measured, from the newest sitting that has a pair; one row at least."""
    rows = []
    for benchmark, subject in SUBJECTS.items():
        pairs = (find_pair(claim, benchmark, sittings[name]) for name in reversed(sittings))
        pair = next((pair for pair in pairs if pair is not None), None)
        if pair is None:
            continue
        context = ", ".join(f"{key} {cell(value)}" for key, value in pair.apart.items())
        subject = f"{subject} ({context})" if context else subject
        if (change := pair.change) is None:
            memory = f"{pair.applied.outcome} / without: {pair.absent.outcome}"
            rows.append((claim.technique, claim.usual, subject, memory, NONE, NONE))
            continue
        memory, time = shift(*change.gib, "GiB"), shift(*change.seconds, "s")
        verdict = f"{'yes' if claim.holds(change) else 'no'} ({claim.rule})"
        rows.append((claim.technique, claim.usual, subject, memory, time, verdict))
    return rows or [(claim.technique, claim.usual, NONE, NOT_MEASURED, NOT_MEASURED, NOT_MEASURED)]


def shift(before: float, after: float, unit: str) -> str:
    """From what to what, and by how many percent."""
    return f"{before:.3g} -> {after:.3g} {unit} ({after / before - 1:+.0%})"


def cached_latents_row(sittings: dict[str, list[Result]]) -> tuple[str, ...]:
    """Cached latents spare the encoding that the official script does in fp32 every step."""
    technique, usual = "latents cached", "the VAE's time and memory saved"
    for name in reversed(sittings):
        for result in select(sittings[name], "vae_encode", {"precision": "fp32", "batch_size": 3}):
            memory = f"the VAE alone takes {number(result.peak_reserved_gib, 2)} GiB"
            time = f"{number(result.seconds_per_step, 3)} s saved"
            return (technique, usual, "VAE in fp32, 3 images", memory, time, NONE)
    return (technique, usual, NONE, NOT_MEASURED, NOT_MEASURED, NOT_MEASURED)


def reference_peak(sittings: dict[str, list[Result]]) -> float | None:
    """Peak memory of this project's newest run in the reference configuration, GiB."""
    for name in reversed(sittings):
        for result in select(sittings[name], "train_step", REFERENCE):
            if result.outcome == OK:
                return result.peak_reserved_gib
    return None


if __name__ == "__main__":
    main()
