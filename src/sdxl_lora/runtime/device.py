"""The device that a stage runs on, its memory limit, and the lock that gives a GPU to one job at a time.

The device changes results only by rounding, so it comes from the environment and not from params.
"""

import logging
import os
import resource
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from sdxl_lora.config import Precision
from sdxl_lora.runtime.distributed import distributed_state
from sdxl_lora.storage.atomic_io import GIB

CUDA_CONTEXT = 0.9 * GIB
"""Bytes of GPU memory that CUDA takes in addition to PyTorch's: 0.85 GiB measured on an H100."""
DEVICE_VARIABLE = "SDXL_LORA_DEVICE"

logger = logging.getLogger(__name__)


def choose_device() -> torch.device:
    """Return the device that SDXL_LORA_DEVICE names, else this process's GPU, else the CPU."""
    if distributed_state().num_processes > 1:
        return torch.device(distributed_state().device)
    name = os.environ.get(DEVICE_VARIABLE) or ("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())  # memory limits need an index
    return device


def compute_fingerprint(device: torch.device) -> str:
    """Return what rounding depends on: the GPU's name, or the CPU's vector unit and number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"


@contextmanager
def acquire_device(vram_gib: float | None) -> Iterator[torch.device]:
    """Yield the device for the block; lock a GPU first, after waiting until no other job uses it.

    Args:
        vram_gib: limit of the GPU memory that PyTorch may allocate, GiB; None: no limit, and a CPU suffices.

    Raises:
        ValueError: a limit is given and there is no GPU with that much memory.
    """
    device = choose_device()
    if vram_gib is not None:
        _require_gpu(device, vram_gib)
    if device.type != "cuda":
        yield device
        return
    identity = torch.cuda.get_device_properties(device).uuid
    with exclusive_gpu(identity):
        if vram_gib is not None:
            fraction = vram_gib * GIB / torch.cuda.get_device_properties(device).total_memory
            torch.cuda.set_per_process_memory_fraction(min(fraction, 1.0), device)
        torch.cuda.reset_peak_memory_stats(device)
        yield device


@contextmanager
def exclusive_gpu(gpu: str) -> Iterator[None]:
    """Hold the machine's lock on a GPU during the block; log a warning and wait if another process has it."""
    # In the folder of temporary files, not in the project: jobs of all clones and users share the GPU.
    lock = FileLock(Path(tempfile.gettempdir()) / f"sdxl-lora-{gpu}.lock")
    try:
        lock.acquire(blocking=False)
    except Timeout:
        logger.warning("another job uses GPU %s (`nvidia-smi` shows it): waiting until it ends", gpu)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


@contextmanager
def one_cpu_thread(device: torch.device) -> Iterator[None]:
    """Limit PyTorch to one CPU thread during the block if the models are on a GPU.

    The CPU's work is small then, and idle threads that spin take cores from the image decoders. With models
    on the CPU the number of threads stays, because the order of sums, and so rounding, depends on it.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1 if device.type == "cuda" else before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def deterministic_kernels(enabled: bool) -> Iterator[None]:
    """Restrict PyTorch to deterministic kernels during the block, if `enabled`.

    On a GPU, CUBLAS_WORKSPACE_CONFIG must be :4096:8 before CUDA starts; stages set it.
    """
    options: Any = torch.utils.deterministic
    before = torch.are_deterministic_algorithms_enabled(), options.fill_uninitialized_memory
    torch.use_deterministic_algorithms(enabled)
    # On by default in deterministic mode: it fills each new tensor with NaN, a pass over all memory that
    # only helps to find reads of uninitialized memory.
    options.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        options.fill_uninitialized_memory = before[1]


def _require_gpu(device: torch.device, vram_gib: float) -> None:
    """Raise ValueError unless `device` is a GPU with `vram_gib` of memory."""
    remedy = "choose a smaller recipe; `make recipe NAME=demo` selects the one that needs no GPU"
    if device.type != "cuda":
        raise ValueError(
            f"training.vram_gib is {vram_gib:g}: this recipe needs a CUDA GPU with that much memory, and "
            f"PyTorch {torch.__version__} finds none. Run it on a machine with one, or {remedy}"
        )
    total = torch.cuda.get_device_properties(device).total_memory / GIB
    if total < vram_gib:
        name = torch.cuda.get_device_name(device)
        raise ValueError(
            f"training.vram_gib is {vram_gib:g}, but {name} has {total:.2f} GiB in total: "
            f"lower training.vram_gib, or {remedy}"
        )


def require_precision(device: torch.device, precision: Precision, key: str) -> None:
    """Raise ValueError for fp16 on a CPU, which has no fast fp16 arithmetic.

    Args:
        key: params key of `precision`, for the error message.
    """
    if precision == "fp16" and device.type == "cpu":
        raise ValueError(
            f"{key} is fp16, which needs a CUDA GPU, and PyTorch {torch.__version__} finds none. "
            "Run this recipe on a machine with one, select the recipe for CPUs with "
            f"`make recipe NAME=demo`, or set {key} to fp32, which is slow on a CPU"
        )


def peak_memory_gib(device: torch.device) -> float:
    """Return the peak memory in GiB: PyTorch's since `acquire_device` on a GPU, the process's on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device) / GIB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB  # ru_maxrss is in KiB on Linux
