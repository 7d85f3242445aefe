"""One training step in few kernels: flat adapters, a scaled loss, one AdamW, and a CUDA graph of the rest.

Each adapter's weight is a view of one tensor in the precision that the step computes in. Its fp32 master and
the fp32 gradient are one tensor each, so scaling, clipping and AdamW are a handful of kernels and not
thousands. Knows neither diffusion nor SDXL: it is given a loss and parameters.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic

import bitsandbytes
import torch
from torch import Tensor
from torch.nn import Parameter

from sdxl_lora.config import TrainingConfig
from sdxl_lora.kernels.cuda_graph import GraphedCallable, Inputs
from sdxl_lora.runtime.distributed import all_reduce_sum, distributed_state
from sdxl_lora.training.flat_parameters import FlatParameters
from sdxl_lora.training.grad_scaler import GradScaler


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters that share a learning rate."""

    parameters: Sequence[Parameter]
    peak_learning_rate: float


@dataclass(frozen=True)
class StepResult:
    """What a step found out."""

    loss: float
    """Mean over the step's micro-batches, of all processes."""
    grad_norm: float
    """Euclidean norm of all gradients before clipping; infinite or NaN if the weights were left alone."""
    loss_scale: float
    """Factor that the loss had against underflow of fp16 gradients; 1 in other precisions."""
    stop: bool
    """Whether any process voted to stop."""


