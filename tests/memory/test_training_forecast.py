"""Forecasts against the library's real step on the CPU, bitsandbytes' real state, and known sizes of SDXL."""

from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from sdxl_lora.adapters.lora import add_adapters, lora_parameters
from sdxl_lora.config import Params, Precision, TrainingConfig, load_params
from sdxl_lora.memory.caching_allocator import MIB, CachingAllocator
from sdxl_lora.memory.trace import Allocate, Event, Free, MemoryTrace, NeedWorkspace
from sdxl_lora.memory.training_forecast import (
    CUBLAS_WORKSPACE,
    forecast_training,
    replay_capture,
    with_checkpointing,
)
from sdxl_lora.memory.training_trace import (
    MetaTrainingRun,
    TrainingSpec,
    TrainingTrace,
    make_denoiser,
    make_examples,
)
from sdxl_lora.models.architecture import read_architecture
from sdxl_lora.storage.atomic_io import GIB
from sdxl_lora.training.denoiser import Denoiser, load_denoiser
from sdxl_lora.training.optimizers import OPTIMIZERS
from sdxl_lora.training.trainer import make_train_step
from tests.support.traced import peak

CPU, META = torch.device("cpu"), torch.device("meta")
LATENTS = torch.Size((1, 4, 16, 16))  # of the demo


@pytest.fixture(scope="module")
def params() -> Params:
    return load_params(Path("recipes/demo.yaml"))


@pytest.fixture(scope="module")
def sdxl() -> Params:
    return load_params(Path("recipes/sdxl-naruto-16gb.yaml"))


def training_spec(params: Params, **changes: object) -> TrainingSpec:
    """Return the training of the demo's model with its text encoders."""
    config = params.training.model_copy(update=changes)
    return TrainingSpec(read_architecture(params.model), True, params.lora, config, LATENTS)


def real_denoiser(params: Params, config: TrainingConfig) -> Denoiser:
    model = params.model.model_copy(update={"text_encoders": "trained"})
    return load_denoiser(model, config.precision, CPU)


def step_of(denoiser: Denoiser, spec: TrainingSpec) -> list[Event]:
    """Return a step's events with diffusers' modules: on a CPU the fused ones run other operators."""
    add_adapters(denoiser.parts, spec.lora, seed=0)
    examples = make_examples(spec, 2)
    trace = MemoryTrace(denoiser.device)
    with trace:
        for module in denoiser.modules:
            module.train()
            trace.hold([*module.parameters(), *module.buffers()])
        engine = make_train_step(denoiser, spec.config)
        trace.hold(examples.tensors())
        engine.accumulate(examples)
    return trace.events


@pytest.fixture(scope="module")
def spec(params: Params) -> TrainingSpec:
    return training_spec(params, precision="fp16", ema_decay=None, preview_every=None)


@pytest.fixture(scope="module")
def trace(spec: TrainingSpec) -> TrainingTrace:
    return MetaTrainingRun(spec).step(4)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_step_without_data_takes_what_a_real_one_takes(params: Params, precision: Precision) -> None:
    """Except for the log-sum-exp of attention, which GPU kernels pad."""
    spec = training_spec(params, precision=precision)
    real, without_data = real_denoiser(params, spec.config), make_denoiser(spec)
    assert peak(step_of(without_data, spec)) == pytest.approx(peak(step_of(real, spec)), rel=2e-3)


@pytest.mark.parametrize("share", [0.25, 0.5, 1.0])
def test_checkpointing_is_forecast_from_a_step_without(
    spec: TrainingSpec, trace: TrainingTrace, share: float
) -> None:
    """Against a step that really checkpoints the same units."""
    count = round(share * len(trace.units))
    real = MetaTrainingRun(spec, [unit.name for unit in trace.units[:count]]).step(4)
    forecast = peak([*trace.setup, *with_checkpointing(trace, count)])
    assert forecast == pytest.approx(peak([*real.setup, *real.step]), rel=0.01)
    assert forecast < 0.9 * peak([*trace.setup, *trace.step])


def test_units_come_in_order_of_bytes_freed_per_operation(trace: TrainingTrace) -> None:
    ratios = [unit.freed_bytes / unit.flops for unit in trace.units]
    assert ratios == sorted(ratios, reverse=True)
    assert ratios[-1] > 0


def test_unit_that_frees_nothing_is_left_out(trace: TrainingTrace, spec: TrainingSpec) -> None:
    """No gradient reaches the first text encoder's last layer."""
    names = {unit.name for unit in trace.units}
    layers = spec.shapes.text_encoder["num_hidden_layers"]
    assert f"text_encoder.encoder.layers.{layers - 1}" not in names
    assert f"text_encoder.encoder.layers.{layers - 2}" in names


