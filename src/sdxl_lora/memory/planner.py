"""The fastest way to train within a memory budget: size of micro-batches, and which blocks are checkpointed.

Chosen by forecast before any weight is loaded. Checkpointing costs repeated arithmetic. Each pass has a fixed
cost as well: small kernels, and large ones that a small micro-batch does not fill.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from math import ceil, inf
from typing import TypeVar

import torch

from sdxl_lora.config import LoraConfig, ModelConfig, TrainingConfig, divisors
from sdxl_lora.memory.trace import Event
from sdxl_lora.memory.training_forecast import MemoryForecast, forecast_training
from sdxl_lora.memory.training_trace import MetaTrainingRun, TrainingSpec, TrainingTrace
from sdxl_lora.models.architecture import read_architecture
from sdxl_lora.storage.atomic_io import GIB

_STEPS_A_GIB = 10  # resolution of the search for the smallest budget, and of what is proposed
_MAX_GIB = 1024
OPERATIONS_A_PASS = 1e13
"""Fixed cost of a pass, as the operations that take the same time: on an H100, three passes of one 1024 px
example took 198 ms and one pass of three 134 ms, of 44 TFLOP each."""
_Change = Callable[[TrainingSpec], TrainingSpec]
_SMALLER_SIDES = (112, 96, 80, 64, 48, 32)  # latents a side that a refusal may propose
_Choice = TypeVar("_Choice")


@dataclass(frozen=True)
class TrainingPlan:
    """The choices that training makes by memory and speed."""

    micro_batch_size: int
    """Examples of one forward and backward pass."""
    checkpointed: tuple[str, ...]
    """Units that compute their activations twice."""
    recomputed: float
    """Repeated operations, as a share of those of a step without checkpointing."""

    def applied_to(self, config: TrainingConfig) -> TrainingConfig:
        """Return `config` with the plan in place of `auto`; written into params.yaml, it gives this plan."""
        choices = {"micro_batch_size": self.micro_batch_size, "checkpointing": len(self.checkpointed)}
        return config.model_copy(update=choices)

    def numbers(self) -> dict[str, object]:
        """Return what a training's report says of the plan."""
        plan = {
            "micro_batch_size": self.micro_batch_size,
            "checkpointing": len(self.checkpointed),
            "recomputed": self.recomputed,
        }
        return {"plan": plan}


@dataclass(frozen=True)
class ForecastPlan(TrainingPlan):
    """A plan with its peak memory."""

    forecast: MemoryForecast

    def numbers(self) -> dict[str, object]:
        """Return what a training's report says of the plan and its memory, GiB."""
        return {**super().numbers(), "forecast_gib": self.forecast.gib()}


