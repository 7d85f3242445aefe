"""The Triton kernels of image_kernels.py, which says what they compute.

A GPU runs them, or Triton's interpreter. Images lie as (N, R, C), R rows of pixels and C channels. All
arithmetic is fp32. Sums go over tiles of rows and then over the tiles, in a fixed order, so that results
repeat to the bit.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_ROWS = 64  # of a tile
_CHANNELS = 64  # of a tile: one line of the cache in half precision
_TILES = 256  # whose sums are added at once: all of the UNet's at 1024 px, a 64th of the VAE's
_VALUES = 1024  # of a program that adds a bias


@triton.jit
def _own_tile(num_rows, num_channels, ROWS: tl.constexpr, CHANNELS: tl.constexpr):
    """A program's image, tile and channels; which channels and values there are, and where values lie."""
    tile, n = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    row = tile * ROWS + tl.arange(0, ROWS)
    channel = tl.program_id(2) * CHANNELS + tl.arange(0, CHANNELS)
    inside = channel < num_channels
    there = (row < num_rows)[:, None] & inside[None, :]
    place = n * num_rows * num_channels + row[:, None] * num_channels + channel[None, :]
    return n, tile, channel, inside, there, place


@triton.jit
def _channel_sums_kernel(x, sums, num_rows, num_channels, ROWS: tl.constexpr, CHANNELS: tl.constexpr):
    """A tile's sums and sums of squares, less the image's first pixel: a large mean costs no digits."""
    n, tile, channel, inside, there, place = _own_tile(num_rows, num_channels, ROWS, CHANNELS)
    pivot = tl.load(x + n * num_rows * num_channels + channel, inside, 0.0).to(tl.float32)
    values = tl.load(x + place, there, 0.0).to(tl.float32)
    values = tl.where(there, values - pivot[None, :], 0.0)
    out = sums + (n * tl.num_programs(0) + tile) * 2 * num_channels + channel
    tl.store(out, tl.sum(values, 0), inside)
    tl.store(out + num_channels, tl.sum(values * values, 0), inside)


@triton.jit
def _both_sums(sums, n, channel, inside, num_channels, num_tiles, TILES: tl.constexpr, WIDTH: tl.constexpr):
    """The two sums of each channel of a group, over all tiles."""
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
    """Mean and reciprocal standard deviation of a group, from its channels' sums (Chan et al. 1983)."""
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
    """What to subtract from each channel of x: its group's mean, less what the channel is shifted by."""
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
    n, _, channel, inside, there, place = _own_tile(num_rows, num_channels, ROWS, CHANNELS)
    group = n * (num_channels // width) + channel // width
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
    """The normalised values, and the loss's gradient by them, of a tile."""
    deviation = tl.load(rstd + group, inside, 0.0)
    factor = tl.load(weight + channel, inside, 0.0).to(tl.float32)
    normal = (tl.load(x + place, there, 0.0).to(tl.float32) - average[None, :]) * deviation[None, :]
    gradient = tl.load(dy + place, there, 0.0).to(tl.float32)
    if SILU:
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
    n, tile, channel, inside, there, place = _own_tile(num_rows, num_channels, ROWS, CHANNELS)
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
    n, group, num_groups = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    offset = tl.arange(0, WIDTH)
    channel, inside = group * width + offset, offset < width
    first, second = _both_sums(sums, n, channel, inside, num_channels, num_tiles, TILES, WIDTH)
    out = totals + n * 2 * num_groups + group
    tl.store(out, tl.sum(first, 0))
    tl.store(out + num_groups, tl.sum(second, 0))


@triton.jit
def _normalise_gradient_kernel(
    dx_beside,
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
    n, tile, channel, inside, there, place = _own_tile(num_rows, num_channels, ROWS, CHANNELS)
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
    values = (gradient - constant[None, :] - normal * product[None, :]) * deviation[None, :]
    if dshift is not None:
        out = dshift + (n * tl.num_programs(0) + tile) * num_channels + channel
        tl.store(out, tl.sum(tl.where(there, values, 0.0), 0), inside)
    if dx_beside is not None:
        values += tl.load(dx_beside + place, there, 0.0).to(tl.float32)
    tl.store(dx + place, values, there)


@triton.jit
def _add_bias_kernel(residual, update, bias, y, count, num_channels, VALUES: tl.constexpr):
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
    dx_beside: Tensor | None,
    dy: Tensor,
    x: Tensor,
    shift: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    bias: Tensor,
    silu: bool,
) -> tuple[Tensor, Tensor]:
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
    _normalise_gradient_kernel[grid](dx_beside, *known, totals, dx, dshift, *sizes)
    return dx, x.new_empty(0) if dshift is None else dshift.sum(1).to(x.dtype)


def _tiles(x: Tensor) -> tuple[int, int, int]:
    """Programs by tile of rows, image and tile of channels: a grid's first side alone goes beyond 65,535."""
    return triton.cdiv(x[0, 0].numel(), _ROWS), len(x), triton.cdiv(x.shape[1], _CHANNELS)


def _at_once(num_tiles: int, width: int) -> tuple[int, int]:
    """How many tiles and channels a program that adds up a group's sums holds."""
    return min(triton.next_power_of_2(num_tiles), _TILES), triton.next_power_of_2(width)


def launch_add_bias(residual: Tensor | None, update: Tensor, bias: Tensor, y: Tensor) -> None:
    grid = (triton.cdiv(y.numel(), _VALUES),)
    _add_bias_kernel[grid](residual, update, bias, y, y.numel(), len(bias), _VALUES)
