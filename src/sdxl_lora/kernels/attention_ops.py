"""Scaled dot-product attention by Triton kernels, as operators that PyTorch can differentiate.

Two runs give bit-identical results. Gradients of query, key and value lie in one block of memory in the order
of these tensors, so that the backward pass of merged projections needs no copy. Knows no model and no other
kernels.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

_MAX_KEYS = 128  # a program holds the scores of a tile of queries with all keys
_HEAD_DIMS = (16, 32, 64)  # tensor cores need 16 or more; wider heads fill a program's shared memory
_MIN_CAPABILITY = (8, 0)  # Ampere: on older GPUs Triton does not use tensor cores


def supports_triton(device: torch.device) -> bool:
    """Return whether a device can run these kernels: a GPU, or `meta`, which stands for one in forecasts."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= _MIN_CAPABILITY
    return device.type == "meta"


def supports_short_kv(query: Tensor, key: Tensor) -> bool:
    """Return whether `short_kv_attention` can attend to these."""
    return key.shape[1] <= _MAX_KEYS and query.shape[-1] in _HEAD_DIMS and supports_triton(query.device)


def short_kv_attention(query: Tensor, key: Tensor, value: Tensor, causal: bool = False) -> Tensor:
    """Return softmax(Q K^T / sqrt(D)) V for few keys, as those of a caption.

    All scores of a row are in one tile. So only the inputs are kept for the gradient, which computes the
    softmax a second time. Its row sums come from the softmax; other implementations compute them from the
    output (Dao 2022, arXiv:2205.14135, appendix B.2).

    Args:
        query: (B, L, H, D).
        key: (B, S, H, D), S <= 128.
        value: shaped as `key`.
        causal: query i sees keys 0 to i only.

    Returns:
        (B, L, H, D).
    """
    return _short_kv_forward(*_contiguous_last_dim(query, key, value), causal)


def flash_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Return softmax(Q K^T / sqrt(D)) V, computed over tiles of keys (Dao 2023, arXiv:2307.08691).

    The gradient is two kernels, one for keys and values and one for queries, and each computes the scores:
    seven products where others take five. In return no program adds to another's result, which atomic
    additions would do in an order that differs between runs.

    Args:
        query: (B, L, H, D).
        key: (B, S, H, D).
        value: shaped as `key`.

    Returns:
        (B, L, H, D).

    Raises:
        RuntimeError: unsupported head dimension, or not a GPU of compute capability 8.0 or later.
    """
    if query.shape[-1] not in _HEAD_DIMS:
        raise RuntimeError(
            f"it supports head dimensions {', '.join(map(str, _HEAD_DIMS))}, not {query.shape[-1]}"
        )
    if not supports_triton(query.device):
        raise RuntimeError(
            f"it needs an NVIDIA GPU of compute capability {'.'.join(map(str, _MIN_CAPABILITY))} or later"
        )
    return _flash_forward(*_contiguous_last_dim(query, key, value))[0]


def _contiguous_last_dim(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Return the tensors, copied if the last dimension is not contiguous."""
    return tuple(tensor if tensor.stride(-1) == 1 else tensor.contiguous() for tensor in tensors)


# Each operator is a typed signature, from which PyTorch derives its schema, around a Triton launcher. Triton
# is imported where it runs, since PyTorch's builds for CPUs come without it. `register_fake` gives the
# results' shapes for `meta` tensors, whose memory is forecast.


@torch.library.custom_op("sdxl_lora::few_keys", mutates_args=())
def _short_kv_forward(query: Tensor, key: Tensor, value: Tensor, causal: bool) -> Tensor:
    from sdxl_lora.kernels.triton import short_kv_attention

    return short_kv_attention.launch_short_kv_forward(query, key, value, causal)


# Backward operators write into memory that they are given: an operator's result may not be a view of
# another's.
@torch.library.custom_op("sdxl_lora::few_keys_gradient", mutates_args=("dquery", "dkey", "dvalue"))
def _short_kv_backward(
    doutput: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dquery: Tensor,
    dkey: Tensor,
    dvalue: Tensor,
    causal: bool,
) -> None:
    from sdxl_lora.kernels.triton import short_kv_attention

    short_kv_attention.launch_short_kv_backward(doutput, query, key, value, dquery, dkey, dvalue, causal)


