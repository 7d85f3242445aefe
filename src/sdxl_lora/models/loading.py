"""Precision and freezing, shared by all parts of the base model when they are loaded."""

from typing import Any

import torch

from sdxl_lora.config import Precision

DTYPES: dict[Precision, torch.dtype] = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


def freeze(module: Any, device: torch.device) -> Any:
    """Move `module` to `device`, in evaluation mode, without gradients, and return it."""
    return module.to(device).eval().requires_grad_(False)
