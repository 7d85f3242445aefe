"""Triton kernels of attention to few keys; `attention_ops.short_kv_attention` defines the result.

A program has all keys of a head and one tile of its queries. For the gradient it has a part of the queries,
several tiles, and writes that part's sums for the keys; another kernel adds up the parts in a fixed order,
without atomic additions, so that results are bit-identical. A GPU runs the kernels, or Triton's interpreter.
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

# By bytes of an element. For 2 bytes the fastest as measured on an H100 at SDXL's sizes. For 4 bytes small,
# since the tiles have to fit into shared memory. Tile sizes decide the order of sums: another size, another
# rounding.
_FORWARD = {2: Tiles(64, 0, 4, 1), 4: Tiles(16, 0, 8, 1)}
_GRADIENT = {2: Tiles(32, 0, 4, 3), 4: Tiles(16, 0, 8, 1)}
_PART = 256  # queries over which a program sums the gradients of the keys, at least
_MAX_PARTS = 8  # more parts fill more of a GPU, but each part has another fp32 copy of dK and dV


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
    # One tile has all keys, so the softmax needs no running maximum. Keys beyond the last get weight 0.
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
    """Store the gradient dQ of a part of the queries, `num_rows`, and their shares of dK and dV.

    Computes the softmax a second time. Scores are transposed, (K, Q), so that only dQ needs a transposed
    tile.
    """
    part, head = tl.program_id(0), tl.program_id(1)
    column = tl.arange(0, KEYS)
    k = load(key, head, num_heads, column, num_keys, WIDTH)
    v = load(value, head, num_heads, column, num_keys, WIDTH)
    dk, dv = tl.zeros((KEYS, WIDTH), tl.float32), tl.zeros((KEYS, WIDTH), tl.float32)
    for start in range(part * num_rows, min((part + 1) * num_rows, num_queries), QUERIES):
        row = start + tl.arange(0, QUERIES)
        # Rows beyond the last query are zeros. Their softmax is not 0, but dy and q are, so they add nothing.
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
        # The gradient of softmax: sum(p * dp) replaces sum(output * doutput), so that no output has to be
        # kept.
        ds = (p * (dp - tl.sum(p * dp, 0)[None, :])).to(q.dtype)
        dk = add_tile_product(ds, q, dk)
        store(dquery, head, num_heads, row, num_queries, tile_product(tl.trans(ds), k) * scale, WIDTH)
    shift = part.to(tl.int64) * part_size  # to this part's copy of dK and dV, and 0 if there is one part
    dkey_part = Rows(dkey.start + shift, dkey.batch, dkey.row, dkey.head)
    store(dkey_part, head, num_heads, column, num_keys, dk * scale, WIDTH)
    dvalue_part = Rows(dvalue.start + shift, dvalue.batch, dvalue.row, dvalue.head)
    store(dvalue_part, head, num_heads, column, num_keys, dv, WIDTH)


@triton.jit
def _add_parts_kernel(parts, dkey, dvalue, num_parts, part_size, num_keys, num_values, VALUES: tl.constexpr):
    """Add up the parts' shares of one key's row, in the order of the parts, for dK or dV.

    A program per row, so that no two programs write the same value.
    """
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
    """Run the forward kernel: one program for each tile of queries and head."""
    batch, num_queries, num_heads, width = query.shape
    output = query.new_empty(query.shape)
    tiles = _FORWARD[query.itemsize]
    _short_kv_forward_kernel[(triton.cdiv(num_queries, tiles.queries), batch * num_heads)](
        *(rows(tensor) for tensor in (query, key, value, output)),
        *(num_queries, key.shape[1], num_heads, width**-0.5 * LOG2_E),
        *(causal, width, tiles.queries, max(triton.next_power_of_2(key.shape[1]), 16)),  # tl.dot needs 16
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
    """Run the gradient kernel, and if it has several parts the kernel that adds them up."""
    (batch, num_queries, num_heads, width), num_keys = query.shape, key.shape[1]
    tiles = _GRADIENT[query.itemsize]
    # The number of parts depends on the number of queries alone, not on the GPU: so does the order of sums.
    num_parts = min(triton.cdiv(num_queries, _PART), _MAX_PARTS)
    num_rows = triton.cdiv(triton.cdiv(num_queries, num_parts), tiles.queries) * tiles.queries
    num_parts = triton.cdiv(num_queries, num_rows)  # rounding rows up to whole tiles can leave fewer parts
    sums = [dkey, dvalue]  # a single part is the result
    if num_parts > 1:
        parts = key.new_empty(num_parts, 2, *key.shape, dtype=torch.float32)
        sums = list(parts[0])  # dK and dV of part 0; programs of other parts shift these pointers
    _short_kv_backward_kernel[(num_parts, batch * num_heads)](
        *(rows(tensor) for tensor in (doutput, query, key, value, dquery, *sums)),
        *(2 * key.numel(), num_queries, num_keys, num_heads, num_rows, width**-0.5 * LOG2_E, width**-0.5),
        *(causal, width, tiles.queries, max(triton.next_power_of_2(num_keys), 16)),  # tl.dot needs 16
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
    )
    if num_parts > 1:
        num_values = num_heads * width
        _add_parts_kernel[(batch, num_keys, 2)](
            *(parts, rows(dkey), rows(dvalue), num_parts, parts[0].numel(), num_keys, num_values),
            triton.next_power_of_2(num_values),
        )
