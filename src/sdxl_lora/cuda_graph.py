"""A function's GPU kernels, recorded once per shape of its input and replayed without Python or launches."""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Generic, Protocol, Self, TypeVar

import torch
from torch import Tensor

WARMUP_CALLS = 3  # cuBLAS and cuDNN allocate and choose in these; a recording may do neither


class Tensors(Protocol):
    """Anything made of tensors."""

    def tensors(self) -> list[Tensor]: ...

    def to(self, device: torch.device) -> Self: ...


Inputs = TypeVar("Inputs", bound=Tensors)


class Recorder(Generic[Inputs]):
    """Calls `function` by replaying what it did the first time that it met inputs of these shapes.

    The function must do the same kernels on the same addresses each time: it may not wait for the GPU, look
    at a value, or draw random numbers. What it returns is lost; it leaves its results in tensors of its own.
    """

    def __init__(self, function: Callable[[Inputs], None], device: torch.device) -> None:
        self._function = function
        self._device = device
        self._recordings: dict[tuple[torch.Size, ...], tuple[Inputs, torch.cuda.CUDAGraph]] = {}

    def knows(self, inputs: Inputs) -> bool:
        """Whether inputs of these shapes can be replayed."""
        return shapes(inputs) in self._recordings

    def record(self, inputs: Inputs) -> None:
        """Calls the function a few times for nothing, then records it without calling it."""
        static = inputs.to(self._device)
        stream = torch.cuda.Stream(self._device)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARMUP_CALLS):
                self._function(static)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with undisturbed(), torch.cuda.graph(graph):
            self._function(static)
        self._recordings[shapes(inputs)] = (static, graph)

    def replay(self, inputs: Inputs) -> None:
        """Does with `inputs` what was recorded."""
        static, graph = self._recordings[shapes(inputs)]
        for buffer, tensor in zip(static.tensors(), inputs.tensors(), strict=True):
            buffer.copy_(tensor)
        graph.replay()


@contextmanager
def undisturbed() -> Iterator[None]:
    """Keeps the garbage collector away: what it destroys on the GPU, an older graph say, ends a recording."""
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def shapes(inputs: Tensors) -> tuple[torch.Size, ...]:
    return tuple(tensor.shape for tensor in inputs.tensors())
