"""A function's GPU kernels, recorded once per shape of its input and replayed without Python or launches."""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, Generic, Protocol, Self, TypeVar

import torch
from torch import Tensor

_WARMUP_CALLS = 3  # cuBLAS and cuDNN allocate and choose in these; a recording may do neither


class _Tensors(Protocol):
    """Anything made of tensors."""

    def tensors(self) -> list[Tensor]: ...

    def to(self, device: torch.device) -> Self:
        """A copy on `device`, which a recording may overwrite."""
        ...


Inputs = TypeVar("Inputs", bound=_Tensors)
_Output = TypeVar("_Output")


class GraphedCallable(Generic[Inputs, _Output]):
    """Calls `function` by replaying what it did the first time that it met inputs of these shapes.

    The function must do the same kernels on the same addresses each time: it may not wait for the GPU, look
    at a value, or draw random numbers.
    """

    def __init__(self, function: Callable[[Inputs], _Output], device: torch.device) -> None:
        self._function = function
        self._device = device
        self._pool: Any = None
        self._recordings: dict[tuple[torch.Size, ...], tuple[Inputs, torch.cuda.CUDAGraph, _Output]] = {}

    def __call__(self, inputs: Inputs) -> _Output:
        """Replays, after a recording where these shapes are new."""
        if not self.has(inputs):
            self.capture(inputs)
        return self.replay(inputs)

    def has(self, inputs: Inputs) -> bool:
        """Whether inputs of these shapes can be replayed."""
        return _input_shapes(inputs) in self._recordings

    def capture(self, *several: Inputs) -> None:
        """Calls the function a few times with each for nothing, then records each without calling it.

        All recordings take their memory from one pool, as only one is replayed at a time. With the largest
        inputs first, the others find room in what these took; and all calls come before all recordings, as
        memory that a recording took is no longer there for calls.
        """
        statics = [inputs.to(self._device) for inputs in several]
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
            self._recordings[_input_shapes(static)] = (static, graph, output)

    def replay(self, inputs: Inputs) -> _Output:
        """Does with `inputs` what was recorded. Its result has its values until the next replay."""
        static, graph, output = self._recordings[_input_shapes(inputs)]
        for buffer, tensor in zip(static.tensors(), inputs.tensors(), strict=True):
            buffer.copy_(tensor)
        graph.replay()
        return output


@cache
def _warmup_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all recordings: cuBLAS keeps 32 MiB for every stream that it has ever served."""
    return torch.cuda.Stream(device)


@contextmanager
def _exclusive_capture() -> Iterator[None]:
    """Keeps the garbage collector away: what it destroys on the GPU, an older graph say, ends a recording."""
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
