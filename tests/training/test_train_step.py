"""TrainStep against plain torch, on a network small enough to follow."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import pytest
import torch
from torch import Tensor, nn
from torch.nn import Parameter

from sdxl_lora.config import TrainingConfig, load_params
from sdxl_lora.runtime.rng import keyed_generator
from sdxl_lora.training.grad_scaler import GradScaler
from sdxl_lora.training.optimizers import OPTIMIZERS
from sdxl_lora.training.train_step import ParameterGroup, StepResult, TrainStep
from tests.support.optimizers import EXACT, REFERENCES

CPU = torch.device("cpu")
PEAK_RATES = (1e-2, 1e-3)


@dataclass(frozen=True)
class Pairs:
    """Inputs and what the network should make of them, (B, 8) each."""

    inputs: Tensor
    targets: Tensor

    def tensors(self) -> list[Tensor]:
        return [self.inputs, self.targets]

    def to(self, device: torch.device) -> Self:
        return replace(self, inputs=self.inputs.to(device), targets=self.targets.to(device))


def pairs(number: int, size: int = 4) -> Pairs:
    draws = torch.randn(2, size, 8, generator=keyed_generator("pairs", number))
    return Pairs(draws[0], draws[1])


def network(device: torch.device = CPU) -> nn.Sequential:
    """Two layers with enough weights for 8-bit moments, and a third that stays frozen."""
    model = nn.Sequential(nn.Linear(8, 640), nn.SiLU(), nn.Linear(640, 8), nn.Linear(8, 8))
    for number, parameter in enumerate(model.parameters()):
        draws = torch.randn(parameter.shape, generator=keyed_generator("weights", number))
        parameter.data = draws / parameter.shape[-1] ** 0.5
    model[3].requires_grad_(False)
    return model.to(device)


def loss_of(model: nn.Module) -> Callable[[Pairs], Tensor]:
    """Mean squared error, computed in the precision that the weights are in."""

    def loss(batch: Pairs) -> Tensor:
        output = model(batch.inputs.to(next(model.parameters()).dtype))
        return (output.float() - batch.targets).square().mean()

    return loss


@pytest.fixture
def config() -> TrainingConfig:
    params = load_params(Path("recipes/demo.yaml"))
    changes = {"optimizer": "adamw", "ema_decay": None, "max_grad_norm": 0.5}
    return params.training.model_copy(update=changes)


def with_(config: TrainingConfig, **changes: Any) -> TrainingConfig:
    return config.model_copy(update=changes)


def make(
    model: nn.Sequential, config: TrainingConfig, dtype: torch.dtype = torch.float32
) -> TrainStep[Pairs]:
    groups = [
        ParameterGroup(list(layer.parameters()), rate)
        for layer, rate in zip((model[0], model[2]), PEAK_RATES, strict=True)
    ]
    device = next(model.parameters()).device
    model[3].to(dtype)
    return TrainStep(loss_of(model), groups, config, dtype, use_graph=device.type == "cuda")


def trainable(model: nn.Sequential) -> list[Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def copies(module: nn.Module) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in module.parameters()]


def distance(ours: nn.Sequential, theirs: nn.Sequential) -> float:
    """Euclidean, between all weights, over their norm."""
    mine, other = (torch.cat([p.detach().flatten() for p in trainable(model)]) for model in (ours, theirs))
    return float((mine - other).norm() / other.norm())


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("accumulation", [1, 3])
def test_twenty_steps_are_those_of_torch(config: TrainingConfig, optimizer: str, accumulation: int) -> None:
    """Against the textbook: backward, clip_grad_norm_, AdamW with a group for each layer."""
    config = with_(config, optimizer=optimizer)
    exact = optimizer in EXACT
    ours, theirs = network(), network()
    train_step = make(ours, config)
    groups = [{"params": list(theirs[i].parameters()), "lr": 0.0} for i in (0, 2)]
    reference = REFERENCES[optimizer](groups, config)
    loss = loss_of(theirs)
    for step in range(20):
        factor = 1 / (step + 1)
        batches = [pairs(step * accumulation + number) for number in range(accumulation)]
        for batch in batches:
            train_step.accumulate(batch)
        update = train_step.update(factor)
        reference.zero_grad()
        mean_loss = torch.stack([loss(batch) for batch in batches]).mean()
        mean_loss.backward()
        norm = nn.utils.clip_grad_norm_(trainable(theirs), config.max_grad_norm)
        for group, rate in zip(reference.param_groups, PEAK_RATES, strict=True):
            group["lr"] = factor * rate
        reference.step()
        # Exact moments: losses of weights 1e-6 apart. 8-bit moments share a scale by blocks of 256, and its
        # blocks run on across layers: losses of weights 1e-3 apart.
        assert update.loss == pytest.approx(mean_loss.item(), rel=1e-5 if exact else 1e-3)
        assert update.grad_norm == pytest.approx(norm.item(), rel=1e-5 if exact else 1e-3)
    assert distance(ours, theirs) < (1e-6 if exact else 1e-3)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("ema_decay", [None, 0.5])
def test_frozen_groups_stay_and_the_others_train_as_in_torch(
    config: TrainingConfig, optimizer: str, ema_decay: float | None
) -> None:
    """Against the textbook: what needs no gradient has no momentum, no decay and no share in clipping."""
    config = with_(config, optimizer=optimizer, ema_decay=ema_decay, weight_decay=0.1)
    exact = optimizer in EXACT
    ours, theirs = network(), network()
    train_step, loss = make(ours, config), loss_of(theirs)
    rates = dict(zip((0, 2), PEAK_RATES, strict=True))
    groups = [{"params": list(theirs[layer].parameters()), "lr": rate} for layer, rate in rates.items()]
    reference = REFERENCES[optimizer](groups, config)
    average = copies(theirs[0])
    for step in range(20):
        if step == 10:
            train_step.freeze_groups_from(1, loss_of(ours))
            theirs[2].requires_grad_(False)
            frozen = copies(ours[2])
        batches = [pairs(2 * step), pairs(2 * step + 1)]
        for batch in batches:
            train_step.accumulate(batch)
        update = train_step.update(1.0)
        reference.zero_grad()
        mean_loss = torch.stack([loss(batch) for batch in batches]).mean()
        mean_loss.backward()
        norm = nn.utils.clip_grad_norm_(trainable(theirs), config.max_grad_norm)
        reference.step()
        decay = min(ema_decay or 0.0, (step + 1) / (step + 10))
        average = [decay * a + (1 - decay) * w for a, w in zip(average, copies(theirs[0]), strict=True)]
        assert update.loss == pytest.approx(mean_loss.item(), rel=1e-4 if exact else 1e-3)
        assert update.grad_norm == pytest.approx(norm.item(), rel=1e-4 if exact else 1e-3)
    assert all(torch.equal(a, b) for a, b in zip(frozen, copies(ours[2]), strict=True))
    train_step.finish()
    assert all(torch.equal(a, b) for a, b in zip(frozen, copies(ours[2]), strict=True))
    mine, other = (torch.cat([tensor.flatten() for tensor in part]) for part in (copies(ours[0]), average))
    assert (mine - other).norm() / other.norm() < (1e-6 if exact else 3e-3)  # 8 bits: as above


def test_half_precision_weights_follow_an_fp32_master(config: TrainingConfig) -> None:
    """Steps too small for bf16 to hold (a part in 256) still add up."""
    model = network()
    start = [parameter.detach().clone() for parameter in trainable(model)]
    train_step = make(model, config, torch.bfloat16)
    for step in range(50):
        train_step.accumulate(pairs(step))
        train_step.update(1e-3)
    assert {parameter.dtype for parameter in trainable(model)} == {torch.bfloat16}
    rounded = [parameter.detach().clone() for parameter in trainable(model)]
    train_step.finish()
    assert {parameter.dtype for parameter in trainable(model)} == {torch.float32}
    for before, after, low in zip(start, trainable(model), rounded, strict=True):
        assert not torch.equal(before, after)
        assert torch.equal(after.bfloat16(), low)
    largest = max((a - b).abs().max().item() for a, b in zip(trainable(model), start, strict=True))
    assert 1e-4 < largest < 1e-3  # 50 steps of 1e-5: bf16 alone would have lost most of them


def test_overflow_of_fp16_is_skipped_and_the_scale_recovers(config: TrainingConfig) -> None:
    model = network()
    train_step = make(model, config, torch.float16)
    before = [parameter.detach().clone() for parameter in trainable(model)]
    train_step.accumulate(Pairs(torch.full((4, 8), 200.0), torch.full((4, 8), -2e4)))  # above 65504
    overflow = train_step.update(1.0)
    assert not math.isfinite(overflow.grad_norm)
    assert all(torch.equal(a, b) for a, b in zip(before, trainable(model), strict=True))
    scales = []
    for step in range(20):
        train_step.accumulate(pairs(step))
        scales.append(train_step.update(1.0).loss_scale)
    assert scales[0] == overflow.loss_scale / 2
    assert scales[-1] == scales[-2] < overflow.loss_scale  # no overflow any more
    assert not any(torch.equal(a, b) for a, b in zip(before, trainable(model), strict=True))


def test_scaled_fp16_gradient_is_the_unscaled_one(config: TrainingConfig) -> None:
    updates: list[StepResult] = []
    for dtype in (torch.float32, torch.float16):
        train_step = make(network(), config, dtype)
        train_step.accumulate(pairs(0))
        updates.append(train_step.update(1.0))
    assert updates[0].loss_scale == 1
    assert updates[1].loss_scale > 1
    assert updates[1].grad_norm == pytest.approx(updates[0].grad_norm, rel=2e-3)
    assert updates[1].loss == pytest.approx(updates[0].loss, rel=2e-3)


def test_scale_doubles_after_many_good_steps_and_starts_to_count_again() -> None:
    scale = GradScaler(CPU, enabled=True)
    for _ in range(GradScaler.GROWTH_INTERVAL - 1):
        scale.update(finite=True)
    assert scale.value == GradScaler.INITIAL
    scale.update(finite=True)
    assert scale.value == scale.tensor.item() == 2 * GradScaler.INITIAL
    scale.update(finite=False)
    scale.update(finite=True)
    assert scale.value == GradScaler.INITIAL


def test_parameters_are_views_of_one_tensor(config: TrainingConfig) -> None:
    model = network()
    make(model, config)
    storages = {parameter.untyped_storage().data_ptr() for parameter in trainable(model)}
    assert len(storages) == 1


@pytest.mark.parametrize("device", [CPU, pytest.param(torch.device("cuda"), marks=pytest.mark.gpu)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("ema_decay", [None, 0.5])
def test_loaded_state_continues_bit_identically(
    config: TrainingConfig,
    device: torch.device,
    dtype: torch.dtype,
    optimizer: str,
    ema_decay: float | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Into a TrainStep that has already been used: on a GPU, under the addresses that its graph knows."""
    monkeypatch.setattr(GradScaler, "INITIAL", 2.0**30)
    monkeypatch.setattr(GradScaler, "GROWTH_INTERVAL", 4)
    config = with_(config, optimizer=optimizer, ema_decay=ema_decay)
    models = [network(device) for _ in range(3)]
    whole, first, second = (make(model, config, dtype) for model in models)
    updates = [step_of(whole, step) for step in range(40)]
    assert str([step_of(first, step) for step in range(26)]) == str(updates[:26])  # NaN is not itself
    state = {name: tensor.to("cpu", copy=True) for name, tensor in first.state_dict().items()}
    for step in range(7):
        step_of(second, 100 + step)
    second.load_state_dict(state)
    assert str([step_of(second, step) for step in range(26, 40)]) == str(updates[26:])
    scales = {update.loss_scale for update in updates[26:]}
    assert (len(scales) > 1) == (dtype == torch.float16)
    for train_step in (whole, second):
        train_step.finish()
    assert all(torch.equal(a, b) for a, b in zip(trainable(models[0]), trainable(models[2]), strict=True))


