"""The Triton kernels of attention over tiles of keys: attention_kernels.py says what they compute.

A program has a tile of one head's queries and goes over the keys, or the other way round. None adds to what
another wrote, so that results repeat to the bit. A GPU runs them, or Triton's interpreter.
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

# By bytes of an element: measured on an H100 at SDXL's sizes; fp32 has to fit into shared memory.
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
    """Online softmax over tiles of keys; keeps the logarithm to base 2 of each row's denominator."""
    head = tl.program_id(1)
    row = tl.program_id(0) * QUERIES + tl.arange(0, QUERIES)
    q = load(query, head, num_heads, row, num_queries, WIDTH)
    top = tl.full((QUERIES,), float("-inf"), tl.float32)
    total, values = tl.zeros((QUERIES,), tl.float32), tl.zeros((QUERIES, WIDTH), tl.float32)
    for start in range(0, num_keys, KEYS):
        column = start + tl.arange(0, KEYS)
        k = load_some(key, head, num_heads, column, num_keys, RAGGED, WIDTH)
        v = load_some(value, head, num_heads, column, num_keys, RAGGED, WIDTH)
        scores = tile_product(q, tl.trans(k))
        if RAGGED:
            scores = tl.where((column < num_keys)[None, :], scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1) * log_scale)
        powers = tl.exp2(scores * log_scale - new_top[:, None])
        decay = tl.exp2(top - new_top)
        total = total * decay + tl.sum(powers, 1)
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
    """The gradient dQ, and for the kernel below the product of each row of the output with its gradient."""
    head = tl.program_id(1)
    row = tl.program_id(0) * QUERIES + tl.arange(0, QUERIES)
    inside, own = row < num_queries, head.to(tl.int64) * num_queries + row
    dy = load(doutput, head, num_heads, row, num_queries, WIDTH)
    y = load(output, head, num_heads, row, num_queries, WIDTH)
    q = load(query, head, num_heads, row, num_queries, WIDTH)
    delta = tl.sum(dy.to(tl.float32) * y.to(tl.float32), 1)
    tl.store(deltas + own, delta, inside)
    log_sum = tl.load(log_sums + own, inside, float("inf"))
    dq = tl.zeros((QUERIES, WIDTH), tl.float32)
    for start in range(0, num_keys, KEYS):
        column = start + tl.arange(0, KEYS)
        k = load_some(key, head, num_heads, column, num_keys, RAGGED, WIDTH)
        v = load_some(value, head, num_heads, column, num_keys, RAGGED, WIDTH)
        scores = tile_product(q, tl.trans(k))
        if RAGGED:
            scores = tl.where((column < num_keys)[None, :], scores, float("-inf"))
        p = tl.exp2(scores * log_scale - log_sum[:, None])
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
    """The gradients dK and dV. Scores are transposed, (K, Q), so that no tile has to be turned round."""
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
        if RAGGED:
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