@torch.library.custom_op("sdxl_lora::flash", mutates_args=())
def _flash_forward(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Return the output, and the logarithm to base 2 of each row's sum of exponentials, (B, H, L)."""
    from sdxl_lora.kernels.triton import flash_attention

    return flash_attention.launch_flash_forward(query, key, value)


@torch.library.custom_op("sdxl_lora::flash_gradient", mutates_args=("dquery", "dkey", "dvalue"))
def _flash_backward(
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
    from sdxl_lora.kernels.triton import flash_attention

    flash_attention.launch_flash_backward(doutput, query, key, value, output, log_sums, dquery, dkey, dvalue)


@_short_kv_forward.register_fake
def _(query: Tensor, *_: Any) -> Tensor:
    return query.new_empty(query.shape)


@_flash_forward.register_fake
def _(query: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    batch, num_queries, num_heads = query.shape[:3]
    return query.new_empty(query.shape), query.new_empty(batch, num_heads, num_queries, dtype=torch.float32)


def _empty_gradients(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Allocate gradients of tensors (B, L, H, D): one block, (B, L, n, H, D), for n of the same length.

    Merged projections compute query, key and value as parts of one result. With the gradients in the same
    order, their backward pass reads the block as the gradient of that result, without a copy.
    """
    gradients: dict[int, Tensor] = {}
    for length in {tensor.shape[1] for tensor in tensors}:
        places = [place for place, tensor in enumerate(tensors) if tensor.shape[1] == length]
        places.sort(key=lambda place: tensors[place].storage_offset())  # the order of the parts in memory
        batch, _, heads, width = tensors[places[0]].shape
        block = tensors[places[0]].new_empty(batch, length, len(places), heads, width)
        gradients |= {place: block[:, :, number] for number, place in enumerate(places)}
    return [gradients[place] for place in range(len(tensors))]


def _short_kv_setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.causal = inputs
    ctx.save_for_backward(*tensors)


def _short_kv_autograd(ctx: Any, doutput: Tensor) -> tuple[Tensor | None, ...]:
    tensors = ctx.saved_tensors
    gradients = _empty_gradients(tensors)
    _short_kv_backward(*_contiguous_last_dim(doutput), *tensors, *gradients, ctx.causal)
    return *gradients, None


def _flash_setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)  # nothing differentiates the log sums: no zeros for their gradient
    ctx.save_for_backward(*inputs, *output)


def _flash_autograd(ctx: Any, doutput: Tensor, _: None) -> tuple[Tensor, ...]:
    tensors = ctx.saved_tensors
    gradients = _empty_gradients(tensors[:3])
    _flash_backward(*_contiguous_last_dim(doutput), *tensors, *gradients)
    return tuple(gradients)


_short_kv_forward.register_autograd(_short_kv_autograd, setup_context=_short_kv_setup_context)
_flash_forward.register_autograd(_flash_autograd, setup_context=_flash_setup_context)


def _count_flops(query: torch.Size, key: torch.Size, num_products: int) -> int:
    """Return the operations as PyTorch counts its attention: masked scores included, repeated ones not."""
    batch, num_queries, num_heads, width = query
    return num_products * 2 * batch * num_heads * num_queries * key[1] * width


@register_flop_formula([torch.ops.sdxl_lora.few_keys, torch.ops.sdxl_lora.flash])
def _count_attention(query: torch.Size, key: torch.Size, *_: Any, **kwargs: Any) -> int:
    return _count_flops(query, key, 2)


@register_flop_formula([torch.ops.sdxl_lora.few_keys_gradient, torch.ops.sdxl_lora.flash_gradient])
def _count_gradient(doutput: torch.Size, query: torch.Size, key: torch.Size, *_: Any, **kwargs: Any) -> int:
    return _count_flops(query, key, 5)
