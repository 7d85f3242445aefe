"""Frozen linear layers whose weights are stored in 8 or 4 bits and dequantised for each use.

A weight is a level times the scale that a block of 64 weights shares. int8 has 255 evenly spaced levels; nf4
has 16 quantiles of a normal distribution (Dettmers et al. 2023, arXiv:2305.14314, section 3). Knows no model.
"""

from collections.abc import Callable
from typing import Any

import torch
from bitsandbytes.functional import QuantState, dequantize_4bit, quantize_4bit
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from sdxl_lora.config import Quantization

NF4_BLOCK_SIZE = 64
"""Weights that share a scale."""
_INT8_LEVELS = 127
"""On each side of 0."""


def quantize(module: Any, quantization: Quantization, device: torch.device) -> Any:
    """Move `module` to `device`, with the weights of its frozen linear layers quantised, and return it.

    Layers are moved one after the other, so that the device never holds all of their weights in full
    precision. Adapters, layers whose size is not a multiple of a block (SDXL has none) and everything else
    keep their precision.
    """
    if quantization != "none":
        for layer in module.modules():
            if _is_quantizable(layer):
                _quantize_layer(layer, quantization, device)
    return module.to(device)


def _is_quantizable(layer: nn.Module) -> bool:
    return (
        type(layer) is nn.Linear
        and not layer.weight.requires_grad
        and layer.weight.numel() % NF4_BLOCK_SIZE == 0
    )


def _quantize_layer(layer: Any, quantization: Quantization, device: torch.device) -> None:
    """Turn a linear layer into a `QuantizedLinear`, in place; its bias stays where it is."""
    # In place, so that the layer's name, hooks and parent stay the same, and PEFT adapts it as a linear
    # layer.
    pack = _pack_int8 if quantization == "int8" else _pack_nf4
    codes, scales = pack(layer.weight.detach().to(device))
    del layer.weight
    layer.__class__ = QuantizedLinear
    layer.register_buffer("codes", codes)
    layer.register_buffer("scales", scales)


def _pack_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return codes, int8, (O I,), and scales in the weight's precision, (O I / 64,)."""
    blocks = weight.float().reshape(-1, NF4_BLOCK_SIZE)
    scales = (blocks.abs().amax(dim=1) / _INT8_LEVELS).to(weight.dtype)
    levels = blocks / scales[:, None]  # NaN in a block of zeros; any level stands for 0 where the scale is 0
    return levels.round_().clamp_(-_INT8_LEVELS, _INT8_LEVELS).to(torch.int8).flatten(), scales


def _pack_nf4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return codes, two in a byte, uint8, (O I / 2,), and scales in the weight's precision, (O I / 64,)."""
    codes, state = quantize_4bit(weight, blocksize=NF4_BLOCK_SIZE, quant_type="nf4")
    return codes.flatten(), state.absmax.to(weight.dtype)


def unpack(codes: Tensor, scales: Tensor, in_features: int) -> Tensor:
    """Return the weights that these codes and scales stand for, in the scales' precision, (O, I).

    Never waits for the GPU and never branches on a value, so that a CUDA graph can capture it.
    """
    if codes.dtype == torch.int8:
        return (codes.view(-1, NF4_BLOCK_SIZE) * scales[:, None]).view(-1, in_features)
    # A flat shape: for a matrix, bitsandbytes' CPU kernel starts a new block with each row, and ours may
    # cross rows.
    shape = (scales.numel() * NF4_BLOCK_SIZE,)
    state = QuantState(scales.float(), shape, blocksize=NF4_BLOCK_SIZE, quant_type="nf4", dtype=scales.dtype)
    return dequantize_4bit(codes, state).view(-1, in_features)


class QuantizedLinear(nn.Linear):
    """A frozen linear layer with `codes` and `scales` instead of a weight."""

    codes: Tensor
    scales: Tensor

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The dequantised weight, a new tensor on each access: changing it does not change the layer."""
        return unpack(self.codes, self.scales, self.in_features)

    def forward(self, input: Tensor) -> Tensor:
        return _FrozenLinear.apply(input, lambda: self.weight, self.bias)  # type: ignore[no-untyped-call]


class _FrozenLinear(torch.autograd.Function):
    """y = x W^T + b. W is dequantised again for the gradient of x, so that none is kept until then."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Callable[[], Tensor], bias: Tensor | None) -> Tensor:
        ctx.weight = weight  # the function, not its result
        return linear(x, weight(), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return dy @ ctx.weight(), None, None
