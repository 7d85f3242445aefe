"""Time and peak memory of training steps on SDXL's real shapes: `python -m benchmarks.train_step --help`.

Runs the library's own training loop on random weights and random latents, with the numbers of a recipe.
"""

import argparse
import json
import statistics
from pathlib import Path

import torch

from benchmarks.random_sdxl import RandomDataset, random_denoiser
from sdxl_lora.config import load_params
from sdxl_lora.hardware import GIB, peak_memory_gib, reserved_device
from sdxl_lora.lora import add_adapters
from sdxl_lora.training import prepare, train_lora

WARMUP_STEPS = 4


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recipe", type=Path, default=Path("recipes/sdxl-naruto-16gb.yaml"))
    parser.add_argument("--steps", type=int, default=20, help="steps timed, after 4 of warm-up")
    parser.add_argument("--precision", choices=["fp16", "bf16", "fp32"], help="instead of the recipe's")
    parser.add_argument("--text-encoders", choices=["frozen", "trained"], help="instead of the recipe's")
    parser.add_argument("--attention", choices=["sdpa", "xformers", "math"], help="instead of the recipe's")
    parser.add_argument("--no-checkpointing", action="store_true", help="keep all activations")
    parser.add_argument("--uncapped", action="store_true", help="ignore training.vram_gib")
    arguments = parser.parse_args()
    params = load_params(arguments.recipe)
    changes = {"steps": WARMUP_STEPS + arguments.steps, "warmup_steps": 1}
    changes |= {key: value for key in ("precision", "attention") if (value := getattr(arguments, key))}
    if arguments.no_checkpointing:
        changes["gradient_checkpointing"] = False
    config = params.training.model_copy(update=changes)
    trained = (arguments.text_encoders or params.model.text_encoders) == "trained"
    with reserved_device(None if arguments.uncapped else config.vram_gib) as device:
        denoiser = random_denoiser(config.precision, device, trained)
        add_adapters(denoiser.unet, denoiser.text_encoders, params.lora, params.seed)
        prepare(denoiser, config, torch.Size((1, 4, 128, 128)))
        reports = list(train_lora(denoiser, RandomDataset(), config, params.seed))
        result = {
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
            "torch": torch.__version__,
            "precision": config.precision,
            "text_encoders": "trained" if trained else "frozen",
            "attention": config.attention,
            "gradient_checkpointing": config.gradient_checkpointing,
            "batch_size": config.batch_size,
            "median_seconds_per_step": round(statistics.median(r.seconds for r in reports[WARMUP_STEPS:]), 4),
            "peak_reserved_gib": round(peak_memory_gib(device), 2),
            "peak_allocated_gib": round(torch.cuda.max_memory_allocated(device) / GIB, 2),
            "final_loss": round(reports[-1].loss, 4),
            "loss_scale": reports[-1].loss_scale,
        }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
