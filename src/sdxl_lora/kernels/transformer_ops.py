"""Operations on tokens in one pass over memory: GEGLU, and residual sums with layer normalisation.

On a GPU these are Triton kernels, which compute in fp32 where PyTorch rounds between its kernels. Elsewhere
they are PyTorch's operators, which define the result. Frozen weights get no gradient.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional


def uses_triton(x: Tensor) -> bool:
    """Return whether Triton kernels compute on `x`: on a GPU, or on `meta`, a GPU's place in forecasts."""
    return x.device.type in ("cuda", "meta")


def geglu(x: Tensor) -> Tensor:
    """Return the first half times GELU of the second: GEGLU (Shazeer 2020, arXiv:2002.05202).

    Args:
        x: (..., 2 D).

    Returns:
        (..., D).
    """
    if uses_triton(x):
        return _geglu_forward_op(x.contiguous())
    hidden, gate = x.chunk(2, dim=-1)
    return hidden * functional.gelu(gate)


def add_norm(
    residual: Tensor, update: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Return a residual sum and its layer normalisation (Ba et al. 2016, arXiv:1607.06450).

    Args:
        residual: (..., C).
        update: shaped as `residual`.
        weight: frozen, (C,).
        bias: frozen, (C,).

    Returns:
        residual + update, and the normalised sum.
    """
    if uses_triton(residual):
        return _add_norm_forward_op(residual.contiguous(), update.contiguous(), weight, bias, eps)[:2]
    total = residual + update
    return total, functional.layer_norm(total, weight.shape, weight, bias, eps)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return the layer normalisation of `x` without a residual sum.

    Args:
        x: (..., C).
        weight: frozen, (C,).
        bias: frozen, (C,).

    Returns:
        x, for the residual connection, and x normalised. With both as results of one function, one kernel
        adds the gradient of the residual connection to that of the normalisation.
    """
    if uses_triton(x):
        return _LayerNorm.apply(x.contiguous(), weight, bias, eps)  # type: ignore[no-untyped-call]
    return x, functional.layer_norm(x, weight.shape, weight, bias, eps)


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        y, mean, rstd = torch.native_layer_norm(x, weight.shape, weight, bias, eps)
        ctx.save_for_backward(x, mean, rstd, weight)
        return x, y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dresidual: Tensor, dy: Tensor) -> tuple[Tensor | None, ...]:
        # The gradient of a normalisation is that of a sum with its normalisation: dresidual takes dtotal's
        # place.
        return _add_norm_backward_op(dresidual, dy, *ctx.saved_tensors), None, None, None


# Operators as in attention_ops: Triton is imported where it runs, and fakes give the results' shapes on
# `meta`.


@torch.library.custom_op("sdxl_lora::geglu", mutates_args=())
def _geglu_forward_op(x: Tensor) -> Tensor:
    from sdxl_lora.kernels.triton import geglu_layer_norm

    return geglu_layer_norm.launch_geglu_forward(x)


@torch.library.custom_op("sdxl_lora::geglu_gradient", mutates_args=())
def _geglu_backward_op(dy: Tensor, x: Tensor) -> Tensor:
    from sdxl_lora.kernels.triton import geglu_layer_norm

    return geglu_layer_norm.launch_geglu_backward(dy.contiguous(), x)


@torch.library.custom_op("sdxl_lora::add_norm", mutates_args=())
def _add_norm_forward_op(
    residual: Tensor, update: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the sum, the result, and the mean and reciprocal standard deviation of each row."""
    from sdxl_lora.kernels.triton import geglu_layer_norm

    return geglu_layer_norm.launch_add_norm_forward(residual, update, weight, bias, eps)


@torch.library.custom_op("sdxl_lora::add_norm_gradient", mutates_args=())
def _add_norm_backward_op(
    dtotal: Tensor, dy: Tensor, total: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor
) -> Tensor:
    from sdxl_lora.kernels.triton import geglu_layer_norm

    return geglu_layer_norm.launch_add_norm_backward(
        dtotal.contiguous(), dy.contiguous(), total, mean, rstd, weight
    )


@_geglu_forward_op.register_fake
def _(x: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], x.shape[-1] // 2)


@_geglu_backward_op.register_fake
def _(_: Tensor, x: Tensor) -> Tensor:
    return torch.empty_like(x)


@_add_norm_forward_op.register_fake
def _(residual: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    mean = residual.new_empty(residual.shape[:-1], dtype=torch.float32)
    return torch.empty_like(residual), torch.empty_like(residual), mean, torch.empty_like(mean)


@_add_norm_backward_op.register_fake
def _(dtotal: Tensor, dy: Tensor, total: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(total)


def _geglu_setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
    ctx.save_for_backward(inputs[0])


def _geglu_autograd(ctx: Any, dy: Tensor) -> Tensor:
    return _geglu_backward_op(dy, *ctx.saved_tensors)


_geglu_forward_op.register_autograd(_geglu_autograd, setup_context=_geglu_setup_context)


def _add_norm_setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    total, _, mean, rstd = output
    ctx.set_materialize_grads(False)  # nothing differentiates mean and rstd: no zeros for their gradients
    ctx.save_for_backward(total, mean, rstd, inputs[2])


def _add_norm_autograd(ctx: Any, dtotal: Tensor, dy: Tensor, *_: None) -> tuple[Tensor | None, ...]:
    dx = _add_norm_backward_op(dtotal, dy, *ctx.saved_tensors)
    return dx, dx, None, None, None  # a sum has the same gradient for both of its terms


_add_norm_forward_op.register_autograd(_add_norm_autograd, setup_context=_add_norm_setup_context)
