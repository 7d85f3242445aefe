"""Killed and resumed training with SDXL's real shapes: `python -m benchmarks.resume --help`.

Trains random weights to the end, then again with SIGKILL in the middle and another process that resumes.
Training uses a CUDA graph, a moving average, and text encoders that freeze before the kill. A JSON line
says whether both adapters are bit-identical, and how long checkpoints take.
"""

import argparse
import json
import os
import signal
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import torch

from benchmarks.isolation import run_isolated
from benchmarks.random_sdxl import RandomDataset, random_denoiser
from sdxl_lora.adapters.lora import add_adapters, lora_parameters
from sdxl_lora.config import Params, load_params
from sdxl_lora.memory.planner import choose_plan
from sdxl_lora.runtime.device import acquire_device, compute_fingerprint, deterministic_kernels
from sdxl_lora.storage.safetensors_io import content_digest
from sdxl_lora.training.checkpointer import Checkpointer
from sdxl_lora.training.trainer import Trainer, prepare_modules


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recipe", type=Path, default=Path("recipes/sdxl-naruto-16gb.yaml"))
    parser.add_argument("--steps", type=int, default=40)
    options = parser.parse_args()
    params = with_steps(load_params(options.recipe), options.steps)
    middle = options.steps // 2
    with TemporaryDirectory() as folder:
        whole = run_isolated(train, params, Path(folder, "whole"), save_after=middle)
        params = with_attention(params, whole["attention"])
        try:
            run_isolated(train, params, Path(folder, "killed"), save_after=middle, kill_after=middle + 2)
        except BrokenProcessPool:
            resumed = run_isolated(train, params, Path(folder, "killed"))
    print(json.dumps(comparison(whole, resumed)))


def with_steps(params: Params, steps: int) -> Params:
    """Return `params` for `steps` steps with all parts of the state; text encoders freeze early."""
    changes = {"steps": steps, "warmup_steps": 2, "preview_every": None, "ema_decay": 0.99}
    changes["text_encoder_steps"] = steps // 4
    return params.model_copy(
        update={
            "model": params.model.model_copy(update={"text_encoders": "trained_then_frozen"}),
            "training": params.training.model_copy(update=changes),
        }
    )


def with_attention(params: Params, attention: str) -> Params:
    """Return `params` with the attention of the first training: measuring again may choose another."""
    return params.model_copy(update={"training": params.training.model_copy(update={"attention": attention})})


def train(
    params: Params, folder: Path, save_after: int | None = None, kill_after: int | None = None
) -> dict[str, Any]:
    """Train from the checkpoint in `folder`, if any; kill this process after a step, or return figures.

    Args:
        save_after: step after which a checkpoint is saved, three times.
        kill_after: last step of this process.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # as stages do
    torch.manual_seed(0)
    dataset: Any = RandomDataset(params.encoding.resolution)  # acts as an EncodedDataset
    with acquire_device(params.training.vram_gib) as device, deterministic_kernels(True):
        plan = choose_plan(params.model, params.lora, params.training, dataset.latents, device)
        config = plan.applied_to(params.training)
        denoiser = random_denoiser(config.precision, device, True, config.quantization)
        add_adapters(denoiser.parts, params.lora, params.seed)
        attention = prepare_modules(denoiser, config, dataset.latents, plan.checkpointed)
        training = Trainer(denoiser, dataset, config, params.seed)
        checkpoints, saving = Checkpointer(folder, minutes=None), []
        start = perf_counter()
        checkpoint = checkpoints.newest()
        if checkpoint is not None:
            training.load_state_dict(checkpoint.tensors)
        loading, resumed_after = perf_counter() - start, training.step
        for report in training:
            if report.step == save_after:
                saving = [timed_save(checkpoints, training) for _ in range(3)]
            if report.step == kill_after:
                os.kill(os.getpid(), signal.SIGKILL)
        weights = [p.detach() for module in denoiser.modules for p in lora_parameters(module)]
        return {
            "adapter": content_digest({str(number): tensor for number, tensor in enumerate(weights)}),
            "reports": [(report.loss, report.grad_norm, report.loss_scale) for report in training.history],
            "attention": attention,
            "resumed_after": resumed_after,
            "seconds_to_save": saving,
            "seconds_to_load": loading,
            "checkpoint_bytes": [path.stat().st_size for path in folder.glob("*.safetensors")],
            "device": compute_fingerprint(device),
        }


def timed_save(checkpoints: Checkpointer, training: Trainer) -> float:
    start = perf_counter()
    checkpoints.save(training.step, training.state_dict(), {})
    return perf_counter() - start


def comparison(whole: dict[str, Any], resumed: dict[str, Any]) -> dict[str, Any]:
    """Compare the two trainings, and return the checkpoint's size and times."""
    return {
        "adapter_equal": whole["adapter"] == resumed["adapter"],
        "reports_equal": str(whole["reports"]) == str(resumed["reports"]),  # NaN does not equal itself
        "resumed_after": resumed["resumed_after"],
        "steps": len(whole["reports"]),
        "seconds_to_save": round(median(whole["seconds_to_save"]), 3),
        "seconds_to_load": round(resumed["seconds_to_load"], 3),
        "checkpoint_mb": round(max(whole["checkpoint_bytes"]) / 1e6, 1),
        "attention": whole["attention"],
        "device": whole["device"],
    }


if __name__ == "__main__":
    main()
