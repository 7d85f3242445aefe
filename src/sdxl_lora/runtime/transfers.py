"""Asynchronous copies between the CPU and a GPU, which keeps computing meanwhile."""

from collections.abc import Callable

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Return the tensor on `device`. For a GPU, the copy is only queued when this returns.

    The source is pinned, because CUDA copies from pageable memory synchronously, after all queued work.
    """
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)


def copy_to_host_async(*tensors: Tensor) -> Callable[[], tuple[Tensor, ...]]:
    """Start copying tensors to the CPU; return a function that waits for the copies and returns them.

    Calling `Tensor.cpu` later instead would also wait for all work that was queued on the GPU meanwhile.
    """
    copies = tuple(tensor.to("cpu", non_blocking=True) for tensor in tensors)  # from a GPU: pinned memory
    if not tensors[0].is_cuda:
        return lambda: copies
    arrived = torch.cuda.Event()
    arrived.record(torch.cuda.current_stream(tensors[0].device))

    def wait() -> tuple[Tensor, ...]:
        arrived.synchronize()
        return copies

    return wait