class Planner:
    """Plans for one training. Traces each micro-batch size once, when it is first needed: seconds."""

    def __init__(self, spec: TrainingSpec) -> None:
        self._spec = spec
        self._traces: dict[int, TrainingTrace] = {}
        """By micro-batch size."""
        self._unlimited: dict[tuple[int, int], MemoryForecast] = {}
        """Forecasts without a budget, by micro-batch size and number of checkpointed units."""

    def micro_batch_sizes(self) -> list[int]:
        """Return the sizes that the params allow, the largest first."""
        config = self._spec.config
        return (
            divisors(config.batch_size)[::-1]
            if config.micro_batch_size == "auto"
            else [config.micro_batch_size]
        )

    def fastest(self, budget: float) -> ForecastPlan | None:
        """Return the fastest plan that takes at most `budget` bytes; None if there is none."""
        plans: list[ForecastPlan] = []
        for size in self.micro_batch_sizes():
            plan = _first_success(self._counts(size), partial(self._plan, size, budget=budget))
            if plan is not None:
                plans.append(plan)
                if plan.recomputed == 0:
                    break  # a smaller size has as much arithmetic and more passes
        return min(plans, key=self._cost, default=None)

    def smallest(self) -> ForecastPlan:
        """Return the plan that takes the least memory.

        Its forecast is that of the smallest budget that suffices: PyTorch's allocator caches less near its
        limit than without one.

        Raises:
            RuntimeError: it takes more than 1 TiB.
        """
        size = self.micro_batch_sizes()[-1]
        count = self._counts(size)[-1]
        budgets = range(1, _MAX_GIB * _STEPS_A_GIB)
        plan = _first_success(budgets, lambda n: self._plan(size, count, n * GIB / _STEPS_A_GIB))
        if plan is None:
            raise RuntimeError(f"micro-batches of {size} examples take more than {_MAX_GIB} GiB")
        return plan

    def exact(self, plan: ForecastPlan, budget: float) -> ForecastPlan:
        """Return `plan` with the forecast of a step that really checkpoints: it has the pool's true gaps.

        If that exceeds the budget by gaps alone, the first forecast stays: PyTorch returns its cache first.
        """
        if not plan.checkpointed:
            return plan
        meta_run = MetaTrainingRun(self._spec, plan.checkpointed)
        try:
            step, preview = meta_run.step(plan.micro_batch_size), meta_run.preview()
            return replace(plan, forecast=forecast_training(step, preview, 0, budget))
        except MemoryError:
            return plan

    def _cost(self, plan: TrainingPlan) -> float:
        """Return the operations of a step, the fixed cost of its passes included."""
        passes = self._spec.config.batch_size // plan.micro_batch_size
        operations = self._trace(plan.micro_batch_size).flops * (1 + plan.recomputed)
        return passes * (operations + OPERATIONS_A_PASS)

    def _counts(self, size: int) -> Sequence[int]:
        """Return the numbers of checkpointed units that the params allow, ascending."""
        num_units = len(self._trace(size).units)
        match self._spec.config.checkpointing:
            case "auto":
                return range(num_units + 1)
            case "none":
                return [0]
            case "all":
                return [num_units]
            case count:
                return [min(count, num_units)]

    def _plan(self, size: int, count: int, budget: float) -> ForecastPlan | None:
        """Return the plan of `size` examples at once and `count` checkpointed units; None if too big."""
        trace = self._trace(size)
        chosen = trace.units[:count]
        # The forecast without a budget holds for every budget that it fits. Within a smaller one the
        # allocator may still succeed by returning its cache, which takes a forecast of its own.
        forecast = self._forecast(size, count)
        if forecast.total > budget:
            try:
                forecast = forecast_training(trace, self._preview, count, budget)
            except MemoryError:
                return None
        recomputed = sum(unit.flops for unit in chosen) / trace.flops
        return ForecastPlan(size, tuple(unit.name for unit in chosen), recomputed, forecast)

    def _forecast(self, size: int, count: int) -> MemoryForecast:
        """Return the forecast without a budget."""
        if (size, count) not in self._unlimited:
            self._unlimited[size, count] = forecast_training(self._trace(size), self._preview, count)
        return self._unlimited[size, count]

    def _trace(self, size: int) -> TrainingTrace:
        if size not in self._traces:
            self._traces[size] = self._meta_run.step(size)
        return self._traces[size]

    @cached_property
    def _meta_run(self) -> MetaTrainingRun:
        return MetaTrainingRun(self._spec)

    @cached_property
    def _preview(self) -> Sequence[Event]:
        return self._meta_run.preview()


def _first_success(
    choices: Sequence[_Choice], attempt: Callable[[_Choice], ForecastPlan | None]
) -> ForecastPlan | None:
    """Return the plan of the first choice for which `attempt` returns one, by bisection; None without one.

    Takes it that all choices after a successful one succeed. One more checkpointed unit can cost the
    allocator more in gaps than it frees, so this may miss a plan that is faster by less than 1 %.
    """
    found, low, high = None, 0, len(choices)
    while low < high:
        middle = (low + high) // 2
        plan = attempt(choices[middle])
        if plan is None:
            low = middle + 1
        else:
            found, high = plan, middle
    return found


