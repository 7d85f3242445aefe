"""Forecast and measured peak memory of training in many configurations: `python -m benchmarks.forecast`.

Each configuration trains SDXL's real shapes for a few steps in a separate process and prints a JSON line.
`--forecast-only` prints the forecasts without measuring and needs no GPU.
"""

import argparse
import os
import shlex
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.device_memory import DeviceMemory, allocator_peaks
from benchmarks.isolation import map_isolated, run_isolated
from benchmarks.random_sdxl import RandomDataset, random_denoiser
from benchmarks.results import OK, Result, now, publish, this_machine
from benchmarks.tables import forecast_table
from sdxl_lora.adapters.lora import add_adapters
from sdxl_lora.config import Params, load_params
from sdxl_lora.memory.planner import ForecastPlan, TrainingPlan, choose_plan
from sdxl_lora.runtime.device import acquire_device, deterministic_kernels
from sdxl_lora.training.trainer import Trainer, prepare_modules

STEPS = 4  # the first captures the graph; memory is constant, unless text encoders freeze after two

FULL = {"checkpointing": "none", "micro_batch_size": 3, "vram_gib": None}
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "nothing checkpointed": FULL,
    "all checkpointed": FULL | {"checkpointing": "all"},
    "21 blocks checkpointed": FULL | {"checkpointing": 21},
    "60 blocks checkpointed": FULL | {"checkpointing": 60},
    "micro-batches of 1": FULL | {"micro_batch_size": 1},
    "micro-batches of 1, all checkpointed": FULL | {"micro_batch_size": 1, "checkpointing": "all"},
    "text encoders frozen": FULL | {"text_encoders": "frozen"},
    "text encoders trained, then frozen": FULL
    | {"text_encoders": "trained_then_frozen", "text_encoder_steps": 2},
    "text encoders frozen, all checkpointed": FULL | {"text_encoders": "frozen", "checkpointing": "all"},
    "bf16": FULL | {"precision": "bf16"},
    "fp32, micro-batches of 1": FULL | {"precision": "fp32", "micro_batch_size": 1},
    "AdamW in fp32, rank 64": FULL | {"optimizer": "adamw", "rank": 64},
    "moving average": FULL | {"ema_decay": 0.999},
    "plain attention, all checkpointed": FULL | {"attention": "math", "checkpointing": "all"},
    "8-bit weights, all checkpointed": FULL | {"quantization": "int8", "checkpointing": "all"},
    "4-bit weights, all checkpointed": FULL | {"quantization": "nf4", "checkpointing": "all"},
    "768 px": FULL | {"resolution": 768},
    "512 px, batch 8": FULL | {"resolution": 512, "batch_size": 8, "micro_batch_size": 8},
    "14.5 GiB, planned": {"vram_gib": 14.5},
    "13.8 GiB, planned": {"vram_gib": 13.8},
    "10.8 GiB, planned": {"vram_gib": 10.8},
    "10.8 GiB, planned for 3 at once": {"vram_gib": 10.8, "micro_batch_size": 3},
}


def with_changes(params: Params, changes: dict[str, Any]) -> Params:
    """Return `params` with a configuration's changes, each in the section that has the key; no previews."""
    sections = {}
    for name in ("model", "encoding", "lora", "training"):
        section = getattr(params, name)
        values = {key: value for key, value in changes.items() if key in type(section).model_fields}
        sections[name] = section.model_copy(update=values)
    training = sections["training"].model_copy(
        update={"steps": STEPS, "warmup_steps": 1, "preview_every": None}
    )
    return params.model_copy(update={**sections, "training": training})


def make_plan(name: str, recipe: Params) -> TrainingPlan | str:
    """Return the training plan of this configuration on a GPU, or the reason why there is none."""
    params = with_changes(recipe, CONFIGURATIONS[name])
    latents = RandomDataset(params.encoding.resolution).latents
    try:
        return choose_plan(params.model, params.lora, params.training, latents, torch.device("cuda"))
    except (MemoryError, RuntimeError, ValueError) as error:
        return reason(error)


def compare(name: str, recipe: Params, plan: TrainingPlan | str, measures: bool) -> Result:
    """Return forecast and, if `measures`, measured peak of a configuration; a failure becomes its outcome."""
    outcome, measured = OK, {}
    if isinstance(plan, str):
        outcome = plan
    elif measures:
        try:
            measured = run_isolated(measure, name, recipe, plan)
        except (ImportError, RuntimeError, ValueError) as error:  # also a process that died, or a full GPU
            outcome = reason(error)
    figures = {}
    if isinstance(plan, ForecastPlan):
        figures = {f"forecast_{part}_gib": round(gib, 3) for part, gib in plan.forecast.gib().items()}
        figures |= {"micro_batch_size": plan.micro_batch_size, "checkpointed": len(plan.checkpointed)}
    return Result(
        **{
            "benchmark": "forecast",
            "date": now(),
            "command": shlex.join(["python", "-m", "benchmarks.forecast", "--only", name]),
            "machine": this_machine(),
            "configuration": {"name": name, **CONFIGURATIONS[name]},
            "outcome": outcome,
            "forecast_gib": figures.get("forecast_total_gib"),
            "figures": figures,
            **measured,
        }
    )


def measure(name: str, recipe: Params, plan: TrainingPlan) -> dict[str, Any]:
    """Train with this configuration on this machine's GPU; return the result's fields of time and memory."""
    params = with_changes(recipe, CONFIGURATIONS[name])
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # as stages do
    with (
        acquire_device(params.training.vram_gib) as device,
        deterministic_kernels(params.training.deterministic),
        DeviceMemory() as memory,
    ):
        config = plan.applied_to(params.training)
        dataset: Any = RandomDataset(params.encoding.resolution)  # acts as an EncodedDataset
        trained = params.model.text_encoders != "frozen"
        denoiser = random_denoiser(config.precision, device, trained, config.quantization)
        add_adapters(denoiser.parts, params.lora, params.seed)
        prepare_modules(denoiser, config, dataset.latents, plan.checkpointed)
        seconds = [round(report.seconds, 4) for report in Trainer(denoiser, dataset, config, params.seed)]
        peaks = allocator_peaks(device)
    return {"seconds": seconds, **peaks, "peak_device_gib": memory.peak_gib}


def reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0]}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recipe", type=Path, default=Path("recipes/sdxl-naruto-16gb.yaml"))
    parser.add_argument(
        "--only", nargs="+", choices=CONFIGURATIONS, default=list(CONFIGURATIONS), metavar="NAME"
    )
    parser.add_argument("--output", type=Path, help="append the JSON lines to this file as well")
    parser.add_argument("--forecast-only", action="store_true", help="do not measure; needs no GPU")
    arguments = parser.parse_args()
    recipe = load_params(arguments.recipe)
    plans = map_isolated(partial(make_plan, recipe=recipe), arguments.only)
    results = []
    for name, plan in zip(arguments.only, plans, strict=True):
        results.append(compare(name, recipe, plan, measures=not arguments.forecast_only))
        publish(results[-1], arguments.output)
    print(forecast_table(results), file=sys.stderr)


if __name__ == "__main__":
    main()
