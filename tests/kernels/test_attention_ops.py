"""The kernels for attention against plain arithmetic in float64."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from sdxl_lora.config import AttentionBackend
from sdxl_lora.kernels.attention import attend
from sdxl_lora.kernels.attention_ops import (
    _empty_gradients,
    flash_attention,
    short_kv_attention,
    supports_short_kv,
)
from sdxl_lora.memory.trace import MemoryTrace
from sdxl_lora.runtime.rng import keyed_generator
from tests.support.interpreter import large, no_bf16_products
from tests.support.traced import allocated_sizes

META = torch.device("meta")
TOLERANCES = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}
DTYPES = [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=no_bf16_products)]
FEW = [pytest.param((3, 1024, 77, 2, 64), marks=large), (2, 600, 128, 1, 32), (1, 33, 1, 4, 64)]
CAUSAL = [(2, 77, 77, 3, 64), (1, 5, 5, 2, 16)]
MANY = [
    *(pytest.param(shape, marks=large) for shape in ((1, 1024, 1024, 2, 64), (2, 988, 988, 1, 64))),
    *((1, 128, 128, 1, 64), (1, 200, 333, 3, 32), (1, 7, 7, 1, 16)),
]


def draws(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """Query, key, value and the output's gradient; those of equal length are parts of one projection."""
    batch, queries, keys, heads, width = shape
    merged = [(queries, 3)] if queries == keys else [(queries, 1), (keys, 2)]
    parts = [
        part
        for length, count in [*merged, (queries, 1)]
        for part in torch.randn(
            batch, length, count * heads * width, generator=keyed_generator(length, count)
        )
        .to(device, dtype)
        .chunk(count, dim=-1)
    ]
    return [part.unflatten(-1, (heads, width)) for part in parts]


def passes(attention: Callable[..., Tensor], tensors: list[Tensor]) -> list[Tensor]:
    """The output and the gradients of query, key and value."""
    inputs = [tensor.detach().requires_grad_() for tensor in tensors[:3]]
    output = attention(*inputs)
    return [output.detach(), *torch.autograd.grad(output, inputs, tensors[3])]


def oracle(query: Tensor, key: Tensor, value: Tensor, causal: bool = False) -> Tensor:
    scores = torch.einsum("blhd,bshd->bhls", query, key) / query.shape[-1] ** 0.5
    if causal:
        scores = scores.masked_fill(torch.ones(scores.shape[-2:]).triu(1).bool(), -torch.inf)
    return torch.einsum("bhls,bshd->blhd", scores.softmax(-1), value)


def assert_right(
    attention: Callable[..., Tensor],
    exact: Callable[..., Tensor],
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    tensors = draws(shape, dtype, device)
    expected = passes(exact, [tensor.double().cpu() for tensor in tensors])
    for ours, theirs in zip(passes(attention, tensors), expected, strict=True):
        assert ours.dtype == dtype
        error = (ours.double().cpu() - theirs).norm()
        assert float(error) <= TOLERANCES[dtype] * max(float(theirs.norm()), 1e-3)  # of one key, dQ = dK = 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", FEW)
def test_attention_to_few_keys(
    kernel_device: torch.device, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    assert_right(short_kv_attention, oracle, shape, dtype, kernel_device)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", CAUSAL)
def test_causal_attention_to_few_keys(
    kernel_device: torch.device, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    assert_right(
        partial(short_kv_attention, causal=True), partial(oracle, causal=True), shape, dtype, kernel_device
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", MANY)
def test_flash_attention(kernel_device: torch.device, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    assert_right(flash_attention, oracle, shape, dtype, kernel_device)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("attention", "shape"),
    [(short_kv_attention, (3, 4096, 77, 10, 64)), (flash_attention, (3, 1024, 1024, 20, 64))],
)
def test_results_repeat_to_the_bit(attention: Callable[..., Tensor], shape: tuple[int, ...]) -> None:
    tensors = draws(shape, torch.half, torch.device("cuda"))
    first, second = passes(attention, tensors), passes(attention, tensors)
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


@pytest.mark.parametrize("attention", [short_kv_attention, flash_attention])
def test_tensors_may_lie_as_they_like(kernel_device: torch.device, attention: Callable[..., Tensor]) -> None:
    """Expanded, or with another dimension than the last as the fastest."""
    tensors = draws((1, 64, 64, 2, 32), torch.half, kernel_device)
    tensors[3] = torch.ones_like(tensors[3])
    plain = passes(attention, tensors)
    expanded = passes(attention, [*tensors[:3], tensors[3].new_ones(()).expand(tensors[3].shape)])
    turned = passes(attention, [tensor.mT.contiguous().mT for tensor in tensors])
    for expected, first, second in zip(plain, expanded, turned, strict=True):
        assert torch.equal(first, expected)
        assert torch.equal(second, expected)


def test_captions_have_their_kernel_whatever_the_backend(kernel_device: torch.device) -> None:
    query, key, value, _ = draws((1, 256, 77, 2, 64), torch.half, kernel_device)
    expected = short_kv_attention(query, key, value)
    backends: tuple[AttentionBackend, ...] = ("sdpa", "triton", "efficient")
    for backend in backends:
        assert torch.equal(attend(query, key, value, backend), expected)
    assert not torch.equal(attend(query, key, value, "math"), expected)


def test_kernel_for_few_keys_is_for_gpus_few_keys_and_narrow_heads() -> None:
    def suits(keys: int, width: int, device: str) -> bool:
        tensor = torch.empty(1, keys, 2, width, device=device)
        return supports_short_kv(tensor, tensor)

    assert suits(128, 64, "meta")
    assert not suits(129, 64, "meta")
    assert not suits(77, 48, "meta")
    assert not suits(77, 128, "meta")
    assert not suits(77, 64, "cpu")


def test_flash_attention_says_what_it_takes() -> None:
    with pytest.raises(RuntimeError, match="head dimensions 16, 32, 64, not 80"):
        flash_attention(*torch.empty(3, 1, 8, 1, 80))
    with pytest.raises(RuntimeError, match=r"NVIDIA GPU of compute capability 8\.0"):
        flash_attention(*torch.empty(3, 1, 8, 1, 64))


def test_gradients_lie_as_their_tensors_do() -> None:
    key, value, query = torch.empty(2, 5, 3 * 32).unflatten(-1, (3, 2, 16)).unbind(2)
    dquery, dkey, dvalue = _empty_gradients([query, key, value])
    assert dkey.untyped_storage()._cdata == dquery.untyped_storage()._cdata
    assert [t.storage_offset() for t in (dkey, dvalue, dquery)] == [0, 32, 64]
    assert dkey.shape == (2, 5, 2, 16)
    dlong, dkey, dvalue = _empty_gradients([torch.empty(2, 9, 2, 16), key, value])
    assert dlong.is_contiguous()
    assert dkey.stride() == dvalue.stride() == (5 * 64, 64, 16, 1)


def test_attention_to_few_keys_keeps_its_output_alone_and_is_counted() -> None:
    query = torch.empty(2, 64, 3, 16, device=META, requires_grad=True)
    key = torch.empty(2, 7, 3, 16, device=META, requires_grad=True)
    with MemoryTrace(META) as trace, FlopCounterMode(display=False) as counter:
        output = attend(query, key, key, "flash")
        held = sum(allocated_sizes(trace.events))
        output.sum().backward()
    assert held == output.numel() * output.itemsize
    assert counter.get_total_flops() == trace.total_flops == 7 * 2 * (2 * 3 * 64 * 7 * 16)
