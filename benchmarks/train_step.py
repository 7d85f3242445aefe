"""Time and peak memory of training steps on SDXL's real shapes: `python -m benchmarks.train_step --help`.

Runs the library's training loop on random weights and random latents, with the params of a recipe. Options
with several values span a grid. Each combination runs in a separate process and prints a JSON line; a table
of all follows.
"""

import argparse
import os
import sys
from collections.abc import Iterator
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path
from typing import Any, get_args

import torch

from benchmarks.device_memory import DeviceMemory, allocator_peaks
from benchmarks.grid import combinations, gib_or_none, number_or_word, repeat, true_or_false
from benchmarks.isolation import map_isolated, run_isolated
from benchmarks.random_sdxl import RandomDataset, random_denoiser
from benchmarks.results import GIB, OK, Configuration, Result, now, publish, this_machine
from benchmarks.tables import steps_table
from sdxl_lora.adapters.lora import add_adapters
from sdxl_lora.config import Attention, Params, Quantization, load_params
from sdxl_lora.memory.planner import ForecastPlan, TrainingPlan, choose_plan
from sdxl_lora.runtime.device import acquire_device, choose_device, deterministic_kernels
from sdxl_lora.training.trainer import StepMetrics, Trainer, prepare_modules

WARMUP_STEPS = 4
VARIED = (
    "precision",
    "quantization",
    "checkpointing",
    "attention",
    "deterministic",
    "optimizer",
    "text_encoders",
    "vram_gib",
    "batch_size",
    "micro_batch_size",
    "rank",
    "resolution",
)


def main() -> None:
    options = parse()
    grid = list(combinations(options, VARIED, fixed=()))
    recipe = load_params(options.recipe)
    plans = list(
        map_isolated(partial(plan, recipe=recipe, device=choose_device()), grid)
    )  # before timing starts
    results = []
    for configuration, chosen in zip(grid, plans, strict=True):
        try:
            results.append(run_isolated(measure, configuration, recipe, options.steps, chosen))
        except BrokenProcessPool as error:  # measure the rest of the grid
            print(f"{configuration}: {error}", file=sys.stderr)
            continue
        publish(results[-1], options.output)
    print(steps_table(results), file=sys.stderr)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recipe", type=Path, default=Path("recipes/sdxl-naruto-16gb.yaml"))
    parser.add_argument("--steps", type=int, default=20, help="timed steps, after 4 warm-up steps")
    parser.add_argument("--output", type=Path, help="append the JSON lines to this file as well")
    several = parser.add_argument_group("options that take several values (default: the recipe's)")
    several.add_argument("--precision", nargs="+", choices=["fp16", "bf16", "fp32"])
    several.add_argument("--quantization", nargs="+", choices=get_args(Quantization))
    several.add_argument(
        "--checkpointing", nargs="+", type=number_or_word, help="none, all, auto, or a number of blocks"
    )
    several.add_argument("--attention", nargs="+", choices=get_args(Attention))
    several.add_argument("--deterministic", nargs="+", type=true_or_false, help="true or false")
    several.add_argument("--optimizer", nargs="+", choices=["adamw_8bit", "adamw"])
    several.add_argument("--text-encoders", nargs="+", choices=["frozen", "trained"])
    several.add_argument(
        "--vram-gib", nargs="+", type=gib_or_none, help="memory limit of the allocator in GiB, or none"
    )
    several.add_argument("--batch-size", nargs="+", type=int)
    several.add_argument("--micro-batch-size", nargs="+", type=number_or_word, help="a number or auto")
    several.add_argument("--rank", nargs="+", type=int)
    several.add_argument("--resolution", nargs="+", type=int, help="side length in pixels")
    options = parser.parse_args()
    for name, value in recipe_values(load_params(options.recipe)).items():
        if getattr(options, name) is None:
            setattr(options, name, [value])
    return options


def recipe_values(params: Params) -> Configuration:
    """Return the values of a recipe that the options replace."""
    training = params.training
    return {
        "precision": training.precision,
        "quantization": training.quantization,
        "checkpointing": training.checkpointing,
        "attention": training.attention,
        "deterministic": training.deterministic,
        "optimizer": training.optimizer,
        "text_encoders": "frozen" if params.model.text_encoders == "frozen" else "trained",
        "vram_gib": training.vram_gib,
        "batch_size": training.batch_size,
        "micro_batch_size": training.micro_batch_size,
        "rank": params.lora.rank,
        "resolution": params.encoding.resolution,
    }


def with_configuration(params: Params, configuration: Configuration, steps: int) -> Params:
    """Return a recipe with a configuration's values, for `steps` steps after the warm-up."""
    training = {
        name: configuration[name] for name in configuration if name in type(params.training).model_fields
    }
    fixed = {"warmup_steps": 1, "text_encoder_steps": None, "preview_every": None}
    training |= {"steps": WARMUP_STEPS + steps, **fixed}
    return params.model_copy(
        update={
            "training": params.training.model_copy(update=training),
            "lora": params.lora.model_copy(update={"rank": configuration["rank"]}),
            "model": params.model.model_copy(update={"text_encoders": configuration["text_encoders"]}),
        }
    )


def plan(configuration: Configuration, recipe: Params, device: torch.device) -> TrainingPlan | str:
    """Return the training plan on `device`, or the reason why there is none."""
    params = with_configuration(recipe, configuration, steps=1)
    latents = RandomDataset(configuration["resolution"]).latents
    try:
        return choose_plan(params.model, params.lora, params.training, latents, device)
    except ValueError as error:
        return str(error).splitlines()[0]


def measure(configuration: Configuration, recipe: Params, steps: int, plan: TrainingPlan | str) -> Result:
    """Train for a few steps. The outcome of a configuration that cannot run is the reason."""
    params = with_configuration(recipe, configuration, steps)
    reports: list[StepMetrics] = []
    outcome = OK if isinstance(plan, TrainingPlan) else plan
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # as stages do
    with (
        acquire_device(params.training.vram_gib) as device,
        deterministic_kernels(params.training.deterministic),
        DeviceMemory() as memory,
    ):
        try:
            if isinstance(plan, TrainingPlan):
                reports.extend(training(params, plan, device, RandomDataset(configuration["resolution"])))
        except torch.OutOfMemoryError:
            outcome = "out of memory"
        except (ImportError, RuntimeError, ValueError) as error:
            outcome = f"{type(error).__name__}: {str(error).splitlines()[0]}"
        peaks = allocator_peaks(device)
    return Result(
        benchmark="train_step",
        date=now(),
        command=repeat("train_step", configuration, steps=steps),
        machine=this_machine(),
        configuration=configuration,
        outcome=outcome,
        seconds=[round(report.seconds, 4) for report in reports[WARMUP_STEPS:]],
        **peaks,
        peak_device_gib=memory.peak_gib,
        forecast_gib=plan.forecast.total / GIB if isinstance(plan, ForecastPlan) else None,
        figures={"final_loss": reports[-1].loss, "loss_scale": reports[-1].loss_scale} if reports else {},
    )


def training(params: Params, plan: TrainingPlan, device: torch.device, dataset: Any) -> Iterator[StepMetrics]:
    """Yield the metrics of the library's training loop on random weights and latents."""
    config, trained = plan.applied_to(params.training), params.model.text_encoders != "frozen"
    denoiser = random_denoiser(config.precision, device, trained, config.quantization)
    add_adapters(denoiser.parts, params.lora, params.seed)
    prepare_modules(denoiser, config, dataset.latents, plan.checkpointed)
    yield from Trainer(denoiser, dataset, config, params.seed)


if __name__ == "__main__":
    main()
