"""Plans against a search through all of them, and the proposals of a refusal by following them."""

from dataclasses import replace
from math import inf
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch

from sdxl_lora.config import ModelConfig, Params, TrainingConfig, load_params
from sdxl_lora.memory.planner import ForecastPlan, Planner, TrainingPlan, choose_plan
from sdxl_lora.memory.training_forecast import forecast_training
from sdxl_lora.memory.training_trace import MetaTrainingRun, TrainingSpec
from sdxl_lora.models.architecture import read_architecture
from sdxl_lora.storage.atomic_io import GIB

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
LATENTS = torch.Size((1, 4, 16, 16))  # of the demo


@pytest.fixture(scope="module")
def params() -> Params:
    return load_params(Path("recipes/demo.yaml"))


@pytest.fixture(scope="module")
def model(params: Params) -> ModelConfig:
    return params.model.model_copy(update={"text_encoders": "trained"})


@pytest.fixture(scope="module")
def config(params: Params) -> TrainingConfig:
    changes = {"precision": "fp16", "batch_size": 4, "checkpointing": "auto", "micro_batch_size": "auto"}
    return params.training.model_copy(update=changes)


@pytest.fixture(scope="module")
def spec(params: Params, config: TrainingConfig) -> TrainingSpec:
    return TrainingSpec(read_architecture(params.model), True, params.lora, config, LATENTS)


@pytest.fixture(scope="module")
def planner(spec: TrainingSpec) -> Planner:
    return Planner(spec)


@pytest.fixture(scope="module")
def flops(spec: TrainingSpec) -> dict[int, float]:
    """Operations of a pass, by micro-batch size."""
    meta_run = MetaTrainingRun(spec)
    return {size: meta_run.step(size).flops for size in (4, 2, 1)}


@pytest.fixture(scope="module")
def totals(spec: TrainingSpec) -> dict[tuple[int, int], tuple[int, float]]:
    """Bytes and share of recomputed operations of every plan, by micro-batch size and number of units."""
    meta_run, found = MetaTrainingRun(spec), {}
    preview = meta_run.preview()
    for size in (4, 2, 1):
        trace = meta_run.step(size)
        for count in range(len(trace.units) + 1):
            recomputed = sum(unit.flops for unit in trace.units[:count]) / trace.flops
            found[size, count] = (forecast_training(trace, preview, count).total, recomputed)
    return found


def with_(config: TrainingConfig, **changes: Any) -> TrainingConfig:
    return config.model_copy(update=changes)


def total(plan: ForecastPlan | None) -> int:
    assert plan is not None
    return plan.forecast.total


def test_without_a_limit_nothing_is_computed_twice(planner: Planner) -> None:
    plan = planner.fastest(inf)
    assert plan is not None
    assert (plan.micro_batch_size, plan.checkpointed, plan.recomputed) == (4, (), 0.0)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.3, 0.5, 0.8, 1.0])