def step_of(train_step: TrainStep[Pairs], step: int) -> StepResult:
    for number in (2 * step, 2 * step + 1):
        train_step.accumulate(pairs(number))
    return train_step.update(1 / (step + 1))


@pytest.mark.gpu
def test_graphs_of_several_shapes_take_the_memory_of_the_largest(config: TrainingConfig) -> None:
    device, taken = torch.device("cuda"), []
    for sizes in ([65536], [65536, 60000, 50000, 40000]):
        train_step = make(network(device), config)
        torch.cuda.empty_cache()
        before = torch.cuda.memory_reserved()
        train_step.capture(pairs(number, size) for number, size in enumerate(sizes))
        torch.cuda.empty_cache()
        taken.append(torch.cuda.memory_reserved() - before)
        train_step.accumulate(pairs(0, 50000))
        assert math.isfinite(train_step.update(1.0).loss)
        del train_step
    assert taken[0] > 2**28
    assert taken[1] < 1.1 * taken[0]


def test_a_request_to_stop_is_reported_with_its_step(config: TrainingConfig) -> None:
    train_step = make(network(), config)
    train_step.accumulate(pairs(0))
    assert train_step.update(1.0, stop=True).stop
    train_step.accumulate(pairs(1))
    assert not train_step.update(1.0).stop


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_replayed_graph_is_bit_identical_to_an_eager_step(config: TrainingConfig, dtype: torch.dtype) -> None:
    """With two shapes of input, one first met in the middle of an accumulation; then with one group alone."""
    device = torch.device("cuda")
    results = []
    for use_graph in (True, False):
        model = network(device)
        train_step = make(model, config, dtype)
        if not use_graph:
            train_step._graph = None
        updates = []
        for step in range(6):
            if step == 4:
                train_step.freeze_groups_from(1, loss_of(model))
            train_step.accumulate(pairs(2 * step))
            train_step.accumulate(pairs(2 * step + 1, size=3))
            updates.append(train_step.update(1.0))
        train_step.finish()
        results.append((updates, [parameter.detach().clone() for parameter in trainable(model)]))
    assert results[0][0] == results[1][0]
    assert all(torch.equal(a, b) for a, b in zip(results[0][1], results[1][1], strict=True))
