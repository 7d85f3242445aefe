"""CUDA graphs: a function's GPU kernels, captured once for each shape of input and replayed without Python.

Unlike `torch.cuda.make_graphed_callables`, a callable here takes several shapes, whose graphs share a memory
pool.
"""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, Generic, Protocol, Self, TypeVar

import torch
from torch import Tensor

_WARMUP_CALLS = 3  # cuBLAS and cuDNN allocate and choose kernels in these; a capture allows neither


class _Tensors(Protocol):
    """Inputs that consist of tensors."""

    def tensors(self) -> list[Tensor]: ...

    def to(self, device: torch.device) -> Self:
        """Return a copy on `device`, which replays overwrite."""
        ...


Inputs = TypeVar("Inputs", bound=_Tensors)
_Output = TypeVar("_Output")


class GraphedCallable(Generic[Inputs, _Output]):
    """A function whose first call with inputs of some shapes captures a CUDA graph, which later calls replay.

    The function must run the same kernels on the same addresses each time: it may not wait for the GPU,
    branch on a tensor's value, or draw random numbers.
    """

    def __init__(self, function: Callable[[Inputs], _Output], device: torch.device) -> None:
        self._function = function
        self._device = device
        self._pool: Any = None
        self._graphs: dict[tuple[torch.Size, ...], tuple[Inputs, torch.cuda.CUDAGraph, _Output]] = {}

    def __call__(self, inputs: Inputs) -> _Output:
        """Replay the graph for these shapes, after capturing it if they are new."""
        if not self.has(inputs):
            self.capture(inputs)
        return self.replay(inputs)

    def has(self, inputs: Inputs) -> bool:
        """Return whether a graph for inputs of these shapes was captured."""
        return _input_shapes(inputs) in self._graphs

    def capture(self, *several: Inputs) -> None:
        """Call the function a few times with each input and drop the results, then capture each call.

        All graphs share one memory pool, since only one is replayed at a time. Pass the largest inputs first:
        the graphs of the others then fit into the memory that theirs took.
        """
        # The graphs' input buffers: a graph reads the addresses that it was captured with.
        statics = [inputs.to(self._device) for inputs in several]
        # All warm-up calls come before the first capture, since a graph keeps its memory: calls could not use
        # it.
        stream = _warmup_stream(self._device)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for static in statics:
                for _ in range(_WARMUP_CALLS):
                    self._function(static)
        torch.cuda.current_stream().wait_stream(stream)
        for static in statics:
            graph = torch.cuda.CUDAGraph()
            with _exclusive_capture(), torch.cuda.graph(graph, pool=self._pool):
                output = self._function(static)
            self._pool = graph.pool()
            self._graphs[_input_shapes(static)] = (static, graph, output)

    def replay(self, inputs: Inputs) -> _Output:
        """Run the graph on `inputs`. The next replay overwrites the result."""
        static, graph, output = self._graphs[_input_shapes(inputs)]
        for buffer, tensor in zip(static.tensors(), inputs.tensors(), strict=True):
            buffer.copy_(tensor)
        graph.replay()
        return output


@cache
def _warmup_stream(device: torch.device) -> torch.cuda.Stream:
    """Return one stream for all warm-up calls: cuBLAS keeps 32 MiB for each stream that it has ever used."""
    return torch.cuda.Stream(device)


@contextmanager
def _exclusive_capture() -> Iterator[None]:
    """Disable the garbage collector: if it destroys GPU objects, such as an older graph, a capture fails."""
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _input_shapes(inputs: _Tensors) -> tuple[torch.Size, ...]:
    return tuple(tensor.shape for tensor in inputs.tensors())
