"""Forecast against measured peak memory of training, many configurations: `python -m benchmarks.forecast`.

Each configuration trains SDXL's real shapes for a few steps in a process of its own; a line of JSON says how
it went. Without a GPU, `--forecast-only` shows what would be compared.
"""

import argparse
import json
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.apart import apart, side_by_side
from benchmarks.random_sdxl import RandomDataset, random_denoiser
from sdxl_lora.config import Params, load_params
from sdxl_lora.hardware import GIB, peak_memory_gib, reserved_device
from sdxl_lora.lora import add_adapters
from sdxl_lora.planning import Plan, choose_plan
from sdxl_lora.training import prepare, train_lora

STEPS = 4  # the first records, and all take the same memory
TOLERANCE = 0.05

FULL = {"checkpointing": "none", "micro_batch_size": 3, "vram_gib": None}
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "nothing checkpointed": FULL,
    "all checkpointed": FULL | {"checkpointing": "all"},
    "21 blocks checkpointed": FULL | {"checkpointing": 21},
    "60 blocks checkpointed": FULL | {"checkpointing": 60},
    "micro-batches of 1": FULL | {"micro_batch_size": 1},
    "micro-batches of 1, all checkpointed": FULL | {"micro_batch_size": 1, "checkpointing": "all"},
    "text encoders frozen": FULL | {"text_encoders": "frozen"},
    "text encoders frozen, all checkpointed": FULL | {"text_encoders": "frozen", "checkpointing": "all"},
    "bf16": FULL | {"precision": "bf16"},
    "fp32, micro-batches of 1": FULL | {"precision": "fp32", "micro_batch_size": 1},
    "AdamW in fp32, rank 64": FULL | {"optimizer": "adamw", "rank": 64},
    "moving average": FULL | {"ema_decay": 0.999},
    "8-bit weights, all checkpointed": FULL | {"quantization": "int8", "checkpointing": "all"},
    "4-bit weights, all checkpointed": FULL | {"quantization": "nf4", "checkpointing": "all"},
    "768 px": FULL | {"resolution": 768},
    "512 px, batch 8": FULL | {"resolution": 512, "batch_size": 8, "micro_batch_size": 8},
    "14.5 GiB, planned": {"vram_gib": 14.5},
    "10.8 GiB, planned": {"vram_gib": 10.8},
    "10.8 GiB, planned for 3 at once": {"vram_gib": 10.8, "micro_batch_size": 3},
}


def changed(params: Params, changes: dict[str, Any]) -> Params:
    """`params` with a configuration's changes, each in the section that has such a key; no previews."""
    sections = {}
    for name in ("model", "encoding", "lora", "training"):
        section = getattr(params, name)
        own = {key: value for key, value in changes.items() if key in type(section).model_fields}
        sections[name] = section.model_copy(update=own)
    training = sections["training"].model_copy(
        update={"steps": STEPS, "warmup_steps": 1, "preview_every": None}
    )
    return params.model_copy(update={**sections, "training": training})


def plan_of(name: str, recipe: Params) -> Plan:
    """How this configuration would train on a GPU."""
    params = changed(recipe, CONFIGURATIONS[name])
    latents = RandomDataset(params.encoding.resolution).latents
    return choose_plan(params.model, params.lora, params.training, latents, torch.device("cuda"))


def measure(name: str, recipe: Params, plan: Plan) -> dict[str, Any]:
    """Measured peaks, GiB, of this configuration on this machine's GPU."""
    params = changed(recipe, CONFIGURATIONS[name])
    with reserved_device(params.training.vram_gib) as device:
        config = plan.applied_to(params.training)
        dataset: Any = RandomDataset(params.encoding.resolution)  # acts as an EncodedDataset
        trained = params.model.text_encoders != "frozen"
        denoiser = random_denoiser(config.precision, device, trained, config.quantization)
        add_adapters(denoiser.unet, denoiser.text_encoders, params.lora, params.seed)
        prepare(denoiser, config, dataset.latents, plan.checkpointed)
        seconds = [report.seconds for report in train_lora(denoiser, dataset, config, params.seed)]
        measured = {
            "reserved": peak_memory_gib(device),
            "allocated": torch.cuda.max_memory_allocated(device) / GIB,
            "outside": outside_gib(device),
        }
        gpu = torch.cuda.get_device_name(device)
    return {"measured_gib": measured, "seconds_a_step": min(seconds), "device": gpu}


def outside_gib(device: torch.device) -> float:
    """What the process holds beside PyTorch's own, if it has the GPU to itself: CUDA's context, GiB."""
    free, total = torch.cuda.mem_get_info(device)
    return (total - free - torch.cuda.memory_reserved(device)) / GIB


def table_line(outcome: dict[str, Any]) -> str:
    """Forecast and measurement side by side."""
    if "error" in outcome:
        return f"{outcome['configuration']:40} {outcome['error']}"
    forecast, measured = outcome["forecast_gib"]["total"], outcome["measured_gib"]["reserved"]
    error = forecast / measured - 1
    verdict = "" if abs(error) <= TOLERANCE else "  <- off"
    return f"{outcome['configuration']:40} {forecast:8.2f} {measured:9.2f} {error:+7.1%}{verdict}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recipe", type=Path, default=Path("recipes/sdxl-naruto-16gb.yaml"))
    parser.add_argument(
        "--only", nargs="+", choices=CONFIGURATIONS, default=list(CONFIGURATIONS), metavar="NAME"
    )
    parser.add_argument("--forecast-only", action="store_true", help="do not measure: needs no GPU")
    arguments = parser.parse_args()
    recipe = load_params(arguments.recipe)
    plans = side_by_side(partial(plan_of, recipe=recipe), arguments.only)
    outcomes = []
    for name, plan in zip(arguments.only, plans, strict=True):
        outcome = {"configuration": name, **plan.numbers()}
        if not arguments.forecast_only:
            try:
                outcome |= apart(measure, name, recipe, plan)
            except (BrokenProcessPool, torch.OutOfMemoryError) as error:
                outcome["error"] = str(error).splitlines()[0]
        print(json.dumps(outcome), flush=True)
        outcomes.append(outcome)
    if not arguments.forecast_only:
        print(f"\n{'':40} forecast  measured   error  (peak reserved by PyTorch, GiB)")
        print("\n".join(map(table_line, outcomes)))


if __name__ == "__main__":
    main()