@pytest.mark.parametrize("a_pass", [0.0, 0.1, 100.0], ids="a pass costs {} of its arithmetic".format)
def test_plan_is_the_fastest_of_all_that_fit(
    planner: Planner,
    totals: dict[tuple[int, int], tuple[int, float]],
    flops: dict[int, float],
    share: float,
    a_pass: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("sdxl_lora.memory.planner.OPERATIONS_A_PASS", a_pass * flops[1])

    def cost(size: int, recomputed: float) -> float:
        return 4 / size * (flops[size] * (1 + recomputed) + a_pass * flops[1])

    sizes = [size for size, _ in totals.values()]
    budget = min(sizes) + share * (max(sizes) - min(sizes))
    fitting = [cost(size, extra) for (size, _), (total, extra) in totals.items() if total <= budget]
    plan = planner.fastest(budget)
    assert total(plan) <= budget
    assert plan is not None
    # One unit more can cost the allocator more in gaps than it frees: the search may pass such a plan by.
    assert cost(plan.micro_batch_size, plan.recomputed) <= min(fitting) * 1.01


def test_more_memory_never_gives_a_slower_plan(planner: Planner) -> None:
    smallest, largest = total(planner.smallest()), total(planner.fastest(inf))
    budgets = [smallest + share * (largest - smallest) / 4 for share in range(5)]
    plans = [planner.fastest(budget) for budget in budgets]
    slowness = [(-plan.micro_batch_size, plan.recomputed) for plan in plans if plan is not None]
    assert len(slowness) == len(budgets)
    assert slowness == sorted(slowness, reverse=True)


def test_smallest_plan_is_where_refusals_begin(planner: Planner) -> None:
    needed = total(planner.smallest())
    assert planner.fastest(needed) is not None
    assert planner.fastest(needed - 0.1 * GIB) is None


@pytest.mark.parametrize(
    "pinned",
    [{"checkpointing": "none"}, {"checkpointing": "all"}, {"checkpointing": 7}, {"micro_batch_size": 2}],
)
def test_pinned_choices_are_kept(spec: TrainingSpec, pinned: dict[str, Any]) -> None:
    planner = Planner(replace(spec, config=with_(spec.config, **pinned)))
    plan = planner.fastest(inf)
    assert plan is not None
    count = {"none": 0, "all": 32, 7: 7}[pinned.get("checkpointing", "none")]
    assert len(plan.checkpointed) == count
    assert plan.micro_batch_size == pinned.get("micro_batch_size", 4)


def test_plan_written_into_params_gives_itself_again(
    params: Params, model: ModelConfig, config: TrainingConfig, spec: TrainingSpec
) -> None:
    """With a budget half way between what all blocks checkpointed need at least, and none."""
    config = with_(config, micro_batch_size=4)
    ways = [replace(spec, config=with_(config, checkpointing=count)) for count in ("all", "none")]
    budget = fmean(total(Planner(way).smallest()) for way in ways)
    tight = with_(config, vram_gib=budget / GIB)
    plan = choose_plan(model, params.lora, tight, LATENTS, CUDA)
    assert 0 < len(plan.checkpointed) < 32
    assert choose_plan(model, params.lora, plan.applied_to(tight), LATENTS, CUDA) == plan


def test_impossible_budget_is_refused_with_remedies_that_work(
    params: Params, model: ModelConfig, config: TrainingConfig, planner: Planner
) -> None:
    budget = total(planner.smallest()) / GIB - 0.02
    tight = with_(config, vram_gib=budget)
    with pytest.raises(ValueError, match=r"training\.vram_gib is .*, but training takes") as caught:
        choose_plan(model, params.lora, tight, LATENTS, CUDA)
    ways = str(caught.value).partition("Any one of these suffices: ")[2].split("; ")
    assert len(ways) > 1
    for way in ways:
        match way.split():
            case ["training.vram_gib", value]:
                choose_plan(model, params.lora, with_(tight, vram_gib=float(value)), LATENTS, CUDA)
            case ["training.preview_every", "null"]:
                choose_plan(model, params.lora, with_(tight, preview_every=None), LATENTS, CUDA)
            case ["model.text_encoders", "frozen"]:
                choose_plan(params.model, params.lora, tight, LATENTS, CUDA)
            case ["encoding.resolution", value]:
                choose_plan(
                    model, params.lora, tight, torch.Size((1, 4, int(value) // 8, int(value) // 8)), CUDA
                )
            case _:
                pytest.fail(f"{way!r} cannot be followed")


def test_refusal_of_a_pinned_plan_proposes_auto(
    params: Params, model: ModelConfig, config: TrainingConfig, planner: Planner
) -> None:
    pinned = with_(config, checkpointing="none", vram_gib=total(planner.smallest()) / GIB)
    with pytest.raises(ValueError, match=r"training\.checkpointing auto"):
        choose_plan(model, params.lora, pinned, LATENTS, CUDA)


def test_cpu_without_a_limit_needs_no_forecast(
    params: Params, model: ModelConfig, config: TrainingConfig
) -> None:
    plan = choose_plan(model, params.lora, config, LATENTS, CPU)
    assert plan == TrainingPlan(4, (), 0.0)
    assert plan.numbers() == {"plan": {"micro_batch_size": 4, "checkpointing": 0, "recomputed": 0.0}}


def test_cpu_checkpoints_what_params_pin(params: Params, model: ModelConfig, config: TrainingConfig) -> None:
    plan = choose_plan(model, params.lora, with_(config, checkpointing=5), LATENTS, CPU)
    assert len(plan.checkpointed) == 5
    assert not isinstance(plan, ForecastPlan)


def test_gpu_without_a_limit_gets_a_forecast(
    params: Params, model: ModelConfig, config: TrainingConfig
) -> None:
    numbers = choose_plan(model, params.lora, config, LATENTS, CUDA).numbers()
    assert numbers["plan"] == {"micro_batch_size": 4, "checkpointing": 0, "recomputed": 0.0}
    assert numbers["forecast_gib"]["total"] > 0.1  # type: ignore[index]
