"""Scaled dot-product attention (Vaswani et al. 2017, arXiv:1706.03762, section 3.2.1), by various kernels.

Which is the fastest depends on GPU, precision and shapes, so `choose_attention` measures it. Knows no model.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import inf

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from sdxl_lora.config import Attention, AttentionBackend
from sdxl_lora.kernels.attention_ops import flash_attention, short_kv_attention, supports_short_kv
from sdxl_lora.runtime.rng import keyed_generator

_KERNELS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
_CANDIDATES: tuple[AttentionBackend, ...] = ("cudnn", "triton", "flash", "efficient", "xformers")
_TOLERANCE = 0.02  # relative error of outputs and gradients; bf16 alone makes 0.005
_REPEATS = 10
_TRITON_PREFERENCE = (
    1.05  # on `triton`: its gradients spare the merged projections a copy, 6 % of attention on an H100
)


@dataclass(frozen=True)
class AttentionShape:
    """The size of attentions that a model has `count` of."""

    batch: int
    queries: int
    keys: int
    heads: int
    width: int
    """Of a head, D."""
    count: int


def attend(query: Tensor, key: Tensor, value: Tensor, backend: AttentionBackend) -> Tensor:
    """softmax(Q K^T / sqrt(D)) V. To a caption's few tokens by a kernel for that, if a GPU can run it.

    Args:
        query: (B, L, H, D).
        key: (B, S, H, D).
        value: shaped as `key`.
        backend: whose kernels otherwise; `sdpa` leaves the choice to PyTorch, `math` means plain arithmetic
            always.

    Returns:
        (B, L, H, D).

    Raises:
        RuntimeError: the backend cannot run on this device, or with these shapes.
    """
    if backend != "math" and supports_short_kv(query, key):
        return short_kv_attention(query, key, value)
    if backend == "triton":
        return flash_attention(query, key, value)
    if backend == "xformers":
        from xformers.ops import memory_efficient_attention

        return memory_efficient_attention(query, key, value)
    query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    if backend == "sdpa":
        return scaled_dot_product_attention(query, key, value).transpose(1, 2)
    with sdpa_kernel(_KERNELS[backend]):
        return scaled_dot_product_attention(query, key, value).transpose(1, 2)


def choose_attention(
    asked: Attention, shapes: Sequence[AttentionShape], dtype: torch.dtype, device: torch.device
) -> AttentionBackend:
    """The backend asked for if it can serve; for `auto` the fastest that can.

    Fastest is the one that takes the least time on `device` for a forward and backward pass of all `shapes`.

    Raises:
        ValueError: the backend asked for cannot run here, or computes wrong numbers; says why.
    """
    if device.type == "meta":  # nothing to measure; all fused kernels keep the same
        return "math" if asked == "math" else "sdpa"
    candidates = _CANDIDATES if asked == "auto" else (asked,)
    if device.type != "cuda" and asked == "auto":
        return "sdpa"
    faults = {backend: unusable_because(backend, shapes, dtype, device) for backend in candidates}
    able = [backend for backend, reason in faults.items() if reason is None]
    if len(able) > 1:
        return fastest_backend(
            {backend: _time_milliseconds(shapes, dtype, device, backend) for backend in able}
        )
    if able:
        return able[0]
    if asked == "auto":
        return "sdpa"
    install = "install it with `pip install -e '.[xformers]'` (torch 2.10.0 exactly), or "
    raise ValueError(
        f"training.attention is {asked!r}, which cannot run here ({faults[asked]}): "
        f"{install if asked == 'xformers' else ''}set training.attention to auto"
    )


def fastest_backend(times: Mapping[AttentionBackend, float]) -> AttentionBackend:
    """The backend that takes the least time, with some grace for the one that saves time elsewhere."""
    least = min(times, key=times.__getitem__)
    return "triton" if times.get("triton", inf) <= _TRITON_PREFERENCE * times[least] else least


def default_attention(
    shapes: Sequence[AttentionShape], dtype: torch.dtype, device: torch.device
) -> AttentionBackend:
    """The backend that is usually the fastest of those that can serve, without a measurement.

    So the same machine always takes the same, and what it computes repeats to the bit.
    """
    if device.type != "cuda":
        return "sdpa"
    able = (backend for backend in _CANDIDATES if unusable_because(backend, shapes, dtype, device) is None)
    return next(able, "sdpa")


def unusable_because(
    backend: AttentionBackend, shapes: Sequence[AttentionShape], dtype: torch.dtype, device: torch.device
) -> str | None:
    """Why `backend` cannot serve, None if it can: it fails, or differs from plain arithmetic in fp32."""
    for shape in shapes:
        small = replace(shape, batch=1, heads=1)
        exact = forward_backward(random_qkv(small, torch.float32, device), "math")
        try:
            ours = forward_backward(random_qkv(small, dtype, device), backend)
        except (ImportError, NotImplementedError, RuntimeError) as error:
            return str(error).strip().partition("\n")[0]
        error_ = max(float((a.float() - b).norm() / b.norm()) for a, b in zip(ours, exact, strict=True))
        if not error_ < _TOLERANCE:
            return f"its numbers are off by {error_:.1%}"
    return None


def _time_milliseconds(
    shapes: Sequence[AttentionShape], dtype: torch.dtype, device: torch.device, backend: AttentionBackend
) -> float:
    """Time of a forward and backward pass of all `shapes` on a GPU."""
    total = 0.0
    for shape in shapes:
        run = partial(forward_backward, random_qkv(shape, dtype, device), backend)
        total += shape.count * _fastest_replay(run, device)
    return total


def _fastest_replay(function: Callable[[], object], device: torch.device) -> float:
    """Least time of the function's kernels, milliseconds, replayed as a graph to leave out their launches."""
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        function()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    times = []
    for _ in range(_REPEATS):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return min(times)


def random_qkv(shape: AttentionShape, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
    """Query, key, value and the output's gradient, standard normal."""
    lengths = (shape.queries, shape.keys, shape.keys, shape.queries)
    random = keyed_generator("attention")
    return tuple(
        torch.randn(shape.batch, length, shape.heads, shape.width, generator=random).to(device, dtype)
        for length in lengths
    )


def forward_backward(tensors: Sequence[Tensor], backend: AttentionBackend) -> tuple[Tensor, ...]:
    """The output and the gradients of query, key and value, from what `random_qkv` returns."""
    query, key, value = (tensor.detach().requires_grad_() for tensor in tensors[:3])
    output = attend(query, key, value, backend)
    return (output.detach(), *torch.autograd.grad(output, (query, key, value), tensors[3]))
