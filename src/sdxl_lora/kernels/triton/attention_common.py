"""Parts that the attention kernels share: rows of a head, loaded, stored and multiplied.

Matrix products read the tensors' precision and accumulate in fp32; all else is fp32. Exponentials are powers
of two of the scores times log2(e), since GPUs have an instruction for powers of two.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

LOG2_E = 1.4426950408889634


class Tiles(NamedTuple):
    """The tile sizes of a kernel, and the settings that go with them."""

    queries: int
    """Rows of a tile, a power of two."""
    keys: int
    """Rows of a tile, a power of two; 0 if a tile has all keys."""
    num_warps: int
    num_stages: int
    """Tiles in shared memory at once: loads of the next ones overlap with the arithmetic of this one."""


class Rows(NamedTuple):
    """A tensor (B, L, H, D) with its strides: parts of the result of merged projections need no copy."""

    start: Any
    """The tensor, a pointer in a kernel."""
    batch: Any
    """Strides, in elements. That of the last dimension is 1."""
    row: Any
    head: Any


def rows(tensor: Tensor) -> Rows:
    """Return the kernel argument for a tensor (B, L, H, D)."""
    assert tensor.stride(-1) == 1
    return Rows(tensor, *tensor.stride()[:3])


@triton.jit
def _pointers(tensor, head, num_heads, row, WIDTH: tl.constexpr):
    """Return pointers to rows of a head, (rows, WIDTH); `head` counts the heads of all examples."""
    # 64 bits: at 1024 px a batch can have more than 2^31 elements.
    start = tensor.start + (head // num_heads).to(tl.int64) * tensor.batch + head % num_heads * tensor.head
    return start + row[:, None] * tensor.row + tl.arange(0, WIDTH)[None, :]


@triton.jit
def load(tensor, head, num_heads, row, num_rows, WIDTH: tl.constexpr):
    """Return rows of a head, zeros beyond the last."""
    return tl.load(_pointers(tensor, head, num_heads, row, WIDTH), (row < num_rows)[:, None], 0.0)


@triton.jit
def load_some(tensor, head, num_heads, row, num_rows, RAGGED: tl.constexpr, WIDTH: tl.constexpr):
    """Return rows of a head as `load` does. Without `RAGGED` all rows exist, and no mask costs time."""
    if RAGGED:
        tile = load(tensor, head, num_heads, row, num_rows, WIDTH)
    else:
        tile = tl.load(_pointers(tensor, head, num_heads, row, WIDTH))
    return tile


@triton.jit
def store(tensor, head, num_heads, row, num_rows, values, WIDTH: tl.constexpr):
    """Write rows of a head that exist."""
    values = values.to(tensor.start.dtype.element_ty)
    tl.store(_pointers(tensor, head, num_heads, row, WIDTH), values, (row < num_rows)[:, None])


@triton.jit
def tile_product(left, right):
    """Return the matrix product in fp32. "ieee": fp32 inputs are not rounded to TF32."""
    return tl.dot(left, right, input_precision="ieee")


@triton.jit
def add_tile_product(left, right, total):
    """Return `total` plus the matrix product, in fp32."""
    return tl.dot(left, right, total, input_precision="ieee")
