"""All that a training step changes, side by side: what would be a kernel for each adapter is one for all."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import Parameter


class FlatParameters:
    """Parameters side by side in one tensor, with an fp32 master copy and an fp32 gradient alike."""

    def __init__(self, groups: Sequence[Sequence[Parameter]], dtype: torch.dtype) -> None:
        self._groups = groups
        self.master = torch.cat([p.detach().flatten().float() for group in groups for p in group])
        self._weights = self.master.to(dtype)  # the master itself, if that is fp32
        sizes = [sum(parameter.numel() for parameter in group) for group in groups]
        self.masters = [Parameter(part) for part in self.master.split(sizes)]
        """What the optimizer moves: the master of each group, with its gradient."""
        self.freeze_groups_from(len(groups))
        self.view_into(self._weights)

    def freeze_groups_from(self, num_groups: int) -> None:
        """Gives the first groups a gradient, all zeros, and takes it from the others.

        Without one, an optimizer passes a master over: neither momentum nor weight decay moves it.
        """
        self.parameters = [parameter for group in self._groups[:num_groups] for parameter in group]
        """Those that have a gradient."""
        sizes = [len(master) for master in self.masters[:num_groups]]
        self.reduce_buffer = self.master.new_zeros(sum(sizes) + 2)
        """The gradient, the loss and votes to stop: what processes add up, in one go."""
        self.gradient, self.loss, self.stop_votes = (
            self.reduce_buffer[:-2],
            self.reduce_buffer[-2],
            self.reduce_buffer[-1],
        )
        gradients = [*self.gradient.split(sizes), *(None for _ in self.masters[num_groups:])]
        for master, gradient in zip(self.masters, gradients, strict=True):
            master.grad = gradient

    def cast_master(self) -> None:
        """Rounds the master into the weights that the model computes with."""
        if self._weights is not self.master:
            self._weights.copy_(self.master)

    def view_into(self, flat: Tensor) -> None:
        """Makes every parameter a view of `flat`."""
        parameters = [parameter for group in self._groups for parameter in group]
        sizes = [parameter.numel() for parameter in parameters]
        for parameter, part in zip(parameters, flat.split(sizes), strict=True):
            parameter.data = part.view_as(parameter)
