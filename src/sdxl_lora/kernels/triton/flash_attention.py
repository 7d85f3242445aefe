"""Triton kernels of attention over tiles of keys; `attention_ops.flash_attention` defines the result.

A program has one tile of a head's queries and loops over the tiles of keys, or the reverse. Every sum has one
program and a fixed order, without atomic additions, so that results are bit-identical. A GPU runs the
kernels, or Triton's interpreter.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from sdxl_lora.kernels.triton.attention_common import (
    LOG2_E,
    Tiles,
    add_tile_product,
    load,
    load_some,
    rows,
    store,
    tile_product,
)

# By bytes of an element. For 2 bytes the fastest as measured on an H100 at SDXL's sizes. For 4 bytes small,
# since the tiles have to fit into shared memory. Tile sizes decide the order of sums: another size, another
# rounding.
_FORWARD = {2: Tiles(64, 64, 4, 3), 4: Tiles(32, 32, 4, 1)}
_QUERY_GRADIENT = {2: Tiles(128, 64, 8, 3), 4: Tiles(32, 32, 4, 1)}
_KEY_GRADIENT = {2: Tiles(64, 64, 4, 3), 4: Tiles(32, 32, 4, 1)}


@triton.jit
def _flash_kernel(
    query,
    key,
    value,
    output,
    log_sums,
    num_queries,
    num_keys,
    num_heads,
    log_scale,
    RAGGED: tl.constexpr,
    WIDTH: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
):
    """Softmax over tiles of keys, with a running maximum; stores log2 of each row's denominator."""
    head = tl.program_id(1)
    row = tl.program_id(0) * QUERIES + tl.arange(0, QUERIES)
    q = load(query, head, num_heads, row, num_queries, WIDTH)
    # Invariant: `values` and `total` are sums over the keys so far of exp2(score - top), where top is the
    # largest score so far. When a tile has a larger one, `decay` rescales both. So no exponential overflows.
    top = tl.full((QUERIES,), float("-inf"), tl.float32)
    total, values = tl.zeros((QUERIES,), tl.float32), tl.zeros((QUERIES, WIDTH), tl.float32)
    for start in range(0, num_keys, KEYS):
        column = start + tl.arange(0, KEYS)
        k = load_some(key, head, num_heads, column, num_keys, RAGGED, WIDTH)
        v = load_some(value, head, num_heads, column, num_keys, RAGGED, WIDTH)
        scores = tile_product(q, tl.trans(k))
        if RAGGED:
            scores = tl.where((column < num_keys)[None, :], scores, float("-inf"))  # exp2 of it is 0
        new_top = tl.maximum(top, tl.max(scores, 1) * log_scale)
        powers = tl.exp2(scores * log_scale - new_top[:, None])
        decay = tl.exp2(top - new_top)  # 0 in the first tile, as top is -inf
        total = total * decay + tl.sum(powers, 1)
        # Tensor cores multiply the tensors' precision; powers are in [0, 1], so rounding them costs little.
        values = add_tile_product(powers.to(v.dtype), v, values * decay[:, None])
        top = new_top
    store(output, head, num_heads, row, num_queries, values / total[:, None], WIDTH)
    tl.store(log_sums + head.to(tl.int64) * num_queries + row, top + tl.log2(total), row < num_queries)


@triton.jit
def _flash_query_gradient_kernel(
    doutput,
    output,
    query,
    key,
    value,
    dquery,
    log_sums,
    deltas,
    num_queries,
    num_keys,
    num_heads,
    log_scale,
    scale,
    RAGGED: tl.constexpr,
    WIDTH: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
):
    """Store the gradient dQ, and deltas, each output row times its gradient, for the kernel below.

    With P the softmax and S the scores, dS = P * (dP - delta), since delta = sum(P * dP) over a row's keys.
    """
    head = tl.program_id(1)
    row = tl.program_id(0) * QUERIES + tl.arange(0, QUERIES)
    inside, index = row < num_queries, head.to(tl.int64) * num_queries + row
    dy = load(doutput, head, num_heads, row, num_queries, WIDTH)
    y = load(output, head, num_heads, row, num_queries, WIDTH)
    q = load(query, head, num_heads, row, num_queries, WIDTH)
    delta = tl.sum(dy.to(tl.float32) * y.to(tl.float32), 1)
    tl.store(deltas + index, delta, inside)
    # Rows beyond the last get inf, so that their softmax is exp2(-inf) = 0 and never NaN.
    log_sum = tl.load(log_sums + index, inside, float("inf"))
    dq = tl.zeros((QUERIES, WIDTH), tl.float32)
    for start in range(0, num_keys, KEYS):
        column = start + tl.arange(0, KEYS)
        k = load_some(key, head, num_heads, column, num_keys, RAGGED, WIDTH)
        v = load_some(value, head, num_heads, column, num_keys, RAGGED, WIDTH)
        scores = tile_product(q, tl.trans(k))
        if RAGGED:
            scores = tl.where((column < num_keys)[None, :], scores, float("-inf"))
        p = tl.exp2(scores * log_scale - log_sum[:, None])  # the softmax, without a second pass for its sum
        ds = p * (tile_product(dy, tl.trans(v)) - delta[:, None])
        dq = add_tile_product(ds.to(k.dtype), k, dq)
    store(dquery, head, num_heads, row, num_queries, dq * scale, WIDTH)


