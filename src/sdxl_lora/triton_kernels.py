"""The Triton kernels of kernels.py, which says what they compute. Only a GPU can run them.

Tensors are contiguous; images lie as (N, R, C), R rows of pixels and C channels. All arithmetic is fp32. Sums
go over tiles of rows and then over the tiles, in a fixed order, so that results repeat to the bit.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS = 64  # of a tile
CHANNELS = 64  # of a tile: one line of the cache in half precision
TILES = 256  # whose sums are added at once: all of the UNet's at 1024 px, a 64th of the VAE's
COLUMNS = 1024  # of a program of GEGLU


@triton.jit
def gelu(x):
    return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))


@triton.jit
def geglu_kernel(x, y, width, COLUMNS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < width
    hidden = tl.load(x + row * 2 * width + column, inside).to(tl.float32)
    gate = tl.load(x + row * 2 * width + width + column, inside).to(tl.float32)
    tl.store(y + row * width + column, hidden * gelu(gate), inside)


@triton.jit
def geglu_gradient_kernel(dy, x, dx, width, COLUMNS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < width
    gradient = tl.load(dy + row * width + column, inside).to(tl.float32)
    hidden = tl.load(x + row * 2 * width + column, inside).to(tl.float32)
    gate = tl.load(x + row * 2 * width + width + column, inside).to(tl.float32)
    cumulative = 0.5 * (1.0 + tl.erf(gate * 0.7071067811865476))
    density = 0.3989422804014327 * tl.exp(-0.5 * gate * gate)
    tl.store(dx + row * 2 * width + column, gradient * gate * cumulative, inside)
    tl.store(dx + row * 2 * width + width + column, gradient * hidden * (cumulative + gate * density), inside)


def geglu(x: Tensor) -> Tensor:
    width = x.shape[-1] // 2
    y = x.new_empty(*x.shape[:-1], width)
    geglu_kernel[(y.numel() // width, triton.cdiv(width, COLUMNS))](x, y, width, COLUMNS)
    return y


def geglu_gradient(dy: Tensor, x: Tensor) -> Tensor:
    width = dy.shape[-1]
    dx = torch.empty_like(x)
    geglu_gradient_kernel[(dy.numel() // width, triton.cdiv(width, COLUMNS))](dy, x, dx, width, COLUMNS)
    return dx


@triton.jit
def channel_sums_kernel(x, sums, num_rows, num_channels, ROWS: tl.constexpr, CHANNELS: tl.constexpr):
    """A tile's sums and sums of squares, less the image's first pixel: a large mean costs no digits."""
    n, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row = tile * ROWS + tl.arange(0, ROWS)
    channel = tl.program_id(2) * CHANNELS + tl.arange(0, CHANNELS)
    inside = channel < num_channels
    there = (row < num_rows)[:, None] & inside[None, :]
    image = x + n * num_rows * num_channels
    pivot = tl.load(image + channel, inside, 0.0).to(tl.float32)
    values = tl.load(image + row[:, None] * num_channels + channel[None, :], there, 0.0).to(tl.float32)
    values = tl.where(there, values - pivot[None, :], 0.0)
    out = sums + (n * tl.num_programs(1) + tile) * 2 * num_channels + channel
    tl.store(out, tl.sum(values, 0), inside)
    tl.store(out + num_channels, tl.sum(values * values, 0), inside)


@triton.jit
def moments_kernel(
    x,
    sums,
    mean,
    rstd,
    num_rows,
    num_channels,
    num_tiles,
    width,
    eps,
    TILES: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Mean and reciprocal standard deviation of a group, from its channels' sums (Chan et al. 1983)."""
    n, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    offset = tl.arange(0, WIDTH)
    channel, inside = group * width + offset, offset < width
    total, squares = tl.zeros((WIDTH,), tl.float32), tl.zeros((WIDTH,), tl.float32)
    for start in range(0, num_tiles, TILES):
        tile = start + tl.arange(0, TILES)
        there = (tile < num_tiles)[:, None] & inside[None, :]
        place = sums + (n * num_tiles + tile[:, None]) * 2 * num_channels + channel[None, :]
        total += tl.sum(tl.load(place, there, 0.0), 0)
        squares += tl.sum(tl.load(place + num_channels, there, 0.0), 0)
    pivot = tl.load(x + n * num_rows * num_channels + channel, inside, 0.0).to(tl.float32)
    channel_mean = tl.where(inside, pivot + total / num_rows, 0.0)
    group_mean = tl.sum(channel_mean, 0) / width
    between = tl.where(inside, channel_mean - group_mean, 0.0)
    deviations = tl.sum(squares - total * total / num_rows + num_rows * between * between, 0)
    tl.store(mean + n * tl.num_programs(1) + group, group_mean)
    tl.store(rstd + n * tl.num_programs(1) + group, 1.0 / tl.sqrt(deviations / (num_rows * width) + eps))


