"""The environment of a stage, as far as it can change bits of a result: hardware, driver, libraries, choices.

It contains no name of a machine or user and no path, so that it may be published with the result.
"""

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pynvml
import torch

from sdxl_lora.runtime.distributed import distributed_state

NUMERICAL_LIBRARIES = (
    "accelerate",
    "bitsandbytes",
    "datasets",
    "diffusers",
    "ftfy",
    "huggingface-hub",
    "imagehash",
    "numpy",
    "peft",
    "pillow",
    "safetensors",
    "tokenizers",
    "torch",
    "transformers",
    "triton",
    "xformers",
)
"""Packages whose code can change bits of any result, those of data included: recorded, never compared to
decide. The keys of `training.checkpointer` and `data.latent_cache` list fewer on purpose: each key names only
the packages that its entries depend on, because any other would discard them at an update."""
_VARIABLES = ("CUBLAS_WORKSPACE_CONFIG", "NVIDIA_TF32_OVERRIDE", "MKL_CBWR")
"""Variables that make cuBLAS and MKL select kernels with other rounding."""


def describe_environment(device: torch.device, **choices: object) -> dict[str, Any]:
    """Return facts about this process and `device` as nested mappings of strings and numbers.

    Args:
        choices: settings that the stage selected at run time, such as the attention kernels.
    """
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "processes": distributed_state().num_processes,
        "cpu": _cpu(),
        "gpu": _gpu(device) if device.type == "cuda" else None,
        "variables": {name: os.environ[name] for name in _VARIABLES if name in os.environ},
        "libraries": {
            name: installed for name in NUMERICAL_LIBRARIES if (installed := installed_version(name))
        },
        **choices,
    }


def _cpu() -> dict[str, object]:
    """Return the CPU's model, its widest instructions that PyTorch uses, and the threads that share sums."""
    return {
        "model": _cpu_model(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
    }


def _cpu_model() -> str:
    """Return the model name from /proc/cpuinfo; outside Linux, Python's name of the processor."""
    table = Path("/proc/cpuinfo")
    lines = table.read_text(encoding="utf-8").splitlines() if table.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _gpu(device: torch.device) -> dict[str, object]:
    """Return the GPU's model, compute capability, and the versions of driver, CUDA and cuDNN."""
    properties = torch.cuda.get_device_properties(device)
    return {
        "model": properties.name,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "driver": _driver_version(),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
    }


def _driver_version() -> str:
    """Return the version of NVIDIA's driver; empty without one, as under ROCm."""
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return ""
    try:
        return str(pynvml.nvmlSystemGetDriverVersion())
    finally:
        pynvml.nvmlShutdown()


def installed_version(package: str) -> str | None:
    """Return the installed version of a package; None if it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None