@triton.jit
def _flash_key_gradient_kernel(
    doutput,
    query,
    key,
    value,
    dkey,
    dvalue,
    log_sums,
    deltas,
    num_queries,
    num_keys,
    num_heads,
    log_scale,
    scale,
    RAGGED: tl.constexpr,
    WIDTH: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
):
    """Store the gradients dK and dV. Scores are computed transposed, (K, Q), as dK and dV multiply them."""
    head = tl.program_id(1)
    column = tl.program_id(0) * KEYS + tl.arange(0, KEYS)
    k = load(key, head, num_heads, column, num_keys, WIDTH)
    v = load(value, head, num_heads, column, num_keys, WIDTH)
    dk, dv = tl.zeros((KEYS, WIDTH), tl.float32), tl.zeros((KEYS, WIDTH), tl.float32)
    first = head.to(tl.int64) * num_queries
    for start in range(0, num_queries, QUERIES):
        row = start + tl.arange(0, QUERIES)
        q = load_some(query, head, num_heads, row, num_queries, RAGGED, WIDTH)
        dy = load_some(doutput, head, num_heads, row, num_queries, RAGGED, WIDTH)
        if RAGGED:  # rows beyond the last have softmax 0, as in the kernel above, and add nothing
            log_sum = tl.load(log_sums + first + row, row < num_queries, float("inf"))
            delta = tl.load(deltas + first + row, row < num_queries, 0.0)
        else:
            log_sum, delta = tl.load(log_sums + first + row), tl.load(deltas + first + row)
        p = tl.exp2(tile_product(k, tl.trans(q)) * log_scale - log_sum[None, :])
        dv = add_tile_product(p.to(dy.dtype), dy, dv)
        ds = p * (tile_product(v, tl.trans(dy)) - delta[None, :])
        dk = add_tile_product(ds.to(q.dtype), q, dk)
    store(dkey, head, num_heads, column, num_keys, dk * scale, WIDTH)
    store(dvalue, head, num_heads, column, num_keys, dv, WIDTH)


def launch_flash_forward(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Run the forward kernel: one program for each tile of queries and head."""
    (batch, num_queries, num_heads, width), num_keys = query.shape, key.shape[1]
    output = query.new_empty(query.shape)
    log_sums = query.new_empty(batch, num_heads, num_queries, dtype=torch.float32)
    tiles = _FORWARD[query.itemsize]
    _flash_kernel[(triton.cdiv(num_queries, tiles.queries), batch * num_heads)](
        *(rows(tensor) for tensor in (query, key, value, output)),
        *(log_sums, num_queries, num_keys, num_heads, width**-0.5 * LOG2_E),
        *(num_keys % tiles.keys != 0, width, tiles.queries, tiles.keys),
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
    )
    return output, log_sums


def launch_flash_backward(
    doutput: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    log_sums: Tensor,
    dquery: Tensor,
    dkey: Tensor,
    dvalue: Tensor,
) -> None:
    """Run both gradient kernels. The first writes deltas, which the second reads: launches run in order."""
    (batch, num_queries, num_heads, width), num_keys = query.shape, key.shape[1]
    deltas = torch.empty_like(log_sums)
    sizes = (num_queries, num_keys, num_heads, width**-0.5 * LOG2_E, width**-0.5)
    tiles = _QUERY_GRADIENT[query.itemsize]
    _flash_query_gradient_kernel[(triton.cdiv(num_queries, tiles.queries), batch * num_heads)](
        *(rows(tensor) for tensor in (doutput, output, query, key, value, dquery)),
        *(log_sums, deltas, *sizes),
        *(num_keys % tiles.keys != 0, width, tiles.queries, tiles.keys),
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
    )
    tiles = _KEY_GRADIENT[query.itemsize]
    _flash_key_gradient_kernel[(triton.cdiv(num_keys, tiles.keys), batch * num_heads)](
        *(rows(tensor) for tensor in (doutput, query, key, value, dkey, dvalue)),
        *(log_sums, deltas, *sizes),
        *(num_queries % tiles.queries != 0, width, tiles.queries, tiles.keys),
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
    )
