"""The factor of the loss that keeps gradients from underflowing in fp16.

`torch.amp.GradScaler` checks the gradients itself and skips the optimizer's step. Here TrainStep has read the
gradient norm anyway, so the decision is plain Python, and a captured graph reads the scale from one tensor.
"""

from collections.abc import Mapping

import torch
from torch import Tensor


class GradScaler:
    """Dynamic loss scaling (Micikevicius et al. 2018, arXiv:1710.03740), with PyTorch's constants."""

    INITIAL = 65536.0
    GROWTH_INTERVAL = 2000  # steps without an overflow after which the scale doubles

    def __init__(self, device: torch.device, enabled: bool) -> None:
        self._enabled = enabled
        self.value = self.INITIAL if enabled else 1.0
        self.tensor = torch.tensor(self.value, device=device)
        """The value at the address from which a captured graph reads it."""
        self._good_steps = 0

    def update(self, finite: bool) -> None:
        """Halve the scale after an overflow, double it after `GROWTH_INTERVAL` steps without one."""
        if not self._enabled:
            return
        self._good_steps = self._good_steps + 1 if finite else 0
        if not finite:
            self.value /= 2
        elif self._good_steps % self.GROWTH_INTERVAL == 0:
            self.value *= 2
        self.tensor.fill_(self.value)  # in place, for the graph

    def state_dict(self) -> dict[str, Tensor]:
        return {
            "loss_scale": torch.tensor(self.value, dtype=torch.float64),
            "good_steps": torch.tensor(self._good_steps),
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.value, self._good_steps = float(state["loss_scale"]), int(state["good_steps"])
        self.tensor.fill_(self.value)
