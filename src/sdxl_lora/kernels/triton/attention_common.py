"""What Triton's kernels of attention have in common: rows of a head, read, written and multiplied.

Products take the tensors' precision and add up in fp32; all else is fp32. Exponentials are powers of two,
whose exponents are the scores times log2(e).
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

LOG2_E = 1.4426950408889634


class Tiles(NamedTuple):
    """How a kernel divides its work."""

    queries: int
    """Rows of a tile, a power of two."""
    keys: int
    """Rows of a tile, a power of two; 0 where a tile has all."""
    num_warps: int
    num_stages: int
    """Tiles that are under way from memory at once."""


class Rows(NamedTuple):
    """A tensor (B, L, H, D) of any strides but the last, 1: parts of merged projections stay in place."""

    start: Any
    batch: Any
    row: Any
    head: Any


def rows(tensor: Tensor) -> Rows:
    assert tensor.stride(-1) == 1
    return Rows(tensor, *tensor.stride()[:3])


@triton.jit
def _places(tensor, head, num_heads, row, WIDTH: tl.constexpr):
    """Where rows of a head lie; heads are numbered through all examples."""
    start = tensor.start + (head // num_heads).to(tl.int64) * tensor.batch + head % num_heads * tensor.head
    return start + row[:, None] * tensor.row + tl.arange(0, WIDTH)[None, :]


@triton.jit
def load(tensor, head, num_heads, row, num_rows, WIDTH: tl.constexpr):
    """Rows of a head, zeros beyond the last."""
    return tl.load(_places(tensor, head, num_heads, row, WIDTH), (row < num_rows)[:, None], 0.0)


@triton.jit
def load_some(tensor, head, num_heads, row, num_rows, RAGGED: tl.constexpr, WIDTH: tl.constexpr):
    """The same; unless `RAGGED`, all rows are known to be there."""
    if RAGGED:
        tile = load(tensor, head, num_heads, row, num_rows, WIDTH)
    else:
        tile = tl.load(_places(tensor, head, num_heads, row, WIDTH))
    return tile


@triton.jit
def store(tensor, head, num_heads, row, num_rows, values, WIDTH: tl.constexpr):
    values = values.to(tensor.start.dtype.element_ty)
    tl.store(_places(tensor, head, num_heads, row, WIDTH), values, (row < num_rows)[:, None])


@triton.jit
def tile_product(left, right):
    return tl.dot(left, right, input_precision="ieee")


@triton.jit
def add_tile_product(left, right, total):
    return tl.dot(left, right, total, input_precision="ieee")