def choose_plan(
    model: ModelConfig, lora: LoraConfig, config: TrainingConfig, latents: torch.Size, device: torch.device
) -> TrainingPlan:
    """Return the fastest plan within training.vram_gib, or without that key the fastest of all.

    Takes seconds and no weights. The plan is a `ForecastPlan`, except on a CPU without training.vram_gib.

    Args:
        model: the base model.
        lora: the adapter.
        config: the training.
        latents: shape of the largest example's, (1, 4, H/8, W/8).
        device: where training will run.

    Raises:
        ValueError: no plan fits; names changes of params with which one does.
    """
    spec = TrainingSpec(read_architecture(model), model.text_encoders != "frozen", lora, config, latents)
    planner = Planner(spec)
    if config.vram_gib is None and device.type == "cpu":
        return _plan_without_forecast(planner, config)
    budget = inf if config.vram_gib is None else config.vram_gib * GIB
    plan = planner.fastest(budget)
    if plan is None:
        raise ValueError(refusal(spec, planner.smallest()))
    return planner.exact(plan, budget)


def _plan_without_forecast(planner: Planner, config: TrainingConfig) -> TrainingPlan:
    """Return the plan for a CPU. Main memory is not forecast."""
    if config.checkpointing in ("auto", "none", 0):
        return TrainingPlan(planner.micro_batch_sizes()[0], (), 0.0)  # without a trace, which takes seconds
    plan = planner.fastest(inf)
    assert plan is not None, "every plan fits without a limit"
    return TrainingPlan(plan.micro_batch_size, plan.checkpointed, plan.recomputed)


def refusal(spec: TrainingSpec, smallest: ForecastPlan) -> str:
    """Return why no plan fits, and changes of params with which one does."""
    assert spec.config.vram_gib is not None, "only a limit is ever exceeded"
    remedies = [
        f"training.vram_gib {_needed_gib(smallest)}",
        *_alternatives(spec, spec.config.vram_gib * GIB),
    ]
    return f"{shortage(spec, smallest)}. Any one of these suffices: {'; '.join(remedies)}"


def shortage(spec: TrainingSpec, smallest: ForecastPlan) -> str:
    """Return why no plan fits."""
    return (
        f"training.vram_gib is {spec.config.vram_gib:g}, but training takes at least "
        f"{_needed_gib(smallest)} GiB (micro-batches of {smallest.micro_batch_size}, "
        f"{len(smallest.checkpointed)} blocks checkpointed)"
    )


def _needed_gib(plan: ForecastPlan) -> float:
    """Return a budget that suffices for a plan, GiB, rounded up."""
    return ceil(plan.forecast.total / GIB * _STEPS_A_GIB) / _STEPS_A_GIB


def _alternatives(spec: TrainingSpec, budget: float) -> Iterator[str]:
    """Yield changes of params with which training takes at most `budget` bytes."""
    for name, change in _changes(spec).items():
        if Planner(change(spec)).fastest(budget) is not None:
            yield name
    for side in _SMALLER_SIDES:
        if side < spec.latents[-1] and Planner(_with_side(spec, side)).fastest(budget) is not None:
            yield f"encoding.resolution {side * spec.shapes.pixels_per_latent}"
            return


def _changes(spec: TrainingSpec) -> dict[str, _Change]:
    """Return changes that lower memory, except a lower resolution, by what to write into params."""
    config = spec.config
    found: dict[str, _Change] = {}
    if (config.checkpointing, config.micro_batch_size) != ("auto", "auto"):
        name = "training.checkpointing auto and training.micro_batch_size auto"
        found[name] = partial(_with_training, checkpointing="auto", micro_batch_size="auto")
    if spec.trains_text_encoders:
        found["model.text_encoders frozen"] = partial(replace, trains_text_encoders=False)
    if config.quantization != "nf4":
        found["training.quantization nf4"] = partial(_with_training, quantization="nf4")
    if config.preview_every:
        found["training.preview_every null"] = partial(_with_training, preview_every=None)
    return found


def _with_training(spec: TrainingSpec, **update: object) -> TrainingSpec:
    """Return `spec` with these keys of the params section `training` changed."""
    return replace(spec, config=spec.config.model_copy(update=update))


def _with_side(spec: TrainingSpec, side: int) -> TrainingSpec:
    """Return `spec` on square images with latents of `side` x `side`."""
    return replace(spec, latents=torch.Size((*spec.latents[:2], side, side)))
