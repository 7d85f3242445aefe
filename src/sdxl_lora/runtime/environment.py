"""What a stage ran on, as far as it can change the bits of a result: hardware, drivers, libraries, choices.

It names no machine, no user and no place, so that it may be published beside the result.
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
"""Packages whose code a result goes through."""
_VARIABLES = ("CUBLAS_WORKSPACE_CONFIG", "NVIDIA_TF32_OVERRIDE", "MKL_CBWR")
"""Settings by which their makers' libraries choose among kernels that round otherwise."""


def describe_environment(device: torch.device, **choices: object) -> dict[str, Any]:
    """Facts about this process and `device`, as nested mappings of words and numbers.

    Args:
        choices: what the stage chose itself, such as the attention's kernels.
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
    """Model, the widest instructions that PyTorch uses of it, and threads: sums are split among them."""
    return {
        "model": _cpu_model(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
    }


def _cpu_model() -> str:
    """As the kernel names it; what Python knows of it elsewhere than on Linux."""
    table = Path("/proc/cpuinfo")
    lines = table.read_text(encoding="utf-8").splitlines() if table.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _gpu(device: torch.device) -> dict[str, object]:
    """Model, architecture, and the versions of what drives it."""
    properties = torch.cuda.get_device_properties(device)
    return {
        "model": properties.name,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "driver": _driver_version(),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
    }


def _driver_version() -> str:
    """Of NVIDIA's driver; empty where there is none, as under ROCm."""
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return ""
    try:
        return str(pynvml.nvmlSystemGetDriverVersion())
    finally:
        pynvml.nvmlShutdown()


def installed_version(package: str) -> str | None:
    """None if it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None
