"""The fastest way to train within a memory budget: how many examples at once, how many blocks computed twice.

Chosen by forecast before any weight is loaded. Recomputing costs arithmetic, and every pass costs time of its
own beside its arithmetic: small kernels, and large ones that a small micro-batch does not fill.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from math import ceil, inf

import torch

from sdxl_lora.config import LoraConfig, ModelConfig, TrainingConfig, divisors
from sdxl_lora.memory.training_forecast import (
    MemoryForecast,
    MetaTrainingRun,
    TrainingSpec,
    forecast_training,
)
from sdxl_lora.models.architecture import read_architecture
from sdxl_lora.storage.atomic_io import GIB

STEPS_A_GIB = 10  # how finely the least budget is sought
_MAX_GIB = 1024
OPERATIONS_A_PASS = 1e13
"""Arithmetic that takes as long as what a pass costs beside its own: on an H100, three passes of one 1024 px
example took 198 ms and one pass of three 134 ms, of 44 TFLOP each."""
_Change = Callable[[TrainingSpec], TrainingSpec]
_SMALLER_SIDES = (112, 96, 80, 64, 48, 32)  # latents a side that a refusal may propose


@dataclass(frozen=True)
class TrainingPlan:
    """How training is done."""

    micro_batch_size: int
    """Examples of one forward and backward pass."""
    checkpointed: tuple[str, ...]
    """Units that compute their activations twice."""
    recomputed: float
    """Arithmetic done again, as a share of that of a step without."""
    forecast: MemoryForecast | None
    """Peak memory; None where nobody needs it: on a CPU."""

    def applied_to(self, config: TrainingConfig) -> TrainingConfig:
        """`config` with the plan in place of `auto`: written into params.yaml, it gives this plan again."""
        choices = {"micro_batch_size": self.micro_batch_size, "checkpointing": len(self.checkpointed)}
        return config.model_copy(update=choices)

    def numbers(self) -> dict[str, object]:
        """For the report."""
        plan = {
            "micro_batch_size": self.micro_batch_size,
            "checkpointing": len(self.checkpointed),
            "recomputed": self.recomputed,
        }
        return {"plan": plan, **({} if self.forecast is None else {"forecast_gib": self.forecast.gib()})}


class Planner:
    """Plans for one workload. Traces each micro-batch size once, when it is first asked about it: seconds."""

    def __init__(self, spec: TrainingSpec) -> None:
        self._spec = spec
        self._meta_run = cache(lambda: MetaTrainingRun(spec))
        self._trace = cache(lambda size: self._meta_run().step(size))
        self._preview = cache(lambda: self._meta_run().preview())
        self._unlimited = cache(
            lambda size, count: forecast_training(self._trace(size), self._preview(), count)
        )

    def micro_batch_sizes(self) -> list[int]:
        """Those that params allow, the largest first."""
        config = self._spec.config
        return (
            divisors(config.batch_size)[::-1]
            if config.micro_batch_size == "auto"
            else [config.micro_batch_size]
        )

    def fastest(self, budget: float) -> TrainingPlan | None:
        """The fastest plan that takes at most `budget` bytes; None if there is none."""
        plans: list[TrainingPlan] = []
        for size in self.micro_batch_sizes():
            counts = self._counts(size)
            index = bisect_left(counts, True, key=lambda count: self._plan(size, count, budget) is not None)
            if index < len(counts) and (plan := self._plan(size, counts[index], budget)):
                plans.append(plan)
                if plan.recomputed == 0:
                    break
        return min(plans, key=self._cost, default=None)

    def smallest(self) -> TrainingPlan:
        """The plan that takes the least memory."""
        size = self.micro_batch_sizes()[-1]
        count = self._counts(size)[-1]
        budgets = range(1, _MAX_GIB * STEPS_A_GIB)
        index = bisect_left(
            budgets, True, key=lambda steps: self._plan(size, count, steps * GIB / STEPS_A_GIB) is not None
        )
        plan = self._plan(size, count, budgets[index] * GIB / STEPS_A_GIB)
        assert plan is not None
        return plan

    def exact(self, plan: TrainingPlan, budget: float) -> TrainingPlan:
        """`plan` with the forecast of a step that really checkpoints: the allocator's gaps come out right.

        Where these come out a little too large the forecast stays: PyTorch returns what is cached first.
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
        """Operations of a step, with what its passes cost beside."""
        passes = self._spec.config.batch_size // plan.micro_batch_size
        operations = self._trace(plan.micro_batch_size).flops * (1 + plan.recomputed)
        return passes * (operations + OPERATIONS_A_PASS)

    def _counts(self, size: int) -> Sequence[int]:
        """Numbers of checkpointed units that params allow, ascending."""
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

    def _plan(self, size: int, count: int, budget: float) -> TrainingPlan | None:
        """Micro-batches of `size` with `count` checkpointed units, if that fits."""
        trace = self._trace(size)
        chosen = trace.units[:count]
        forecast = self._unlimited(size, count)
        if forecast.total > budget:
            try:
                forecast = forecast_training(trace, self._preview(), count, budget)
            except MemoryError:
                return None
        recomputed = sum(unit.flops for unit in chosen) / trace.flops
        return TrainingPlan(size, tuple(unit.name for unit in chosen), recomputed, forecast)


