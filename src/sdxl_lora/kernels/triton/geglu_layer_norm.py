"""Triton kernels of GEGLU, and of residual sums with layer normalisation; `transformer_ops` defines results.

Tensors are contiguous. All arithmetic is fp32. A program has a whole row or a part of one and no other
program adds to its results, so that they are bit-identical. A GPU runs the kernels, or Triton's interpreter.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_COLUMNS = 1024  # columns of a row for each program of GEGLU


@triton.jit
def gelu(x):
    """Return GELU by the error function, as PyTorch's default, not by its tanh approximation."""
    return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))


@triton.jit
def _geglu_kernel(x, y, width, COLUMNS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)  # 64 bits: row times width can exceed 2^31
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < width
    hidden = tl.load(x + row * 2 * width + column, inside).to(tl.float32)
    gate = tl.load(x + row * 2 * width + width + column, inside).to(tl.float32)
    tl.store(y + row * width + column, hidden * gelu(gate), inside)


@triton.jit
def _geglu_gradient_kernel(dy, x, dx, width, COLUMNS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < width
    gradient = tl.load(dy + row * width + column, inside).to(tl.float32)
    hidden = tl.load(x + row * 2 * width + column, inside).to(tl.float32)
    gate = tl.load(x + row * 2 * width + width + column, inside).to(tl.float32)
    # GELU(g) = g Phi(g), so its derivative is Phi(g) + g phi(g), with Phi and phi of the normal distribution.
    cumulative = 0.5 * (1.0 + tl.erf(gate * 0.7071067811865476))
    density = 0.3989422804014327 * tl.exp(-0.5 * gate * gate)
    tl.store(dx + row * 2 * width + column, gradient * gate * cumulative, inside)
    tl.store(dx + row * 2 * width + width + column, gradient * hidden * (cumulative + gate * density), inside)


def launch_geglu_forward(x: Tensor) -> Tensor:
    """Run the forward kernel: one program for each row and 1,024 columns."""
    width = x.shape[-1] // 2
    y = x.new_empty(*x.shape[:-1], width)
    _geglu_kernel[(y.numel() // width, triton.cdiv(width, _COLUMNS))](x, y, width, _COLUMNS)
    return y


def launch_geglu_backward(dy: Tensor, x: Tensor) -> Tensor:
    """Run the gradient kernel, divided as the forward kernel."""
    width = dy.shape[-1]
    dx = torch.empty_like(x)
    _geglu_gradient_kernel[(dy.numel() // width, triton.cdiv(width, _COLUMNS))](dy, x, dx, width, _COLUMNS)
    return dx


@triton.jit
def _add_norm_kernel(residual, update, total, y, mean, rstd, weight, bias, width, eps, WIDTH: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, WIDTH)
    inside = column < width
    place = row * width + column
    values = tl.load(residual + place, inside, 0.0).to(tl.float32) + tl.load(update + place, inside, 0.0)
    # Rounded before the statistics are computed: the backward pass reads the rounded sum.
    values = values.to(total.dtype.element_ty)
    tl.store(total + place, values, inside)
    values = values.to(tl.float32)
    average = tl.sum(values, 0) / width
    values = tl.where(inside, values - average, 0.0)  # columns beyond the row add nothing to the variance
    deviation = 1.0 / tl.sqrt(tl.sum(values * values, 0) / width + eps)
    tl.store(mean + row, average)
    tl.store(rstd + row, deviation)
    factor = tl.load(weight + column, inside, 0.0).to(tl.float32)
    shift = tl.load(bias + column, inside, 0.0).to(tl.float32)
    tl.store(y + place, values * deviation * factor + shift, inside)


@triton.jit
def _add_norm_gradient_kernel(dtotal, dy, total, mean, rstd, weight, dx, width, WIDTH: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, WIDTH)
    inside = column < width
    place = row * width + column
    deviation = tl.load(rstd + row)
    values = tl.load(total + place, inside, 0.0).to(tl.float32)
    normal = tl.where(inside, (values - tl.load(mean + row)) * deviation, 0.0)
    gradient = tl.load(dy + place, inside, 0.0).to(tl.float32)
    gradient *= tl.load(weight + column, inside, 0.0).to(tl.float32)
    # dx = (g - mean(g) - n mean(g n)) / sigma, with g = dy weight and n the normalised values (Ba et al.
    # 2016).
    average, product = tl.sum(gradient, 0) / width, tl.sum(gradient * normal, 0) / width
    through = (gradient - average - normal * product) * deviation
    tl.store(dx + place, tl.load(dtotal + place, inside, 0.0).to(tl.float32) + through, inside)


def launch_add_norm_forward(
    residual: Tensor, update: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Run the forward kernel: one program for each row, which holds all of it in registers."""
    width = residual.shape[-1]
    total, y = torch.empty_like(residual), torch.empty_like(residual)
    mean = residual.new_empty(residual.shape[:-1], dtype=torch.float32)
    rstd = torch.empty_like(mean)
    size = triton.next_power_of_2(width)
    _add_norm_kernel[(mean.numel(),)](residual, update, total, y, mean, rstd, weight, bias, width, eps, size)
    return total, y, mean, rstd


def launch_add_norm_backward(
    dtotal: Tensor, dy: Tensor, total: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor
) -> Tensor:
    """Run the gradient kernel, divided as the forward kernel."""
    width, dx = total.shape[-1], torch.empty_like(total)
    size = triton.next_power_of_2(width)
    _add_norm_gradient_kernel[(mean.numel(),)](dtotal, dy, total, mean, rstd, weight, dx, width, size)
    return dx
