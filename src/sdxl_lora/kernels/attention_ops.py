"""Scaled dot-product attention by kernels of our own, as operators that PyTorch can differentiate.

Both repeat to the bit. Gradients lie in memory beside each other as their tensors do, so that projections
which were merged find theirs merged too. Knows no model and no other kernels.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

_MAX_KEYS = 128  # whose scores with a tile of queries a program can hold
_HEAD_DIMS = (16, 32, 64)  # of a head: what tensor cores take and a program can hold
_MIN_CAPABILITY = (8, 0)  # of GPUs from Ampere on; before, Triton has no tensor cores


def supports_triton(device: torch.device) -> bool:
    """Whether a device can run these kernels: a GPU, whose place `meta` takes in forecasts."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= _MIN_CAPABILITY
    return device.type == "meta"


def supports_short_kv(query: Tensor, key: Tensor) -> bool:
    """Whether `short_kv_attention` takes these."""
    return key.shape[1] <= _MAX_KEYS and query.shape[-1] in _HEAD_DIMS and supports_triton(query.device)


def short_kv_attention(query: Tensor, key: Tensor, value: Tensor, causal: bool = False) -> Tensor:
    """softmax(Q K^T / sqrt(D)) V where there are few keys, as to a caption's tokens.

    A row of scores is a part of one tile, so that nothing is kept for the gradient but what was given: the
    gradient computes the softmax anew, and the sums that it needs (Dao 2022, arXiv:2205.14135, appendix B.2)
    from that instead of from the output.

    Args:
        query: (B, L, H, D).
        key: (B, S, H, D), S <= 128.
        value: shaped as `key`.
        causal: a query sees no key of a higher number.

    Returns:
        (B, L, H, D).
    """
    return _short_kv_forward(*_contiguous_last_dim(query, key, value), causal)


def flash_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """softmax(Q K^T / sqrt(D)) V over tiles of keys (Dao 2023, arXiv:2307.08691).

    The gradient is two kernels, one for keys and values and one for queries, of which each computes the
    scores by itself: seven products where others take five, but none has to wait for another's sums.

    Args:
        query: (B, L, H, D).
        key: (B, S, H, D).
        value: shaped as `key`.

    Returns:
        (B, L, H, D).

    Raises:
        RuntimeError: the heads' width is not one that it takes, or the GPU is none that it takes.
    """
    if query.shape[-1] not in _HEAD_DIMS:
        raise RuntimeError(
            f"it takes heads of width {', '.join(map(str, _HEAD_DIMS))}, not {query.shape[-1]}"
        )
    if not supports_triton(query.device):
        raise RuntimeError(
            f"it needs an NVIDIA GPU of compute capability {'.'.join(map(str, _MIN_CAPABILITY))}"
        )
    return _flash_forward(*_contiguous_last_dim(query, key, value))[0]


def _contiguous_last_dim(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors, copied where a row's numbers are no neighbours in memory."""
    return tuple(tensor if tensor.stride(-1) == 1 else tensor.contiguous() for tensor in tensors)


# Triton is imported where it runs: PyTorch's builds for CPUs come without it.


@torch.library.custom_op("sdxl_lora::few_keys", mutates_args=())
def _short_kv_forward(query: Tensor, key: Tensor, value: Tensor, causal: bool) -> Tensor:
    from sdxl_lora.kernels.triton import short_kv_attention

    return short_kv_attention.launch_short_kv_forward(query, key, value, causal)


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
    """The output, and the logarithm to base 2 of each row's sum of exponentials, (B, H, L)."""
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
def _(query: Tensor, key: Tensor, value: Tensor, causal: bool) -> Tensor:
    return query.new_empty(query.shape)


@_flash_forward.register_fake
def _(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    batch, num_queries, num_heads, _ = query.shape
    return query.new_empty(query.shape), query.new_empty(batch, num_heads, num_queries, dtype=torch.float32)


def _empty_gradients(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Room for gradients of tensors (B, L, H, D): in one block, (B, L, n, H, D), for n of the same length.

    Their order in it is the tensors' own in memory.
    """
    gradients: dict[int, Tensor] = {}
    for length in {tensor.shape[1] for tensor in tensors}:
        places = [place for place, tensor in enumerate(tensors) if tensor.shape[1] == length]
        places.sort(key=lambda place: tensors[place].storage_offset())
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
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs, *output)


def _flash_autograd(ctx: Any, doutput: Tensor, _: None) -> tuple[Tensor, ...]:
    tensors = ctx.saved_tensors
    gradients = _empty_gradients(tensors[:3])
    _flash_backward(*_contiguous_last_dim(doutput), *tensors, *gradients)
    return tuple(gradients)


_short_kv_forward.register_autograd(_short_kv_autograd, setup_context=_short_kv_setup_context)
_flash_forward.register_autograd(_flash_autograd, setup_context=_flash_setup_context)


def _count_flops(query: torch.Size, key: torch.Size, num_products: int) -> int:
    """As PyTorch counts those of its own attention: with masked halves, without what is computed twice."""
    batch, num_queries, num_heads, width = query
    return num_products * 2 * batch * num_heads * num_queries * key[1] * width


@register_flop_formula([torch.ops.sdxl_lora.few_keys, torch.ops.sdxl_lora.flash])
def _count_attention(query: torch.Size, key: torch.Size, *_: Any, **kwargs: Any) -> int:
    return _count_flops(query, key, 2)


@register_flop_formula([torch.ops.sdxl_lora.few_keys_gradient, torch.ops.sdxl_lora.flash_gradient])
def _count_gradient(doutput: torch.Size, query: torch.Size, key: torch.Size, *_: Any, **kwargs: Any) -> int:
    return _count_flops(query, key, 5)