def choose_plan(
    model: ModelConfig, lora: LoraConfig, config: TrainingConfig, latents: torch.Size, device: torch.device
) -> TrainingPlan:
    """The fastest plan within training.vram_gib, or without one, the fastest; in seconds, without weights.

    Args:
        latents: shape of the largest example's, (1, 4, H/8, W/8).
        device: where training will run; a CPU needs no forecast.

    Raises:
        ValueError: no plan fits; names the nearest that do.
    """
    spec = TrainingSpec(read_architecture(model), model.text_encoders != "frozen", lora, config, latents)
    planner = Planner(spec)
    if config.vram_gib is None and device.type == "cpu":
        if config.checkpointing in ("auto", "none", 0):
            return TrainingPlan(planner.micro_batch_sizes()[0], (), 0.0, None)
        plan = planner.fastest(inf)
        assert plan is not None
        return replace(plan, forecast=None)
    budget = inf if config.vram_gib is None else config.vram_gib * GIB
    plan = planner.fastest(budget)
    if plan is None:
        raise ValueError(refusal(spec, planner.smallest()))
    return planner.exact(plan, budget)


def refusal(spec: TrainingSpec, smallest: TrainingPlan) -> str:
    """Why nothing fits, and what would."""
    assert spec.config.vram_gib is not None
    ways = [f"training.vram_gib {needed_gib(smallest)}", *_alternatives(spec, spec.config.vram_gib * GIB)]
    return f"{shortage(spec, smallest)}. Any of these would do: {'; '.join(ways)}"


def shortage(spec: TrainingSpec, smallest: TrainingPlan) -> str:
    """Why nothing fits."""
    return (
        f"training.vram_gib is {spec.config.vram_gib:g}, and training takes {needed_gib(smallest)} GiB at "
        f"least (micro-batches of {smallest.micro_batch_size}, {len(smallest.checkpointed)} blocks "
        "checkpointed)"
    )


def needed_gib(plan: TrainingPlan) -> float:
    """A budget that does for a plan, GiB, rounded up."""
    assert plan.forecast is not None
    return ceil(plan.forecast.total / GIB * STEPS_A_GIB) / STEPS_A_GIB


def _alternatives(spec: TrainingSpec, budget: float) -> Iterator[str]:
    """Changes of params with which training takes at most `budget` bytes."""
    for name, change in changes(spec).items():
        if Planner(change(spec)).fastest(budget) is not None:
            yield name
    for side in _SMALLER_SIDES:
        if side < spec.latents[-1] and Planner(with_side(spec, side)).fastest(budget) is not None:
            yield resolution_name(spec, side)
            return


def changes(spec: TrainingSpec) -> dict[str, _Change]:
    """Changes of params that need less memory, but for a lower resolution, by what to write into params."""
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
    """`spec` with these keys of params' section `training` changed."""
    return replace(spec, config=spec.config.model_copy(update=update))


def with_side(spec: TrainingSpec, side: int) -> TrainingSpec:
    """`spec` on square images of another size: latents of `side` x `side`."""
    return replace(spec, latents=torch.Size((*spec.latents[:2], side, side)))


def resolution_name(spec: TrainingSpec, side: int) -> str:
    """The change of params that makes latents of `side` x `side`."""
    return f"encoding.resolution {side * spec.shapes.pixels_per_latent}"