def test_parts_are_what_they_are_made_of(spec: TrainingSpec, trace: TrainingTrace) -> None:
    denoiser = make_denoiser(spec)
    add_adapters(denoiser.parts, spec.lora, seed=0)
    adapters = sum(p.numel() for module in denoiser.modules for p in lora_parameters(module))
    frozen = sum(p.numel() for module in denoiser.modules for p in module.parameters() if not p.requires_grad)
    forecast = forecast_training(trace, [], 0)
    assert forecast.weights == pytest.approx(2 * frozen, rel=1e-3)  # and the text encoders' position ids
    assert forecast.adapters == pytest.approx((4 + 4 + 2) * adapters, rel=1e-3)
    assert forecast.activations == pytest.approx(peak(trace.step), rel=0.02)
    assert forecast.previews == 0
    assert forecast.total == sum(asdict(forecast).values())
    assert forecast.gib()["total"] == forecast.total / GIB


def test_moving_average_is_another_copy_of_the_adapters(spec: TrainingSpec, trace: TrainingTrace) -> None:
    averaging = replace(spec, config=spec.config.model_copy(update={"ema_decay": 0.99}))
    more = MetaTrainingRun(averaging).step(4).adapters - trace.adapters
    assert more == pytest.approx(trace.adapters * 4 / 10, rel=1e-3)


def test_previews_come_on_top_of_a_recorded_step(spec: TrainingSpec, trace: TrainingTrace) -> None:
    shown = replace(spec, config=spec.config.model_copy(update={"preview_every": 5}))
    meta_run = MetaTrainingRun(shown)
    with_previews = forecast_training(meta_run.step(4), meta_run.preview(), 0)
    without = forecast_training(trace, [], 0)
    vae = sum(p.nbytes for p in spec.shapes.make_vae("fp16", META).parameters())
    assert with_previews.previews > vae
    assert with_previews.total > without.total


def test_workspace_keeps_the_segment_in_which_it_lies() -> None:
    """One of 512 MiB that is free again when the backward pass first needs its workspace."""
    step: list[Event] = [
        NeedWorkspace(0),
        Allocate(0, 512 * MIB),
        Free(0),
        NeedWorkspace(1),
    ]
    warmup, graph = replay_capture(step, CachingAllocator())
    assert warmup.peak_reserved == warmup.reserved == CUBLAS_WORKSPACE + 512 * MIB
    assert graph.reserved == CUBLAS_WORKSPACE + 512 * MIB
    warmup, graph = replay_capture([step[0], step[3], *step[1:3]], CachingAllocator())
    assert warmup.reserved == 2 * CUBLAS_WORKSPACE
    assert graph.reserved == 2 * CUBLAS_WORKSPACE + 512 * MIB


def test_adamw_in_fp32_updates_with_one_more_copy(trace: TrainingTrace, spec: TrainingSpec) -> None:
    plain = replace(spec, config=spec.config.model_copy(update={"optimizer": "adamw"}))
    denoiser = make_denoiser(spec)
    add_adapters(denoiser.parts, spec.lora, seed=0)
    num_parameters = sum(p.numel() for module in denoiser.modules for p in lora_parameters(module))
    assert MetaTrainingRun(plain).step(4).num_parameters == trace.num_parameters == num_parameters
    assert OPTIMIZERS["adamw"].update_bytes(num_parameters) == 4 * num_parameters
    assert OPTIMIZERS["adamw_8bit"].update_bytes(num_parameters) == 0


@pytest.mark.parametrize(("optimizer", "copies"), [("adamw", 1), ("adamw_8bit", 0)])
def test_forecast_has_room_for_the_copy(trace: TrainingTrace, optimizer: str, copies: int) -> None:
    """With so many parameters that no other gap of the pool is as large."""
    config = trace.spec.config.model_copy(update={"optimizer": optimizer})
    large = replace(trace, spec=replace(trace.spec, config=config), num_parameters=GIB)
    more = forecast_training(large, [], 0).cache - forecast_training(trace, [], 0).cache
    assert more == pytest.approx(4 * GIB * copies, abs=0.1 * GIB)


def test_budget_that_is_too_small_is_an_error(trace: TrainingTrace) -> None:
    needed = forecast_training(trace, [], 0).total
    assert forecast_training(trace, [], 0, budget=needed).total <= needed
    with pytest.raises(MemoryError):
        forecast_training(trace, [], 0, budget=needed // 2)
