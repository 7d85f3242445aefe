"""One training step: forward and backward of each micro-batch, then one update of all adapters.

    accumulate(batch)   copies the batch to the GPU and replays the captured forward and backward pass
    update(rate)        sums over processes, clips, moves the fp32 masters, rounds them into the weights

The CPU waits for the GPU once per step, in `update`. Independent of diffusion and SDXL: the caller passes a
loss and parameters.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic

import torch
from torch import Tensor
from torch.nn import Parameter

from sdxl_lora.config import TrainingConfig
from sdxl_lora.kernels.cuda_graph import GraphedCallable, Inputs
from sdxl_lora.runtime.distributed import all_reduce_sum, distributed_state
from sdxl_lora.training.flat_parameters import FlatParameters
from sdxl_lora.training.grad_scaler import GradScaler
from sdxl_lora.training.optimizers import OPTIMIZERS


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters that share a learning rate."""

    parameters: Sequence[Parameter]
    peak_learning_rate: float


@dataclass(frozen=True)
class StepResult:
    """Metrics of a step."""

    loss: float
    """Mean over the step's micro-batches, of all processes."""
    grad_norm: float
    """Euclidean norm of all gradients before clipping; infinite or NaN if the update was skipped."""
    loss_scale: float
    """Factor of the loss against underflow of fp16 gradients; 1 in other precisions."""
    stop: bool
    """Whether any process asked to stop."""


