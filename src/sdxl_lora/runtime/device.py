"""The machine that a stage runs on: which device, how much memory, one job a GPU.

What is chosen here changes results by rounding at most, so it comes from the environment, never from params.
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
"""What CUDA takes of a GPU beside PyTorch: 0.85 GiB measured on an H100."""
DEVICE_VARIABLE = "SDXL_LORA_DEVICE"

logger = logging.getLogger(__name__)


def choose_device() -> torch.device:
    """The device that SDXL_LORA_DEVICE names, else this process's GPU, else the CPU."""
    if distributed_state().num_processes > 1:
        return torch.device(distributed_state().device)
    name = os.environ.get(DEVICE_VARIABLE) or ("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())  # a memory cap needs to know which GPU
    return device


def compute_fingerprint(device: torch.device) -> str:
    """What rounding depends on: the GPU's name, or the CPU's vector units and the number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"


@contextmanager
def acquire_device(vram_gib: float | None) -> Iterator[torch.device]:
    """A device for as long as the block runs: a GPU is taken by one job at a time, others wait for it.

    Args:
        vram_gib: the most GPU memory that the block may allocate, GiB; None: no limit, and the CPU will do.

    Raises:
        ValueError: a limit is given and there is no GPU with so much memory.
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
    """Keeps a GPU to this process while the block runs; waits, and says so, while another process has it."""
    lock = FileLock(Path(tempfile.gettempdir()) / f"sdxl-lora-{gpu}.lock")
    try:
        lock.acquire(blocking=False)
    except Timeout:
        logger.warning("another job has GPU %s (`nvidia-smi` shows it): waiting for its end", gpu)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


@contextmanager
def one_cpu_thread(device: torch.device) -> Iterator[None]:
    """Gives PyTorch one thread on the CPU while the block runs, if the models are on a GPU.

    What is left to the CPU is small then, and threads that wait for work take cores from decoders. Where the
    models are on the CPU, the number of threads is part of their arithmetic, and stays.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1 if device.type == "cuda" else before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def deterministic_kernels(enabled: bool) -> Iterator[None]:
    """Lets PyTorch use only kernels that repeat to the bit, while the block runs.

    On a GPU, CUBLAS_WORKSPACE_CONFIG has to be set to :4096:8 before CUDA starts; stages do that.
    """
    options: Any = torch.utils.deterministic
    before = torch.are_deterministic_algorithms_enabled(), options.fill_uninitialized_memory
    torch.use_deterministic_algorithms(enabled)
    options.fill_uninitialized_memory = False  # a debugging aid that costs a pass over all memory
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        options.fill_uninitialized_memory = before[1]


def _require_gpu(device: torch.device, vram_gib: float) -> None:
    """Refuses a device without `vram_gib` of GPU memory."""
    remedy = "choose a smaller recipe; `make recipe NAME=demo` selects the one that needs no GPU"
    if device.type != "cuda":
        raise ValueError(
            f"training.vram_gib is {vram_gib:g}: this recipe needs a CUDA GPU with that much memory, and "
            f"PyTorch {torch.__version__} sees none here. Run it on such a machine, or {remedy}"
        )
    total = torch.cuda.get_device_properties(device).total_memory / GIB
    if total < vram_gib:
        name = torch.cuda.get_device_name(device)
        raise ValueError(
            f"training.vram_gib is {vram_gib:g}, but {name} has {total:.2f} GiB in all: "
            f"lower training.vram_gib, or {remedy}"
        )


def require_precision(device: torch.device, precision: Precision, key: str) -> None:
    """Refuses fp16 on a CPU, which has no arithmetic for it.

    Args:
        key: params key of `precision`, for the error message.

    Raises:
        ValueError: the device cannot compute in it at a useful speed.
    """
    if precision == "fp16" and device.type == "cpu":
        raise ValueError(
            f"{key} is fp16, which takes a CUDA GPU, and PyTorch {torch.__version__} sees none here. "
            "The 16 GB recipe is made for a GPU with that much memory; `make recipe NAME=demo` selects the "
            f"one that runs on a CPU, {key}: fp32 makes this one do so, slowly"
        )


def peak_memory_gib(device: torch.device) -> float:
    """Most memory held so far, GiB: by PyTorch since `acquire_device` on a GPU, by the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device) / GIB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB  # Linux counts KiB