@triton.jit
def normalise_kernel(
    x,
    y,
    mean,
    rstd,
    weight,
    bias,
    num_rows,
    num_channels,
    width,
    SILU: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    channel = tl.program_id(2) * CHANNELS + tl.arange(0, CHANNELS)
    inside = channel < num_channels
    group = n * (num_channels // width) + channel // width
    scale = tl.load(rstd + group, inside, 0.0) * tl.load(weight + channel, inside, 0.0).to(tl.float32)
    shift = tl.load(bias + channel, inside, 0.0).to(tl.float32) - tl.load(mean + group, inside, 0.0) * scale
    there = (row < num_rows)[:, None] & inside[None, :]
    place = n * num_rows * num_channels + row[:, None] * num_channels + channel[None, :]
    values = tl.load(x + place, there, 0.0).to(tl.float32) * scale[None, :] + shift[None, :]
    if SILU:
        values = values * tl.sigmoid(values)
    tl.store(y + place, values, there)


@triton.jit
def normalised_gradient(dy, x, mean, rstd, weight, bias, place, there, channel, inside, group, SILU):
    """The normalised values, and the loss's gradient by them, of a tile."""
    average, deviation = tl.load(mean + group, inside, 0.0), tl.load(rstd + group, inside, 0.0)
    factor = tl.load(weight + channel, inside, 0.0).to(tl.float32)
    normal = (tl.load(x + place, there, 0.0).to(tl.float32) - average[None, :]) * deviation[None, :]
    gradient = tl.load(dy + place, there, 0.0).to(tl.float32)
    if SILU:
        values = normal * factor[None, :] + tl.load(bias + channel, inside, 0.0).to(tl.float32)[None, :]
        sigmoid = tl.sigmoid(values)
        gradient = gradient * sigmoid * (1.0 + values * (1.0 - sigmoid))
    return normal, tl.where(there, gradient * factor[None, :], 0.0)


@triton.jit
def gradient_sums_kernel(
    dy,
    x,
    mean,
    rstd,
    weight,
    bias,
    sums,
    num_rows,
    num_channels,
    width,
    SILU: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    n, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row = tile * ROWS + tl.arange(0, ROWS)
    channel = tl.program_id(2) * CHANNELS + tl.arange(0, CHANNELS)
    inside = channel < num_channels
    group = n * (num_channels // width) + channel // width
    there = (row < num_rows)[:, None] & inside[None, :]
    place = n * num_rows * num_channels + row[:, None] * num_channels + channel[None, :]
    normal, gradient = normalised_gradient(
        dy, x, mean, rstd, weight, bias, place, there, channel, inside, group, SILU
    )
    out = sums + (n * tl.num_programs(1) + tile) * 2 * num_channels + channel
    tl.store(out, tl.sum(gradient, 0), inside)
    tl.store(out + num_channels, tl.sum(gradient * normal, 0), inside)


@triton.jit
def normalise_gradient_kernel(
    dy,
    x,
    mean,
    rstd,
    weight,
    bias,
    sums,
    dx,
    num_rows,
    num_channels,
    width,
    SILU: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    channel = tl.program_id(2) * CHANNELS + tl.arange(0, CHANNELS)
    inside = channel < num_channels
    num_groups = num_channels // width
    group = n * num_groups + channel // width
    there = (row < num_rows)[:, None] & inside[None, :]
    place = n * num_rows * num_channels + row[:, None] * num_channels + channel[None, :]
    normal, gradient = normalised_gradient(
        dy, x, mean, rstd, weight, bias, place, there, channel, inside, group, SILU
    )
    count = num_rows * width
    both = sums + n * 2 * num_groups + channel // width
    average = tl.load(both, inside, 0.0) / count
    product = tl.load(both + num_groups, inside, 0.0) / count
    deviation = tl.load(rstd + group, inside, 0.0)
    values = (gradient - average[None, :] - normal * product[None, :]) * deviation[None, :]
    tl.store(dx + place, values, there)


def group_norm(
    x: Tensor, weight: Tensor, bias: Tensor, num_groups: int, eps: float, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    batch, num_channels, num_rows = len(x), x.shape[1], x[0, 0].numel()
    width = num_channels // num_groups
    grid = (batch, triton.cdiv(num_rows, ROWS), triton.cdiv(num_channels, CHANNELS))
    sums = x.new_empty(*grid[:2], 2, num_channels, dtype=torch.float32)
    mean = x.new_empty(batch, num_groups, dtype=torch.float32)
    rstd, y = torch.empty_like(mean), torch.empty_like(x)
    channel_sums_kernel[grid](x, sums, num_rows, num_channels, ROWS, CHANNELS)
    sizes = (min(triton.next_power_of_2(grid[1]), TILES), triton.next_power_of_2(width))
    moments_kernel[(batch, num_groups)](
        x, sums, mean, rstd, num_rows, num_channels, grid[1], width, eps, *sizes
    )
    normalise_kernel[grid](
        x, y, mean, rstd, weight, bias, num_rows, num_channels, width, silu, ROWS, CHANNELS
    )
    return y, mean, rstd


def group_norm_gradient(
    dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor, silu: bool
) -> Tensor:
    (batch, num_groups), num_channels, num_rows = mean.shape, x.shape[1], x[0, 0].numel()
    width = num_channels // num_groups
    grid = (batch, triton.cdiv(num_rows, ROWS), triton.cdiv(num_channels, CHANNELS))
    sums = x.new_empty(*grid[:2], 2, num_groups, width, dtype=torch.float32)
    sizes = (num_rows, num_channels, width, silu, ROWS, CHANNELS)
    gradient_sums_kernel[grid](dy, x, mean, rstd, weight, bias, sums, *sizes)
    dx = torch.empty_like(x)
    normalise_gradient_kernel[grid](dy, x, mean, rstd, weight, bias, sums.sum((1, 4)), dx, *sizes)
    return dx


@triton.jit
def add_norm_kernel(residual, update, total, y, mean, rstd, weight, bias, width, eps, WIDTH: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, WIDTH)
    inside = column < width
    place = row * width + column
    values = tl.load(residual + place, inside, 0.0).to(tl.float32) + tl.load(update + place, inside, 0.0)
    values = values.to(total.dtype.element_ty)
    tl.store(total + place, values, inside)
    values = values.to(tl.float32)
    average = tl.sum(values, 0) / width
    values = tl.where(inside, values - average, 0.0)
    deviation = 1.0 / tl.sqrt(tl.sum(values * values, 0) / width + eps)
    tl.store(mean + row, average)
    tl.store(rstd + row, deviation)
    factor = tl.load(weight + column, inside, 0.0).to(tl.float32)
    shift = tl.load(bias + column, inside, 0.0).to(tl.float32)
    tl.store(y + place, values * deviation * factor + shift, inside)


@triton.jit
def add_norm_gradient_kernel(dtotal, dy, total, mean, rstd, weight, dx, width, WIDTH: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, WIDTH)
    inside = column < width
    place = row * width + column
    deviation = tl.load(rstd + row)
    values = tl.load(total + place, inside, 0.0).to(tl.float32)
    normal = tl.where(inside, (values - tl.load(mean + row)) * deviation, 0.0)
    gradient = tl.load(dy + place, inside, 0.0).to(tl.float32)
    gradient *= tl.load(weight + column, inside, 0.0).to(tl.float32)
    average, product = tl.sum(gradient, 0) / width, tl.sum(gradient * normal, 0) / width
    through = (gradient - average - normal * product) * deviation
    tl.store(dx + place, tl.load(dtotal + place, inside, 0.0).to(tl.float32) + through, inside)


def add_norm(
    residual: Tensor, update: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    width = residual.shape[-1]
    total, y = torch.empty_like(residual), torch.empty_like(residual)
    mean = residual.new_empty(residual.shape[:-1], dtype=torch.float32)
    rstd = torch.empty_like(mean)
    size = triton.next_power_of_2(width)
    add_norm_kernel[(mean.numel(),)](residual, update, total, y, mean, rstd, weight, bias, width, eps, size)
    return total, y, mean, rstd


def add_norm_gradient(
    dtotal: Tensor, dy: Tensor, total: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor
) -> Tensor:
    width, dx = total.shape[-1], torch.empty_like(total)
    size = triton.next_power_of_2(width)
    add_norm_gradient_kernel[(mean.numel(),)](dtotal, dy, total, mean, rstd, weight, dx, width, size)
    return dx
