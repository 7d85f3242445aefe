"""How every part of the base model is loaded: its precision, its device, frozen."""

from typing import Any

import torch

from sdxl_lora.config import Precision

DTYPES: dict[Precision, torch.dtype] = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


def freeze(module: Any, device: torch.device) -> Any:
    """`module` on `device`, in evaluation mode, without gradients."""
    return module.to(device).eval().requires_grad_(False)
