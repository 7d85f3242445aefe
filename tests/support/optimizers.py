"""The implementation that each optimizer of the library is compared with, called as others call it."""

from collections.abc import Callable
from typing import Any

import bitsandbytes
import torch

from sdxl_lora.config import TrainingConfig


def _adamw(groups: list[dict[str, Any]], config: TrainingConfig) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, betas=config.betas, weight_decay=config.weight_decay)


def _adamw_8bit(groups: list[dict[str, Any]], config: TrainingConfig) -> torch.optim.Optimizer:
    optimizer: torch.optim.Optimizer = bitsandbytes.optim.AdamW8bit(
        groups, betas=config.betas, weight_decay=config.weight_decay
    )
    return optimizer


REFERENCES: dict[str, Callable[[list[dict[str, Any]], TrainingConfig], torch.optim.Optimizer]] = {
    "adamw": _adamw,
    "adamw_8bit": _adamw_8bit,
}
EXACT = {"adamw"}
"""Those with fp32 state. In 8 bits, 256 values share a scale, and a block spans neighbouring layers."""
TABLES = ("qmap1", "qmap2", "step")
"""State that takes the same few bytes for any number of parameters."""
