"""A training killed and gone on with, at SDXL's real shapes: `python -m benchmarks.resume --help`.

Trains on random weights to the end, and again with SIGKILL in the middle and another process that goes on:
with a recorded graph, a moving average, and text encoders that freeze before the kill. A line of JSON says
whether both adapters are equal to the bit, and what checkpoints take.
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

from benchmarks.apart import apart
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
    params = shortened(load_params(options.recipe), options.steps)
    middle = options.steps // 2
    with TemporaryDirectory() as folder:
        whole = apart(train, params, Path(folder, "whole"), save_after=middle)
        params = chosen(params, whole["attention"])
        try:
            apart(train, params, Path(folder, "killed"), save_after=middle, kill_after=middle + 2)
        except BrokenProcessPool:
            resumed = apart(train, params, Path(folder, "killed"))
    print(json.dumps(comparison(whole, resumed)))


def shortened(params: Params, steps: int) -> Params:
    """`params` for so many steps, with all of a state; text encoders freeze in the first half."""
    changes = {"steps": steps, "warmup_steps": 2, "preview_every": None, "ema_decay": 0.99}
    changes["text_encoder_steps"] = steps // 4
    return params.model_copy(
        update={
            "model": params.model.model_copy(update={"text_encoders": "trained_then_frozen"}),
            "training": params.training.model_copy(update=changes),
        }
    )


def chosen(params: Params, attention: str) -> Params:
    """`params` with the attention that was measured as the fastest: the next time might find another."""
    return params.model_copy(update={"training": params.training.model_copy(update={"attention": attention})})


def train(
    params: Params, folder: Path, save_after: int | None = None, kill_after: int | None = None
) -> dict[str, Any]:
    """Goes on from the checkpoint in `folder`, or starts; kills its own process after a step, or reports.

    Args:
        save_after: step whose checkpoint is saved, three times.
        kill_after: step that is this process's last.
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
        loading, went_on_after = perf_counter() - start, training.step
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
            "went_on_after": went_on_after,
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
    """What the two trainings had in common, and what the checkpoint took."""
    return {
        "adapter_equal": whole["adapter"] == resumed["adapter"],
        "reports_equal": str(whole["reports"]) == str(resumed["reports"]),  # NaN is not itself
        "went_on_after": resumed["went_on_after"],
        "steps": len(whole["reports"]),
        "seconds_to_save": round(median(whole["seconds_to_save"]), 3),
        "seconds_to_load": round(resumed["seconds_to_load"], 3),
        "checkpoint_mb": round(max(whole["checkpoint_bytes"]) / 1e6, 1),
        "attention": whole["attention"],
        "device": whole["device"],
    }


if __name__ == "__main__":
    main()
