"""What tests of elementwise kernels have in common: draws in float64, and how near to a result is near."""

import torch
from torch import Tensor

from sdxl_lora.runtime.rng import keyed_generator

DTYPES = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}
"""Relative error that a kernel may have, by precision."""


def draws(*shape: int, key: str = "x") -> Tensor:
    return torch.randn(shape, generator=keyed_generator(key), dtype=torch.float64)


def relative_error(ours: Tensor, oracle: Tensor) -> float:
    return float((ours.double().cpu() - oracle).norm() / oracle.norm())