class TrainStep(Generic[Inputs]):
    """Minimises `loss` over parameters: any number of micro-batches accumulated, then an update.

    While it works the parameters' values are in `dtype`; `finish` gives them their fp32 values.
    """

    def __init__(
        self,
        loss: Callable[[Inputs], Tensor],
        groups: Sequence[ParameterGroup],
        config: TrainingConfig,
        dtype: torch.dtype,
        recorded: bool,
    ) -> None:
        """Takes the parameters over.

        Args:
            loss: mean over a micro-batch, a scalar with a gradient for every parameter.
            dtype: of the arithmetic; fp16 has its loss scaled.
            recorded: replay forward and backward as a CUDA graph; `GraphedCallable` says what `loss` may do.
        """
        self._loss = loss
        self._config = config
        self._adapters = FlatParameters([group.parameters for group in groups], dtype)
        self._optimizer = make_optimizer(self._adapters.masters, groups, config)
        device = self._adapters.gradient.device
        self._device = device
        self._scale = GradScaler(device, enabled=dtype == torch.float16)
        self._micro_batches = 0
        self._recorder = GraphedCallable(self._forward_and_backward, device) if recorded else None
        decay = config.ema_decay
        self._average = _MovingAverage(self._adapters.master, decay) if decay else None
        self._updates = 0

    def accumulate(self, inputs: Inputs) -> None:
        """Adds the gradient of a micro-batch; on a GPU returns before it is computed."""
        self._micro_batches += 1
        if self._recorder is None:
            self._forward_and_backward(inputs.to(self._device))
            return
        self.capture([inputs])
        self._recorder.replay(inputs)

    def capture(self, several: Iterable[Inputs]) -> None:
        """Records steps for inputs of these shapes, the largest first, if steps are recorded at all.

        Without it, each is recorded when it is first met. All at once, they share the memory of the largest.
        """
        if self._recorder is None:
            return
        unknown = [inputs for inputs in several if not self._recorder.has(inputs)]
        if unknown:
            kept = self._adapters.reduce_buffer.clone()
            self._recorder.capture(*unknown)
            self._adapters.reduce_buffer.copy_(kept)

    def _forward_and_backward(self, inputs: Inputs) -> None:
        loss = self._loss(inputs)
        gradients = torch.autograd.grad(loss * self._scale.tensor, self._adapters.parameters)
        self._adapters.gradient += torch.cat([gradient.flatten() for gradient in gradients])
        self._adapters.loss += loss.detach()

    def gradients(self) -> Sequence[Tensor]:
        """What was accumulated for each parameter that is still trained, times the loss scale; flat views."""
        parameters = self._adapters.parameters
        return self._adapters.gradient.split([parameter.numel() for parameter in parameters])

    @torch.no_grad()
    def update(self, learning_rate_factor: float, stop: bool = False) -> StepResult:
        """Moves the weights along the mean gradient of what all processes have accumulated, clipped.

        A loss or gradient that is not finite leaves the weights alone; fp16's scale is halved for the next.

        Args:
            learning_rate_factor: share of each group's peak learning rate.
            stop: this process's vote to stop after this step. It travels with the gradients, so that all
                processes learn of it in the same step, for nothing.
        """
        gradient, micro_batches = (
            self._adapters.gradient,
            self._micro_batches * distributed_state().num_processes,
        )
        self._adapters.stop_votes.fill_(stop)
        all_reduce_sum(self._adapters.reduce_buffer)
        found = [self._adapters.loss, gradient.norm(), self._adapters.stop_votes]
        loss, scaled_norm, votes = torch.stack(found).tolist()  # the only wait
        factor = 1 / (self._scale.value * micro_batches)
        norm = scaled_norm * factor
        report = StepResult(loss / micro_batches, norm, self._scale.value, votes > 0)
        if math.isfinite(norm):
            gradient.mul_(factor * min(1.0, self._config.max_grad_norm / (norm + 1e-6)))
            for group in self._optimizer.param_groups:
                group["lr"] = learning_rate_factor * group["peak_learning_rate"]
            self._optimizer.step()
            self._adapters.cast_master()
            if self._average is not None:
                self._average.update(self._updates)
            self._updates += 1
        self._scale.update(math.isfinite(norm))
        self._adapters.reduce_buffer.zero_()
        self._micro_batches = 0
        return report

    def freeze_groups_from(self, num_groups: int, loss: Callable[[Inputs], Tensor]) -> None:
        """Goes on, from a step to the next, with the first groups alone and a loss of theirs.

        The other parameters keep the values that they have now, in `finish` too: no moving average of theirs.
        A recording is given up with its memory.
        """
        assert self._micro_batches == 0, "a step is under way"
        self._loss = loss
        self._adapters.freeze_groups_from(num_groups)
        if self._average is not None:
            self._average.settle(self._adapters.gradient.numel())
        if self._recorder is not None:
            self._recorder = GraphedCallable(self._forward_and_backward, self._device)

    def state_dict(self) -> dict[str, Tensor]:
        """All that the next step depends on beside its inputs. No copies: the next step changes them."""
        state = {"master": self._adapters.master, **self._scale.state_dict()}
        state["updates"] = torch.tensor(self._updates)
        if self._average is not None:
            state["average"] = self._average.value
        for number, entries in self._optimizer.state_dict()["state"].items():
            for name, value in _flatten_state(entries):
                state[f"optimizer.{number}.{name}"] = torch.as_tensor(value)
        return state

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Goes on from a state, of a TrainStep over equal groups that are all still trained.

        In place, since a recorded graph knows the weights and the loss scale by their addresses.
        """
        self._adapters.master.copy_(state["master"])
        self._adapters.cast_master()
        self._scale.load_state_dict(state)
        self._updates = int(state["updates"])
        if self._average is not None:
            self._average.value.copy_(state["average"])
        moments: dict[int, dict[str, Tensor | int]] = {}
        for key, value in state.items():
            kind, _, rest = key.partition(".")
            if kind == "optimizer":
                number, _, name = rest.partition(".")
                counts = value.dtype == torch.int64  # bitsandbytes counts its steps in an int
                moments.setdefault(int(number), {})[name] = int(value) if counts else value
        groups = self._optimizer.state_dict()["param_groups"]
        self._optimizer.load_state_dict({"state": moments, "param_groups": groups})

    def finish(self) -> None:
        """Gives the parameters their values in fp32: the last ones, or their moving average."""
        self._adapters.view_into(self._adapters.master if self._average is None else self._average.value)


class _MovingAverage:
    """Exponential moving average of a tensor, warmed up so that the start is soon forgotten."""

    def __init__(self, tensor: Tensor, decay: float) -> None:
        self._tensor = tensor
        self._decay = decay
        self.value = tensor.clone()

    def update(self, step: int) -> None:
        """Moves the average towards the tensor after `step`, counted from 0."""
        self.value.lerp_(self._tensor, 1 - min(self._decay, (step + 1) / (step + 10)))

    def settle(self, start: int) -> None:
        """Forgets the past of the elements from `start` on: they are their average until they move."""
        self.value[start:] = self._tensor[start:]


def _flatten_state(entries: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The leaves of a nested mapping by their own names: bitsandbytes hides its tensors from FSDP in one."""
    for name, value in entries.items():
        if isinstance(value, Mapping):
            yield from _flatten_state(value)
        else:
            yield name, value


def make_optimizer(
    masters: Sequence[Parameter], groups: Sequence[ParameterGroup], config: TrainingConfig
) -> torch.optim.Optimizer:
    """AdamW over the masters, with a peak learning rate each."""
    kind = bitsandbytes.optim.AdamW8bit if config.optimizer == "adamw_8bit" else torch.optim.AdamW
    options = [
        {"params": [master], "peak_learning_rate": group.peak_learning_rate}
        for master, group in zip(masters, groups, strict=True)
    ]
    return kind(options, betas=config.betas, weight_decay=config.weight_decay)
