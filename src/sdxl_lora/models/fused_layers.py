"""What UNet and text encoders share: adapted linear layers, and residual sums with the norm after them."""

from collections.abc import Sequence
from typing import Any

from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn

from sdxl_lora.adapters.merged_linear import is_mergeable, pack_adjacent, project_merged
from sdxl_lora.kernels.transformer_ops import add_norm, layer_norm
from sdxl_lora.models.class_swap import Classes


def pack_projections(layers: Sequence[Any]) -> None:
    """Make the frozen weights of layers that read the same input adjacent in memory, in this order.

    `project` then reads them as one weight without a copy, if it is given them in the same order.
    """
    if all(is_mergeable(layer) for layer in layers):
        bases = [layer.base_layer for layer in layers]
        for tensors in zip(*([*base.parameters(), *base.buffers()] for base in bases), strict=True):
            pack_adjacent(tensors)


def input_and_norm(hidden_states: Tensor, norm: nn.LayerNorm) -> tuple[Tensor, Tensor]:
    """Return the input, to be read once more, and its layer norm: both of the input's shape."""
    return layer_norm(hidden_states, norm.weight, norm.bias, norm.eps)


def residual_and_norm(residual: Tensor, update: Tensor, norm: nn.LayerNorm) -> tuple[Tensor, Tensor]:
    """Return the residual plus its update, and the layer norm of that: all of the residual's shape."""
    return add_norm(residual, update, norm.weight, norm.bias, norm.eps)


class _FusedLoraLinear(LoraLinear):  # type: ignore[misc]
    """An adapted layer that is no part of an attention's merged ones."""

    def forward(self, inputs: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if is_mergeable(self):
            return project_merged([self], inputs)[0]
        return super().forward(inputs, *args, **kwargs)


FUSED_LAYERS: Classes = {LoraLinear: _FusedLoraLinear}
