"""Time and memory of encoding a batch of images with the VAE: `python -m benchmarks.vae_encode`.

SDXL's VAE in its real shapes with random weights, alone on the device. Trainers that cache latents encode
each image once, others encode at every step.
"""

import argparse
from pathlib import Path

import torch

from benchmarks.device_memory import allocator_peaks
from benchmarks.grid import combinations, repeat
from benchmarks.results import OK, Configuration, Result, now, publish, this_machine
from benchmarks.timing import timed
from sdxl_lora.config import Precision
from sdxl_lora.models import architecture
from sdxl_lora.models.loading import DTYPES
from sdxl_lora.runtime.device import acquire_device

REPETITIONS = 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--precision", nargs="+", choices=list(DTYPES), default=["fp16", "fp32"])
    parser.add_argument("--batch-size", nargs="+", type=int, default=[1, 3])
    parser.add_argument("--resolution", nargs="+", type=int, default=[1024], help="side length in pixels")
    parser.add_argument("--repetitions", type=int, default=REPETITIONS)
    parser.add_argument("--output", type=Path, help="append the JSON lines to this file as well")
    options = parser.parse_args()
    for configuration in combinations(options, ("precision", "batch_size", "resolution"), fixed=()):
        publish(measure(configuration, options.repetitions), options.output)


@torch.inference_mode()
def measure(configuration: Configuration, repetitions: int) -> Result:
    """Time `vae.encode` of a batch that is already on the device."""
    precision: Precision = configuration["precision"]
    batch_size, side = configuration["batch_size"], configuration["resolution"]
    outcome, seconds = OK, []
    torch.cuda.empty_cache()  # left by the previous configuration
    with acquire_device(None) as device:
        vae = architecture.SDXL_BASE.make_vae(precision, device)
        pixels = torch.rand(batch_size, 3, side, side, device=device, dtype=DTYPES[precision])
        try:
            seconds = timed(lambda: vae.encode(pixels), device, repetitions)
        except torch.OutOfMemoryError:
            outcome = "out of memory"
        peaks = allocator_peaks(device)
    return Result(
        benchmark="vae_encode",
        date=now(),
        command=repeat("vae_encode", configuration, repetitions=repetitions),
        machine=this_machine(),
        configuration=configuration,
        outcome=outcome,
        seconds=seconds,
        **peaks,
    )


if __name__ == "__main__":
    main()
