"""Everything that a training step changes, side by side in flat tensors.

Scaling, clipping, the optimizer and the sum over processes are then a handful of kernels for all adapters
together, and not some for each of their tensors.

             a group's parameters, one after the other | the next group's        | loss | stop
    master    fp32, what the optimizer moves                                        -      -
    weights   the same rounded to the step's dtype; every parameter is a view       -      -
    gradient  fp32, accumulated                                                     x      x

The order within a group is the caller's (`adapters.lora.lora_parameters`). It decides which weights are
neighbours in memory, and so whether attention reads them as views (`adapters.merged_linear`).
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import Parameter


class FlatParameters:
    """Parameters as views of one tensor, with an fp32 master copy and an fp32 gradient in the same layout."""

    def __init__(self, groups: Sequence[Sequence[Parameter]], dtype: torch.dtype) -> None:
        """Replace the parameters' storage; their values are rounded to `dtype`."""
        self._groups = groups
        self.master = torch.cat([p.detach().flatten().float() for group in groups for p in group])
        self._weights = self.master.to(dtype)  # in fp32 the master itself: cast_master then has nothing to do
        sizes = [sum(parameter.numel() for parameter in group) for group in groups]
        self.masters = [Parameter(part) for part in self.master.split(sizes)]
        """The master of each group, a view with a gradient: what the optimizer is given."""
        self.freeze_groups_from(len(groups))
        self.view_into(self._weights)

    def freeze_groups_from(self, num_groups: int) -> None:
        """Keep the first groups trainable, with a gradient of zeros, and freeze the others."""
        self.parameters = [parameter for group in self._groups[:num_groups] for parameter in group]
        """The trainable ones."""
        sizes = [len(master) for master in self.masters[:num_groups]]
        self.reduce_buffer = self.master.new_zeros(sum(sizes) + 2)
        """Gradient, loss and stop votes, which processes sum in a single all-reduce."""
        self.gradient = self.reduce_buffer[:-2]
        self.loss = self.reduce_buffer[-2]
        self.stop_votes = self.reduce_buffer[-1]
        # None, and not zeros: an optimizer skips a parameter without a gradient, but applies momentum and
        # weight decay to one whose gradient is zero.
        gradients = [*self.gradient.split(sizes), *(None for _ in self.masters[num_groups:])]
        for master, gradient in zip(self.masters, gradients, strict=True):
            master.grad = gradient

    def cast_master(self) -> None:
        """Round the master into the weights that the model computes with."""
        if self._weights is not self.master:
            self._weights.copy_(self.master)  # in place: a captured graph reads these addresses

    def view_into(self, flat: Tensor) -> None:
        """Make every parameter a view of `flat`."""
        parameters = [parameter for group in self._groups for parameter in group]
        sizes = [parameter.numel() for parameter in parameters]
        for parameter, part in zip(parameters, flat.split(sizes), strict=True):
            parameter.data = part.view_as(parameter)
