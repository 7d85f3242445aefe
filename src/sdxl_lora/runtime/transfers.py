"""Tensors on their way between the CPU and a GPU, which goes on working meanwhile."""

from collections.abc import Callable

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on `device`. On a GPU returns before it is there.

    From memory that can be swapped out, CUDA would copy only once the GPU has nothing else to do.
    """
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)


def copy_to_host_async(*tensors: Tensor) -> Callable[[], tuple[Tensor, ...]]:
    """Begins to copy tensors to the CPU; what it returns waits for them and gives them.

    `Tensor.cpu` at that later time would also wait for all work that the GPU has been given meanwhile.
    """
    copies = tuple(tensor.to("cpu", non_blocking=True) for tensor in tensors)  # to pinned memory, from a GPU
    if not tensors[0].is_cuda:
        return lambda: copies
    arrived = torch.cuda.Event()
    arrived.record(torch.cuda.current_stream(tensors[0].device))

    def wait() -> tuple[Tensor, ...]:
        arrived.synchronize()
        return copies

    return wait
