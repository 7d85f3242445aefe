"""Upper limit of the machine: TFLOP/s of one large matrix product, `python -m benchmarks.matmul`.

The operands are random, because a GPU uses less power and clocks higher on zeros.
"""

import argparse
from pathlib import Path
from statistics import median

import torch

from benchmarks.results import OK, Configuration, Result, now, publish, this_machine
from benchmarks.timing import timed
from sdxl_lora.config import Precision
from sdxl_lora.models.loading import DTYPES
from sdxl_lora.runtime.device import acquire_device

REPETITIONS = 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--precision", nargs="+", choices=list(DTYPES), default=["fp16", "bf16"])
    parser.add_argument("--size", type=int, default=8192, help="rows and columns of both operands")
    parser.add_argument("--output", type=Path, help="append the JSON lines to this file as well")
    options = parser.parse_args()
    for precision in options.precision:
        publish(measure(precision, options.size), options.output)


def measure(precision: Precision, size: int) -> Result:
    """Time a (size, size) @ (size, size) product, 2 size^3 floating-point operations."""
    with acquire_device(None) as device:
        left, right = (torch.randn(size, size, device=device).to(DTYPES[precision]) for _ in range(2))
        seconds = timed(lambda: left @ right, device, REPETITIONS)
    configuration: Configuration = {"precision": precision, "size": size}
    return Result(
        benchmark="matmul",
        date=now(),
        command=f"python -m benchmarks.matmul --precision {precision} --size {size}",
        machine=this_machine(),
        configuration=configuration,
        outcome=OK,
        seconds=seconds,
        figures={"tflop_per_second": round(2 * size**3 / median(seconds) / 1e12, 1)},
    )


if __name__ == "__main__":
    main()
