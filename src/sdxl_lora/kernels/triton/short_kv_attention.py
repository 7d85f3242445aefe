"""The Triton kernels of attention to few keys: attention_kernels.py says what they compute.

A program has all keys of a head and a tile of its queries, or a part of several tiles for the gradient, whose
sums for the keys are added up then in a fixed order: results repeat to the bit. A GPU runs
them, or Triton's interpreter.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from sdxl_lora.kernels.triton.attention_common import (
    LOG2_E,
    Rows,
    Tiles,
    add_tile_product,
    load,
    rows,
    store,
    tile_product,
)

# By bytes of an element: measured on an H100 at SDXL's sizes; fp32 has to fit into shared memory.
_FORWARD = {2: Tiles(64, 0, 4, 1), 4: Tiles(16, 0, 8, 1)}
_GRADIENT = {2: Tiles(32, 0, 4, 3), 4: Tiles(16, 0, 8, 1)}
_PART = 256  # queries at least, over which a program sums the gradients of the keys
_MOST_PARTS = 8


@triton.jit
def _short_kv_forward_kernel(
    query,
    key,
    value,
    output,
    num_queries,
    num_keys,
    num_heads,
    log_scale,
    CAUSAL: tl.constexpr,
    WIDTH: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
):
    head = tl.program_id(1)
    row = tl.program_id(0) * QUERIES + tl.arange(0, QUERIES)
    column = tl.arange(0, KEYS)
    q = load(query, head, num_heads, row, num_queries, WIDTH)
    k = load(key, head, num_heads, column, num_keys, WIDTH)
    v = load(value, head, num_heads, column, num_keys, WIDTH)
    seen = (column < num_keys)[None, :]
    if CAUSAL:
        seen = seen & (column[None, :] <= row[:, None])
    scores = tl.where(seen, tile_product(q, tl.trans(k)) * log_scale, float("-inf"))
    powers = tl.exp2(scores - tl.max(scores, 1)[:, None])
    total = tl.sum(powers, 1)[:, None]
    store(output, head, num_heads, row, num_queries, tile_product(powers.to(v.dtype), v) / total, WIDTH)


@triton.jit
def _short_kv_backward_kernel(
    doutput,
    query,
    key,
    value,
    dquery,
    dkey,
    dvalue,
    part_size,
    num_queries,
    num_keys,
    num_heads,
    num_rows,
    log_scale,
    scale,
    CAUSAL: tl.constexpr,
    WIDTH: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
):
    """The gradient dQ of a part of the queries, `num_rows`, and that part's share of dK and dV.

    Computes the softmax again. Scores are transposed, (K, Q), so that a single tile has to be turned round.
    """
    part, head = tl.program_id(0), tl.program_id(1)
    column = tl.arange(0, KEYS)
    k = load(key, head, num_heads, column, num_keys, WIDTH)
    v = load(value, head, num_heads, column, num_keys, WIDTH)
    dk, dv = tl.zeros((KEYS, WIDTH), tl.float32), tl.zeros((KEYS, WIDTH), tl.float32)
    for start in range(part * num_rows, min((part + 1) * num_rows, num_queries), QUERIES):
        row = start + tl.arange(0, QUERIES)
        q = load(query, head, num_heads, row, num_queries, WIDTH)
        dy = load(doutput, head, num_heads, row, num_queries, WIDTH)
        seen = (column < num_keys)[:, None]
        if CAUSAL:
            seen = seen & (column[:, None] <= row[None, :])
        scores = tl.where(seen, tile_product(k, tl.trans(q)) * log_scale, float("-inf"))
        powers = tl.exp2(scores - tl.max(scores, 0)[None, :])
        p = powers / tl.sum(powers, 0)[None, :]
        dp = tile_product(v, tl.trans(dy))
        dv = add_tile_product(p.to(q.dtype), dy, dv)
        ds = (p * (dp - tl.sum(p * dp, 0)[None, :])).to(q.dtype)
        dk = add_tile_product(ds, q, dk)
        store(dquery, head, num_heads, row, num_queries, tile_product(tl.trans(ds), k) * scale, WIDTH)
    shift = part.to(tl.int64) * part_size
    dkey_part = Rows(dkey.start + shift, dkey.batch, dkey.row, dkey.head)
    store(dkey_part, head, num_heads, column, num_keys, dk * scale, WIDTH)
    dvalue_part = Rows(dvalue.start + shift, dvalue.batch, dvalue.row, dvalue.head)
    store(dvalue_part, head, num_heads, column, num_keys, dv, WIDTH)


@triton.jit
def _add_parts_kernel(parts, dkey, dvalue, num_parts, part_size, num_keys, num_values, VALUES: tl.constexpr):
    """Adds up one key's row of all parts, in their order, for dK or dV."""
    example, row, which = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    column = tl.arange(0, VALUES)
    inside = column < num_values
    total = tl.zeros((VALUES,), tl.float32)
    start = parts + ((which * tl.num_programs(0) + example) * num_keys + row) * num_values
    for part in range(num_parts):
        total += tl.load(start + part * part_size + column, inside, 0.0)
    if which == 0:
        place = dkey.start + example * dkey.batch + row * dkey.row
    else:
        place = dvalue.start + example * dvalue.batch + row * dvalue.row
    tl.store(place + column, total.to(dkey.start.dtype.element_ty), inside)


def launch_short_kv_forward(query: Tensor, key: Tensor, value: Tensor, causal: bool) -> Tensor:
    batch, num_queries, num_heads, width = query.shape
    output = query.new_empty(query.shape)
    tiles = _FORWARD[query.itemsize]
    _short_kv_forward_kernel[(triton.cdiv(num_queries, tiles.queries), batch * num_heads)](
        *(rows(tensor) for tensor in (query, key, value, output)),
        *(num_queries, key.shape[1], num_heads, width**-0.5 * LOG2_E),
        *(causal, width, tiles.queries, max(triton.next_power_of_2(key.shape[1]), 16)),
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
    )
    return output


def launch_short_kv_backward(
    doutput: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dquery: Tensor,
    dkey: Tensor,
    dvalue: Tensor,
    causal: bool,
) -> None:
    (batch, num_queries, num_heads, width), num_keys = query.shape, key.shape[1]
    tiles = _GRADIENT[query.itemsize]
    num_parts = min(triton.cdiv(num_queries, _PART), _MOST_PARTS)
    num_rows = triton.cdiv(triton.cdiv(num_queries, num_parts), tiles.queries) * tiles.queries
    num_parts = triton.cdiv(num_queries, num_rows)
    sums = [dkey, dvalue]
    if num_parts > 1:
        parts = key.new_empty(num_parts, 2, *key.shape, dtype=torch.float32)
        sums = list(parts[0])
    _short_kv_backward_kernel[(num_parts, batch * num_heads)](
        *(rows(tensor) for tensor in (doutput, query, key, value, dquery, *sums)),
        *(2 * key.numel(), num_queries, num_keys, num_heads, num_rows, width**-0.5 * LOG2_E, width**-0.5),
        *(causal, width, tiles.queries, max(triton.next_power_of_2(num_keys), 16)),
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
    )
    if num_parts > 1:
        num_values = num_heads * width
        _add_parts_kernel[(batch, num_keys, 2)](
            *(parts, rows(dkey), rows(dvalue), num_parts, parts[0].numel(), num_keys, num_values),
            triton.next_power_of_2(num_values),
        )
