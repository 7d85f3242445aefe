"""The optimizers that `training.optimizer` names: how each is built, and the GPU memory that it takes.

To add one: an entry here, its name in `TrainingConfig.optimizer`, and a reference implementation in
tests/support/optimizers.py.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import bitsandbytes
import torch

from sdxl_lora.config import TrainingConfig

_BLOCK = 256
"""Values of an 8-bit state that share an fp32 scale, as bitsandbytes chooses. (Dettmers et al. 2022,
arXiv:2110.02861, section 2.1, has 2,048.)"""


@dataclass(frozen=True)
class _OptimizerSpec:
    """What the library has to know of an optimizer."""

    build: Callable[[Sequence[dict[str, Any]], TrainingConfig], torch.optim.Optimizer]
    """From PyTorch's parameter groups. TrainStep sets each group's `lr` before every update."""
    state_bytes: Callable[[int], int]
    """Bytes of its state for a number of parameters, from the first update on."""
    update_bytes: Callable[[int], int]
    """Bytes that an update allocates and frees, for a number of parameters."""


def _adamw(groups: Sequence[dict[str, Any]], config: TrainingConfig) -> torch.optim.Optimizer:
    return torch.optim.AdamW(list(groups), betas=config.betas, weight_decay=config.weight_decay)


def _adamw_8bit(groups: Sequence[dict[str, Any]], config: TrainingConfig) -> torch.optim.Optimizer:
    optimizer: torch.optim.Optimizer = bitsandbytes.optim.AdamW8bit(
        groups, betas=config.betas, weight_decay=config.weight_decay
    )
    return optimizer


OPTIMIZERS: Mapping[str, _OptimizerSpec] = {
    "adamw": _OptimizerSpec(
        build=_adamw,
        state_bytes=lambda num_parameters: num_parameters * 2 * 4,  # two moments in fp32
        update_bytes=lambda num_parameters: num_parameters * 4,  # the square roots of all second moments
    ),
    "adamw_8bit": _OptimizerSpec(
        build=_adamw_8bit,
        state_bytes=lambda num_parameters: 2 * (num_parameters + 4 * -(-num_parameters // _BLOCK)),
        update_bytes=lambda _: 0,  # one kernel, in place
    ),
}
