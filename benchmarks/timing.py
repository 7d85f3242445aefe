"""Wall time of a function on a device that may still be computing when it returns."""

from collections.abc import Callable
from time import perf_counter

import torch

WARMUP = 3


def timed(function: Callable[[], object], device: torch.device, repetitions: int) -> list[float]:
    """Return the seconds of each call after three warm-up calls; the device is idle before and after each."""
    seconds = []
    for _ in range(WARMUP + repetitions):
        wait_for(device)
        start = perf_counter()
        function()
        wait_for(device)
        seconds.append(round(perf_counter() - start, 6))
    return seconds[WARMUP:]


def wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
