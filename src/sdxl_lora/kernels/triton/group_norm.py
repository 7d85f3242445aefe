"""Triton kernels of group normalisation, and of sums with a bias; `conv_ops` defines the results.

In channels_last an image is a matrix (R, C) of R pixels and C channels; a row is a pixel. All arithmetic is
fp32. Sums go over the rows of a tile, then over the tiles, in a fixed order and without atomic additions, so
that results are bit-identical. A GPU runs the kernels, or Triton's interpreter.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

# Tile sizes decide the order of sums: another size, another rounding.
_ROWS = 64  # pixels of a tile
_CHANNELS = 64  # channels of a tile: one cache line of 128 bytes in half precision
_TILES = 256  # tiles whose sums are added at once: all of the UNet's at 1024 px, a 64th of the VAE's
_VALUES = 1024  # values of a program that adds a bias


@triton.jit
def _tile(num_rows, num_channels, ROWS: tl.constexpr, CHANNELS: tl.constexpr):
    """Return a program's image, tile and channels, masks of existing channels and values, and offsets."""
    tile, n = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    row = tile * ROWS + tl.arange(0, ROWS)
    channel = tl.program_id(2) * CHANNELS + tl.arange(0, CHANNELS)
    inside = channel < num_channels
    there = (row < num_rows)[:, None] & inside[None, :]
    place = n * num_rows * num_channels + row[:, None] * num_channels + channel[None, :]
    return n, tile, channel, inside, there, place


@triton.jit
def _channel_sums_kernel(x, sums, num_rows, num_channels, ROWS: tl.constexpr, CHANNELS: tl.constexpr):
    """Store each channel's sum and sum of squares over a tile, of values relative to the first pixel.

    If the mean is large next to the deviation, the variance is a small difference of large sums of squares.
    Values relative to a pixel keep the digits. Both sums are stored as (N, tiles, 2, C).
    """
    n, tile, channel, inside, there, place = _tile(num_rows, num_channels, ROWS, CHANNELS)
    pivot = tl.load(x + n * num_rows * num_channels + channel, inside, 0.0).to(tl.float32)
    values = tl.load(x + place, there, 0.0).to(tl.float32)
    values = tl.where(there, values - pivot[None, :], 0.0)  # or rows beyond the last add -pivot
    out = sums + (n * tl.num_programs(0) + tile) * 2 * num_channels + channel
    tl.store(out, tl.sum(values, 0), inside)
    tl.store(out + num_channels, tl.sum(values * values, 0), inside)


@triton.jit
def _both_sums(sums, n, channel, inside, num_channels, num_tiles, TILES: tl.constexpr, WIDTH: tl.constexpr):
    """Return the two sums of each channel of a group, over all tiles."""
    first, second = tl.zeros((WIDTH,), tl.float32), tl.zeros((WIDTH,), tl.float32)
    for start in range(0, num_tiles, TILES):
        tile = start + tl.arange(0, TILES)
        there = (tile < num_tiles)[:, None] & inside[None, :]
        place = sums + (n * num_tiles + tile[:, None]) * 2 * num_channels + channel[None, :]
        first += tl.sum(tl.load(place, there, 0.0), 0)
        second += tl.sum(tl.load(place + num_channels, there, 0.0), 0)
    return first, second


