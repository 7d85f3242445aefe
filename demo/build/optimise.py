"""Fast training of a small network on one GPU: flat buffers, a CUDA graph, averaged weights.

A step of a 10 M parameter network is limited by kernel launches, not by arithmetic. Therefore all parameters
are views of one tensor and all gradients views of another, so that clipping, AdamW and averaging take a few
kernels instead of thousands. Forward and backward are captured once as a CUDA graph and replayed. On a CPU
the same code runs eagerly. It depends on no network or data: `loss` reads tensors that `next_batch` fills in
place.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Budget:
    """Length and learning rate of a training; one section of params.yaml."""

    steps: int
    batch_size: int
    learning_rate: float
    """Peak: reached linearly over `warmup_steps`, followed by a cosine to a fiftieth."""
    warmup_steps: int
    weight_decay: float
    ema_decay: float
    """Share of the averaged weights kept at each step."""
    seed: int

    def learning_rate_at(self, step: int) -> float:
        warmup = min(1.0, (step + 1) / self.warmup_steps)
        cosine = 0.5 + 0.5 * math.cos(math.pi * step / self.steps)
        return self.learning_rate * warmup * (0.02 + 0.98 * cosine)


@dataclass(frozen=True)
class Report:
    step: int
    losses: list[float]
    """Mean of the values of `loss` over the steps since the last report."""


class FlatModel:
    """Modules whose parameters are views of one tensor in the compute dtype, with an fp32 master copy.

    4-D weights are in channels-last layout, as tensor cores need.
    """

    def __init__(self, modules: Sequence[nn.Module], device: torch.device, dtype: torch.dtype) -> None:
        self.modules = [module.to(device).train() for module in modules]
        self.parameters = [parameter for module in self.modules for parameter in module.parameters()]
        sizes = [-(-parameter.numel() // 8) * 8 for parameter in self.parameters]  # 16-byte aligned views
        self.offsets = [sum(sizes[:index]) for index in range(len(sizes))]
        self.weights = nn.Parameter(torch.zeros(sum(sizes), device=device))
        for parameter, view in zip(self.parameters, self.views(self.weights.data), strict=True):
            view.copy_(parameter.data)
        self.averaged = self.weights.data.clone()
        self.compute_weights = self.weights.data.to(dtype)
        self.compute_gradients = torch.zeros_like(self.compute_weights)
        for module in self.modules:
            module.to(dtype)
        for parameter, weight, gradient in zip(
            self.parameters, self.views(self.compute_weights), self.views(self.compute_gradients), strict=True
        ):
            parameter.data, parameter.grad = weight, gradient

    def views(self, flat: Tensor) -> list[Tensor]:
        """Return views of `flat` with the shapes of the parameters."""
        views = []
        for parameter, offset in zip(self.parameters, self.offsets, strict=True):
            piece = flat[offset : offset + parameter.numel()]
            if parameter.ndim == 4:
                out_channels, in_channels, height, width = parameter.shape
                views.append(piece.view(out_channels, height, width, in_channels).permute(0, 3, 1, 2))
            else:
                views.append(piece.view(parameter.shape))
        return views

    @torch.no_grad()
    def export(self, fresh: Sequence[nn.Module]) -> list[Any]:
        """Copy the averaged weights to new modules; return them frozen, in fp32 and evaluation mode."""
        targets = [parameter for module in fresh for parameter in module.parameters()]
        for target, average in zip(targets, self.views(self.averaged), strict=True):
            target.copy_(average.cpu())
        return [module.to(self.weights.device).eval().requires_grad_(False) for module in fresh]


def train(
    model: FlatModel,
    loss: Callable[[], Sequence[Tensor]],
    next_batch: Callable[[int], None],
    budget: Budget,
    report_every: int,
) -> Iterator[Report]:
    """Take `budget.steps` optimizer steps; yield the mean losses every `report_every` steps.

    Args:
        loss: reads the batch's tensors and returns scalars; the first is minimised, the others are reported.
        next_batch: fills the batch's tensors in place, given the step.
    """
    device = model.weights.device
    next_batch(0)
    losses = torch.zeros(len(loss()), device=device)

    def forward_backward() -> None:
        model.compute_gradients.zero_()
        values = loss()
        values[0].backward()
        losses.copy_(torch.stack([value.detach().float() for value in values]))

    replay = capture(forward_backward) if device.type == "cuda" else forward_backward
    optimizer = torch.optim.AdamW(
        [model.weights], betas=(0.9, 0.99), weight_decay=budget.weight_decay, fused=device.type == "cuda"
    )
    gradients = torch.zeros_like(model.weights)
    model.weights.grad = gradients
    total = torch.zeros_like(losses)
    for step in range(budget.steps):
        next_batch(step)
        replay()
        gradients.copy_(model.compute_gradients)
        gradients.mul_((1 / (gradients.norm() + 1e-6)).clamp(max=1.0))
        optimizer.param_groups[0]["lr"] = budget.learning_rate_at(step)
        optimizer.step()
        model.compute_weights.copy_(model.weights.data)
        # A short average at first, which excludes the random initial weights.
        model.averaged.lerp_(model.weights.data, 1 - min(budget.ema_decay, (1 + step) / (10 + step)))
        total += losses
        if (step + 1) % report_every == 0 or step + 1 == budget.steps:
            steps_since = (step % report_every) + 1
            means = (total / steps_since).tolist()
            if not all(math.isfinite(mean) for mean in means):
                raise FloatingPointError(f"loss is {means} at step {step}: lower the learning rate")
            yield Report(step + 1, means)
            total.zero_()


def capture(function: Callable[[], None]) -> Callable[[], None]:
    """Capture `function` as a CUDA graph, so that one call launches its hundreds of kernels."""
    side_stream = torch.cuda.Stream()
    side_stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side_stream):
        for _ in range(3):  # lazy initialisation, autotuning and compilation cannot be captured
            function()
    torch.cuda.current_stream().wait_stream(side_stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph.replay