class TrainStep(Generic[Inputs]):
    """Minimises a loss over parameters: accumulates any number of micro-batches, then updates.

    Meanwhile the parameters hold values in `dtype`; `finish` gives them their fp32 values.
    """

    def __init__(
        self,
        loss: Callable[[Inputs], Tensor],
        groups: Sequence[ParameterGroup],
        config: TrainingConfig,
        dtype: torch.dtype,
        use_graph: bool,
    ) -> None:
        """Replace the parameters' storage by flat tensors.

        Args:
            loss: mean over a micro-batch, a scalar with a gradient for every parameter.
            dtype: of the arithmetic; fp16 has its loss scaled.
            use_graph: replay forward and backward as a CUDA graph; `GraphedCallable` says what `loss` may do.
        """
        self._loss = loss
        self._config = config
        self._flat = FlatParameters([group.parameters for group in groups], dtype)
        masters = [
            {"params": [master], "peak_learning_rate": group.peak_learning_rate}
            for master, group in zip(self._flat.masters, groups, strict=True)
        ]
        self._optimizer = OPTIMIZERS[config.optimizer].build(masters, config)
        device = self._flat.gradient.device
        self._device = device
        self._grad_scaler = GradScaler(device, enabled=dtype == torch.float16)
        self._micro_batches = 0
        self._graph = GraphedCallable(self._forward_and_backward, device) if use_graph else None
        decay = config.ema_decay
        self._moving_average = _MovingAverage(self._flat.master, decay) if decay else None
        self._updates = 0  # fewer than steps where fp16 overflowed

    def accumulate(self, inputs: Inputs) -> None:
        """Add the gradient of a micro-batch; on a GPU return before it is computed."""
        self._micro_batches += 1
        if self._graph is None:
            self._forward_and_backward(inputs.to(self._device))
            return
        self.capture([inputs])
        self._graph.replay(inputs)

    def capture(self, batches: Iterable[Inputs]) -> None:
        """Capture a graph for batches of these shapes, the largest first; do nothing if graphs are not used.

        Called with all shapes before the first step, the graphs share the memory of the largest one. Other
        shapes are captured when `accumulate` first meets them.
        """
        if self._graph is None:
            return
        unknown = [inputs for inputs in batches if not self._graph.has(inputs)]
        if unknown:
            # A capture runs the function on these batches to warm up, which adds their gradients. Undone in
            # place, as the graph writes to this buffer's address.
            before = self._flat.reduce_buffer.clone()
            self._graph.capture(*unknown)
            self._flat.reduce_buffer.copy_(before)

    def _forward_and_backward(self, inputs: Inputs) -> None:
        """Add the batch's gradient and loss to the flat buffer.

        Captured as a graph: the kernels must be the same ones on the same addresses each time. So it changes
        tensors in place, reads the loss scale from the GPU, and returns nothing that a caller could wait for.
        """
        loss = self._loss(inputs)
        # grad() and not backward(), which would keep a second gradient in each of the parameters.
        gradients = torch.autograd.grad(loss * self._grad_scaler.tensor, self._flat.parameters)
        self._flat.gradient += torch.cat([gradient.flatten() for gradient in gradients])
        self._flat.loss += loss.detach()

    def gradients(self) -> Sequence[Tensor]:
        """Return the accumulated gradient of each trainable parameter, times the loss scale; flat views."""
        parameters = self._flat.parameters
        return self._flat.gradient.split([parameter.numel() for parameter in parameters])

    @torch.no_grad()
    def update(self, learning_rate_factor: float, stop: bool = False) -> StepResult:
        """Move the weights along the clipped mean gradient of all processes' micro-batches.

        A gradient that is not finite leaves the weights unchanged, and halves fp16's loss scale.

        Args:
            learning_rate_factor: share of each group's peak learning rate.
            stop: ask all processes to stop after this step. Summed in the gradients' all-reduce, it reaches
                them in the same step without another communication.
        """
        gradient = self._flat.gradient
        micro_batches = self._micro_batches * distributed_state().num_processes
        self._flat.stop_votes.fill_(stop)
        all_reduce_sum(self._flat.reduce_buffer)
        scalars = torch.stack([self._flat.loss, gradient.norm(), self._flat.stop_votes])
        loss, scaled_norm, votes = scalars.tolist()  # the step's only wait for the GPU
        factor = 1 / (self._grad_scaler.value * micro_batches)
        norm = scaled_norm * factor
        result = StepResult(loss / micro_batches, norm, self._grad_scaler.value, votes > 0)
        if math.isfinite(norm):
            # Unscaling, averaging and clipping (with PyTorch's epsilon of 1e-6) in one kernel.
            gradient.mul_(factor * min(1.0, self._config.max_grad_norm / (norm + 1e-6)))
            for group in self._optimizer.param_groups:
                group["lr"] = learning_rate_factor * group["peak_learning_rate"]
            self._optimizer.step()
            self._flat.cast_master()
            if self._moving_average is not None:
                self._moving_average.update(self._updates)
            self._updates += 1
        self._grad_scaler.update(math.isfinite(norm))
        self._flat.reduce_buffer.zero_()
        self._micro_batches = 0
        return result

    def freeze_groups_from(self, num_groups: int, loss: Callable[[Inputs], Tensor]) -> None:
        """Train the first groups alone from here on, with another loss; to be called between two steps.

        The other parameters keep their present values, also in `finish`: they get no moving average.
        """
        assert self._micro_batches == 0, "gradients of a step are accumulated"
        self._loss = loss
        self._flat.freeze_groups_from(num_groups)
        if self._moving_average is not None:
            self._moving_average.settle(self._flat.gradient.numel())
        if self._graph is not None:
            # Present graphs hold the old loss and the old buffer. Dropping them frees their memory.
            self._graph = GraphedCallable(self._forward_and_backward, self._device)

    def state_dict(self) -> dict[str, Tensor]:
        """Return all that the next step depends on, except its batches. Not copies: a step changes them."""
        state = {"master": self._flat.master, **self._grad_scaler.state_dict()}
        state["updates"] = torch.tensor(self._updates)
        if self._moving_average is not None:
            state["average"] = self._moving_average.value
        for number, entries in self._optimizer.state_dict()["state"].items():
            for name, value in _flatten_state(entries):
                state[f"optimizer.{number}.{name}"] = torch.as_tensor(value)
        return state

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue from the state of a TrainStep over equal groups; no group may be frozen yet.

        Copies in place, as a captured graph knows the weights and the loss scale by their addresses.
        """
        self._flat.master.copy_(state["master"])
        self._flat.cast_master()
        self._grad_scaler.load_state_dict(state)
        self._updates = int(state["updates"])
        if self._moving_average is not None:
            self._moving_average.value.copy_(state["average"])
        moments: dict[int, dict[str, Tensor | int]] = {}
        for key, value in state.items():
            kind, _, rest = key.partition(".")
            if kind == "optimizer":
                number, _, name = rest.partition(".")
                # bitsandbytes counts its steps in a Python int, torch in an fp32 tensor.
                is_count = value.dtype == torch.int64
                moments.setdefault(int(number), {})[name] = int(value) if is_count else value
        groups = self._optimizer.state_dict()["param_groups"]
        self._optimizer.load_state_dict({"state": moments, "param_groups": groups})

    def finish(self) -> None:
        """Give the parameters their values in fp32: the last ones, or their moving average."""
        average = self._moving_average
        self._flat.view_into(self._flat.master if average is None else average.value)


class _MovingAverage:
    """Exponential moving average of a tensor. Early steps use a lower decay, to forget the initial values."""

    def __init__(self, tensor: Tensor, decay: float) -> None:
        self._tensor = tensor
        self._decay = decay
        self.value = tensor.clone()

    def update(self, step: int) -> None:
        """Move the average towards the tensor after update `step`, counted from 0."""
        self.value.lerp_(self._tensor, 1 - min(self._decay, (step + 1) / (step + 10)))

    def settle(self, start: int) -> None:
        """Set the average of the elements from `start` on to their present values."""
        self.value[start:] = self._tensor[start:]


def _flatten_state(entries: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield the leaves of a nested mapping; bitsandbytes keeps its tensors in one to hide them from FSDP."""
    for name, value in entries.items():
        if isinstance(value, Mapping):
            yield from _flatten_state(value)
        else:
            yield name, value