@triton.jit
def _moments_kernel(
    x,
    shift,
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
    """Store mean and reciprocal standard deviation of a group, from its channels' sums (Chan et al. 1983).

    Squared deviations of a group: those within each channel from its mean, plus the number of rows times
    those of the channels' means from the group's.
    """
    n, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    offset = tl.arange(0, WIDTH)
    channel, inside = group * width + offset, offset < width
    total, squares = _both_sums(sums, n, channel, inside, num_channels, num_tiles, TILES, WIDTH)
    pivot = tl.load(x + n * num_rows * num_channels + channel, inside, 0.0).to(tl.float32)
    if shift is not None:
        pivot += tl.load(shift + n * num_channels + channel, inside, 0.0).to(tl.float32)
    channel_mean = tl.where(inside, pivot + total / num_rows, 0.0)
    group_mean = tl.sum(channel_mean, 0) / width
    between = tl.where(inside, channel_mean - group_mean, 0.0)
    deviations = tl.sum(squares - total * total / num_rows + num_rows * between * between, 0)
    tl.store(mean + n * tl.num_programs(1) + group, group_mean)
    tl.store(rstd + n * tl.num_programs(1) + group, 1.0 / tl.sqrt(deviations / (num_rows * width) + eps))


@triton.jit
def _channel_average(mean, shift, n, group, channel, inside, num_channels):
    """Return what to subtract from each channel of x: its group's mean less the channel's shift.

    So x + shift, which is normalised, is never written to memory.
    """
    average = tl.load(mean + group, inside, 0.0)
    if shift is not None:
        average -= tl.load(shift + n * num_channels + channel, inside, 0.0).to(tl.float32)
    return average


@triton.jit
def _normalise_kernel(
    x,
    shift,
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
    n, _, channel, inside, there, place = _tile(num_rows, num_channels, ROWS, CHANNELS)
    group = n * (num_channels // width) + channel // width  # index into mean and rstd, (N, G)
    # (x - average) rstd weight + bias as one multiplication and one addition for each value.
    scale = tl.load(rstd + group, inside, 0.0) * tl.load(weight + channel, inside, 0.0).to(tl.float32)
    average = _channel_average(mean, shift, n, group, channel, inside, num_channels)
    offset = tl.load(bias + channel, inside, 0.0).to(tl.float32) - average * scale
    values = tl.load(x + place, there, 0.0).to(tl.float32) * scale[None, :] + offset[None, :]
    if SILU:
        values = values * tl.sigmoid(values)
    tl.store(y + place, values, there)


@triton.jit
def _normalised_gradient(
    dy, x, average, rstd, weight, bias, place, there, channel, inside, group, SILU: tl.constexpr
):
    """Return a tile's normalised values, and the gradient of the loss by them."""
    deviation = tl.load(rstd + group, inside, 0.0)
    factor = tl.load(weight + channel, inside, 0.0).to(tl.float32)
    normal = (tl.load(x + place, there, 0.0).to(tl.float32) - average[None, :]) * deviation[None, :]
    gradient = tl.load(dy + place, there, 0.0).to(tl.float32)
    if SILU:  # its input is computed again, which is cheaper than to keep it
        values = normal * factor[None, :] + tl.load(bias + channel, inside, 0.0).to(tl.float32)[None, :]
        sigmoid = tl.sigmoid(values)
        gradient = gradient * sigmoid * (1.0 + values * (1.0 - sigmoid))
    return normal, tl.where(there, gradient * factor[None, :], 0.0)


@triton.jit
def _gradient_sums_kernel(
    dy,
    x,
    shift,
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
    """Store each channel's sum over a tile of the gradient g, and of g times the normalised values."""
    n, tile, channel, inside, there, place = _tile(num_rows, num_channels, ROWS, CHANNELS)
    group = n * (num_channels // width) + channel // width
    average = _channel_average(mean, shift, n, group, channel, inside, num_channels)
    normal, gradient = _normalised_gradient(
        dy, x, average, rstd, weight, bias, place, there, channel, inside, group, SILU
    )
    out = sums + (n * tl.num_programs(0) + tile) * 2 * num_channels + channel
    tl.store(out, tl.sum(gradient, 0), inside)
    tl.store(out + num_channels, tl.sum(gradient * normal, 0), inside)


@triton.jit
def _group_sums_kernel(
    sums, totals, num_channels, num_tiles, width, TILES: tl.constexpr, WIDTH: tl.constexpr
):
    """Add up the sums of a group's tiles and channels; stored as (N, 2, G)."""
    n, group, num_groups = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    offset = tl.arange(0, WIDTH)
    channel, inside = group * width + offset, offset < width
    first, second = _both_sums(sums, n, channel, inside, num_channels, num_tiles, TILES, WIDTH)
    out = totals + n * 2 * num_groups + group
    tl.store(out, tl.sum(first, 0))
    tl.store(out + num_groups, tl.sum(second, 0))


@triton.jit
def _normalise_gradient_kernel(
    dresidual,
    dy,
    x,
    shift,
    mean,
    rstd,
    weight,
    bias,
    totals,
    dx,
    dshift,
    num_rows,
    num_channels,
    width,
    SILU: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Store the gradient of a tile of x, and its sum over the tile: a share of the shift's gradient."""
    n, tile, channel, inside, there, place = _tile(num_rows, num_channels, ROWS, CHANNELS)
    num_groups = num_channels // width
    group = n * num_groups + channel // width
    average = _channel_average(mean, shift, n, group, channel, inside, num_channels)
    normal, gradient = _normalised_gradient(
        dy, x, average, rstd, weight, bias, place, there, channel, inside, group, SILU
    )
    count = num_rows * width
    both = totals + n * 2 * num_groups + channel // width
    constant = tl.load(both, inside, 0.0) / count
    product = tl.load(both + num_groups, inside, 0.0) / count
    deviation = tl.load(rstd + group, inside, 0.0)
    # dx = (g - mean(g) - n mean(g n)) / sigma, with n the normalised values and means over the group.
    values = (gradient - constant[None, :] - normal * product[None, :]) * deviation[None, :]
    if dshift is not None:
        out = dshift + (n * tl.num_programs(0) + tile) * num_channels + channel
        tl.store(out, tl.sum(tl.where(there, values, 0.0), 0), inside)
    if dresidual is not None:  # after the sum for the shift, which the residual connection does not pass
        values += tl.load(dresidual + place, there, 0.0).to(tl.float32)
    tl.store(dx + place, values, there)


@triton.jit
def _add_bias_kernel(residual, update, bias, y, count, num_channels, VALUES: tl.constexpr):
    """Store update + bias, plus residual unless it is None. `y` may be `update`."""
    place = tl.program_id(0).to(tl.int64) * VALUES + tl.arange(0, VALUES)
    there = place < count
    values = tl.load(update + place, there).to(tl.float32)
    values += tl.load(bias + place % num_channels, there).to(tl.float32)
    if residual is not None:
        values += tl.load(residual + place, there).to(tl.float32)
    tl.store(y + place, values, there)


def launch_group_norm_forward(
    x: Tensor, shift: Tensor | None, weight: Tensor, bias: Tensor, num_groups: int, eps: float, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Run three kernels: sums of each tile, moments of each group, and the normalisation."""
    batch, num_channels, num_rows = len(x), x.shape[1], x[0, 0].numel()
    width, grid = num_channels // num_groups, _tiles(x)
    num_tiles = grid[0]
    sums = x.new_empty(batch, num_tiles, 2, num_channels, dtype=torch.float32)
    mean = x.new_empty(batch, num_groups, dtype=torch.float32)
    rstd, y = torch.empty_like(mean), torch.empty_like(x)
    _channel_sums_kernel[grid](x, sums, num_rows, num_channels, _ROWS, _CHANNELS)
    _moments_kernel[(batch, num_groups)](
        x, shift, sums, mean, rstd, num_rows, num_channels, num_tiles, width, eps, *_at_once(num_tiles, width)
    )
    sizes = (num_rows, num_channels, width, silu, _ROWS, _CHANNELS)
    _normalise_kernel[grid](x, shift, y, mean, rstd, weight, bias, *sizes)
    return y, mean, rstd


def launch_group_norm_backward(
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
    """Run three kernels: sums of each tile, sums of each group, and the gradient."""
    (batch, num_groups), num_channels, num_rows = mean.shape, x.shape[1], x[0, 0].numel()
    width, grid = num_channels // num_groups, _tiles(x)
    num_tiles = grid[0]
    known = (dy, x, shift, mean, rstd, weight, bias)
    sizes = (num_rows, num_channels, width, silu, _ROWS, _CHANNELS)
    sums = x.new_empty(batch, num_tiles, 2, num_channels, dtype=torch.float32)
    _gradient_sums_kernel[grid](*known, sums, *sizes)
    totals = x.new_empty(batch, 2, num_groups, dtype=torch.float32)
    _group_sums_kernel[(batch, num_groups)](
        sums, totals, num_channels, num_tiles, width, *_at_once(num_tiles, width)
    )
    dx = torch.empty_like(x)
    dshift = None if shift is None else x.new_empty(batch, num_tiles, num_channels, dtype=torch.float32)
    _normalise_gradient_kernel[grid](dresidual, *known, totals, dx, dshift, *sizes)
    return dx, x.new_empty(0) if dshift is None else dshift.sum(1).to(x.dtype)


def _tiles(x: Tensor) -> tuple[int, int, int]:
    """Return the grid: tiles of rows, images, tiles of channels. Only its first side may exceed 65,535."""
    return triton.cdiv(x[0, 0].numel(), _ROWS), len(x), triton.cdiv(x.shape[1], _CHANNELS)


def _at_once(num_tiles: int, width: int) -> tuple[int, int]:
    """Return how many tiles and channels a program that adds up a group's sums loads at once."""
    return min(triton.next_power_of_2(num_tiles), _TILES), triton.next_power_of_2(width)


def launch_add_bias(residual: Tensor | None, update: Tensor, bias: Tensor, y: Tensor) -> None:
    """Write update + bias, plus residual unless it is None, to `y`. All images are in channels_last."""
    grid = (triton.cdiv(y.numel(), _VALUES),)
    _add_bias_kernel[grid](residual, update, bias, y, y.numel(), len(bias), _VALUES)
