"""Operations around convolutions, in few passes over memory: group normalisation, biases, residual sums.

On a GPU these are Triton kernels, which compute in fp32 where PyTorch rounds between its kernels. Elsewhere
they are PyTorch's operators, which define the result. Frozen weights get no gradient.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from sdxl_lora.kernels.transformer_ops import uses_triton


def group_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    num_groups: int,
    eps: float,
    silu: bool,
    shift: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the group normalisation of `x` (Wu & He 2018, arXiv:1803.08494), then SiLU if `silu`.

    Args:
        x: (N, C, H, W); on a GPU it is copied to channels_last if it is not in that format.
        weight: frozen, (C,).
        bias: frozen, (C,).
        num_groups: G, a divisor of C.
        eps: added to the variance.
        silu: whether SiLU follows.
        shift: added to x before the normalisation, (N, C): the time embedding.

    Returns:
        x, for the residual connection, and the result, with the shape and memory format of x. With both as
        results of one function, one kernel adds the gradient of the residual connection to that of the
        normalisation.
    """
    if uses_triton(x):
        x = x.contiguous(memory_format=torch.channels_last)
        return _GroupNorm.apply(x, shift, weight, bias, num_groups, eps, silu)  # type: ignore[no-untyped-call]
    shifted = x if shift is None else x + shift[:, :, None, None]
    y = functional.group_norm(shifted, num_groups, weight, bias, eps)
    return x, functional.silu(y) if silu else y


class _GroupNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        shift: Tensor | None,
        weight: Tensor,
        bias: Tensor,
        num_groups: int,
        eps: float,
        silu: bool,
    ) -> tuple[Tensor, Tensor]:
        y, mean, rstd = _group_norm_forward_op(x, shift, weight, bias, num_groups, eps, silu)
        ctx.save_for_backward(x, shift, mean, rstd, weight, bias)
        ctx.silu = silu
        ctx.set_materialize_grads(False)  # x may have no other reader: no zeros to add
        return x, y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dresidual: Tensor | None, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, shift, *rest = ctx.saved_tensors
        dx, dshift = _group_norm_backward_op(dresidual, dy, x, shift, *rest, ctx.silu)
        return (dx, None if shift is None else dshift, *[None] * 5)


def residual_sum(residual: Tensor, update: Tensor, bias: Tensor | None) -> Tensor:
    """Return the sum of two images of equal shape and a frozen bias.

    Args:
        residual: (N, C, H, W); on a GPU it is copied to channels_last if it is not in that format.
        update: shaped as `residual`.
        bias: (C,), or None for none.
    """
    if bias is None:
        return residual + update
    if uses_triton(residual):
        images = (image.contiguous(memory_format=torch.channels_last) for image in (residual, update))
        return _residual_sum_op(*images, bias)
    return residual + update + bias[:, None, None]


def frozen_conv2d(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: tuple[int, ...], padding: tuple[int, ...]
) -> Tensor:
    """Return a convolution whose weights get no gradient: its input is not kept for the backward pass.

    Args:
        x: (N, C, H, W).
        weight: frozen, (O, C, K, K).
        bias: frozen, (O,).
        stride: of both sides.
        padding: of both sides.
    """
    return _FrozenConv2d.apply(x, weight, bias, stride, padding)  # type: ignore[no-untyped-call]


class _FrozenConv2d(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        stride: tuple[int, ...],
        padding: tuple[int, ...],
    ) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.shape, ctx.options = x.shape, (stride, padding)
        channels_last = x.is_contiguous(memory_format=torch.channels_last)
        ctx.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        if bias is None or not (channels_last and uses_triton(x)):
            return functional.conv2d(x, weight, bias, stride, padding)
        y = functional.conv2d(x, weight, None, stride, padding)
        y = y.contiguous(memory_format=torch.channels_last)  # not every cuDNN kernel keeps the format
        _add_bias_op(y, bias)  # PyTorch adds the bias in a kernel after cuDNN's, which takes twice the time
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (weight,), (stride, padding) = ctx.saved_tensors, ctx.options
        x = torch.empty(ctx.shape, dtype=dy.dtype, device=dy.device, memory_format=ctx.memory_format)
        dx, _, _ = torch.ops.aten.convolution_backward(
            dy, x, weight, None, stride, padding, (1, 1), False, (0, 0), 1, (True, False, False)
        )  # without a gradient of the weight it reads only the shape of x, which may be uninitialised
        return dx, None, None, None, None


# Operators as in attention_ops: Triton is imported where it runs, and fakes give the results' shapes on
# `meta`.


@torch.library.custom_op("sdxl_lora::group_norm", mutates_args=())
def _group_norm_forward_op(
    x: Tensor, shift: Tensor | None, weight: Tensor, bias: Tensor, num_groups: int, eps: float, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the result, and the mean and reciprocal standard deviation of each group, (N, G)."""
    from sdxl_lora.kernels.triton import group_norm

    return group_norm.launch_group_norm_forward(x, shift, weight, bias, num_groups, eps, silu)


@torch.library.custom_op("sdxl_lora::group_norm_gradient", mutates_args=())
def _group_norm_backward_op(
    dresidual: Tensor | None,
    dy: Tensor,
    x: Tensor,
    shift: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    bias: Tensor,
    silu: bool,
) -> tuple[Tensor, Tensor]:
    """Return the gradients of x, with `dresidual` added, and of the shift, empty if there is none."""
    from sdxl_lora.kernels.triton import group_norm

    dy = dy.contiguous(memory_format=torch.channels_last)
    if dresidual is not None:
        dresidual = dresidual.contiguous(memory_format=torch.channels_last)
    return group_norm.launch_group_norm_backward(dresidual, dy, x, shift, mean, rstd, weight, bias, silu)


@torch.library.custom_op("sdxl_lora::residual_sum", mutates_args=())
def _residual_sum_op(residual: Tensor, update: Tensor, bias: Tensor) -> Tensor:
    from sdxl_lora.kernels.triton import group_norm

    total = torch.empty_like(residual)
    group_norm.launch_add_bias(residual, update, bias, total)
    return total


@torch.library.custom_op("sdxl_lora::add_bias", mutates_args=("y",))
def _add_bias_op(y: Tensor, bias: Tensor) -> None:
    """Add a bias, (C,), to an image in channels_last, (N, C, H, W), in place."""
    from sdxl_lora.kernels.triton import group_norm

    group_norm.launch_add_bias(None, y, bias, y)


@_group_norm_forward_op.register_fake
def _(
    x: Tensor, shift: Tensor | None, weight: Tensor, bias: Tensor, num_groups: int, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    mean = x.new_empty(len(x), num_groups, dtype=torch.float32)
    return torch.empty_like(x), mean, torch.empty_like(mean)


@_group_norm_backward_op.register_fake
def _(
    dresidual: Tensor | None, dy: Tensor, x: Tensor, shift: Tensor | None, *_: Any
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty(0) if shift is None else torch.empty_like(shift)


@_residual_sum_op.register_fake
def _(residual: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(residual)


@_add_bias_op.register_fake
def _(y: Tensor, bias: Tensor) -> None:
    return None


def _residual_sum_autograd(ctx: Any, dtotal: Tensor) -> tuple[Tensor, Tensor, None]:
    return dtotal, dtotal, None


_residual_sum_op.register_autograd(_residual_sum_autograd)
