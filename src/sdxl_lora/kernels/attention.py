"""Scaled dot-product attention (Vaswani et al. 2017, arXiv:1706.03762, section 3.2.1), by various kernels.

Which one is fastest depends on GPU, precision and shapes, so `choose_attention` measures it. Knows no model.
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
_TOLERANCE = 0.02  # relative error of outputs and gradients; rounding to bf16 makes 0.005
_REPEATS = 10
_TRITON_PREFERENCE = 1.05
"""`triton` is chosen up to this factor of the least time. Its gradients save the merged projections a copy,
which takes 6 % of attention's time on an H100 and is not part of the measurement."""


@dataclass(frozen=True)
class AttentionShape:
    """The size of `count` attention layers of a model."""

    batch: int
    queries: int
    keys: int
    heads: int
    width: int
    """Width of a head, D."""
    count: int


def attend(query: Tensor, key: Tensor, value: Tensor, backend: AttentionBackend) -> Tensor:
    """Return softmax(Q K^T / sqrt(D)) V.

    Where a GPU can run it, `short_kv_attention` takes up to 128 keys, such as those of a caption.

    Args:
        query: (B, L, H, D).
        key: (B, S, H, D).
        value: shaped as `key`.
        backend: kernels to use where `short_kv_attention` does not run; `sdpa` leaves the choice to PyTorch.
            `math` is plain arithmetic for any number of keys.

    Returns:
        (B, L, H, D).

    Raises:
        RuntimeError: the backend cannot run on this device, or not with these shapes.
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
    """Return the backend asked for if it is usable; for `auto` the fastest that is.

    The fastest takes the least time on `device` for a forward and backward pass of all `shapes`.

    Raises:
        ValueError: the backend asked for cannot run here, or computes wrong numbers; says why.
    """
    if device.type == "meta":  # nothing to measure; all fused kernels keep the same tensors for the gradient
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
    install = (
        "install it with `pip install -e '.[xformers]'` (xformers 0.0.35 needs torch 2.10 or later, and "
        "libcudart.so.12, which `pip install nvidia-cuda-runtime-cu12` brings), or "
    )
    raise ValueError(
        f"training.attention is {asked!r}, which cannot run here ({faults[asked]}): "
        f"{install if asked == 'xformers' else ''}set training.attention to auto"
    )


def fastest_backend(times: Mapping[AttentionBackend, float]) -> AttentionBackend:
    """Return the backend that takes the least time, or `triton` if it is nearly as fast."""
    least = min(times, key=times.__getitem__)
    return "triton" if times.get("triton", inf) <= _TRITON_PREFERENCE * times[least] else least


def default_attention(
    shapes: Sequence[AttentionShape], dtype: torch.dtype, device: torch.device
) -> AttentionBackend:
    """Return the backend that is usually the fastest of the usable ones, without a measurement.

    Measured times vary. This choice does not, so results of one machine stay bit-identical.
    """
    if device.type != "cuda":
        return "sdpa"
    able = (backend for backend in _CANDIDATES if unusable_because(backend, shapes, dtype, device) is None)
    return next(able, "sdpa")


def unusable_because(
    backend: AttentionBackend, shapes: Sequence[AttentionShape], dtype: torch.dtype, device: torch.device
) -> str | None:
    """Return why `backend` fails, or differs from plain arithmetic in fp32; None if it is usable."""
    for shape in shapes:
        small = replace(shape, batch=1, heads=1)
        exact = forward_backward(random_qkv(small, torch.float32, device), "math")
        try:
            ours = forward_backward(random_qkv(small, dtype, device), backend)
        except (ImportError, NotImplementedError, RuntimeError) as error:
            return str(error).strip().partition("\n")[0]
        error_ = max(float((a.float() - b).norm() / b.norm()) for a, b in zip(ours, exact, strict=True))
        if not error_ < _TOLERANCE:  # also if it is NaN
            return f"its numbers are off by {error_:.1%}"
    return None


def _time_milliseconds(
    shapes: Sequence[AttentionShape], dtype: torch.dtype, device: torch.device, backend: AttentionBackend
) -> float:
    """Return the milliseconds of a forward and backward pass of all `shapes` on a GPU."""
    total = 0.0
    for shape in shapes:
        run = partial(forward_backward, random_qkv(shape, dtype, device), backend)
        total += shape.count * _fastest_replay(run, device)
    return total


def _fastest_replay(function: Callable[[], object], device: torch.device) -> float:
    """Return the least milliseconds of the function's kernels, replayed as a graph to leave out launches.

    The training step is replayed the same way, so launches cost it nothing.
    """
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        function()  # Triton compiles, and libraries allocate, in a first call; a capture allows neither
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
    """Return a query, key, value and gradient of the output, standard normal."""
    lengths = (shape.queries, shape.keys, shape.keys, shape.queries)
    random = keyed_generator("attention")
    return tuple(
        torch.randn(shape.batch, length, shape.heads, shape.width, generator=random).to(device, dtype)
        for length in lengths
    )


def forward_backward(tensors: Sequence[Tensor], backend: AttentionBackend) -> tuple[Tensor, ...]:
    """Return the output and the gradients of query, key and value, for tensors of `random_qkv`."""
    query, key, value = (tensor.detach().requires_grad_() for tensor in tensors[:3])
    output = attend(query, key, value, backend)
    return (output.detach(), *torch.autograd.grad(output, (query, key, value), tensors[3]))
