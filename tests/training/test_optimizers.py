"""The registry of optimizers against the schema, and against what the real ones allocate."""

from pathlib import Path
from typing import get_args

import pytest
import torch
from torch import nn

from sdxl_lora.config import TrainingConfig, load_params
from sdxl_lora.training.optimizers import OPTIMIZERS
from tests.support.optimizers import REFERENCES, TABLES

NUM_PARAMETERS = 100_001


@pytest.fixture
def config() -> TrainingConfig:
    return load_params(Path("recipes/demo.yaml")).training


def stepped(
    name: str, config: TrainingConfig, device: str = "cpu"
) -> tuple[torch.optim.Optimizer, nn.Parameter]:
    """An optimizer after its first update."""
    parameter = nn.Parameter(torch.zeros(NUM_PARAMETERS, device=device))
    parameter.grad = torch.ones_like(parameter)
    optimizer = OPTIMIZERS[name].build([{"params": [parameter], "lr": 1e-3}], config)
    optimizer.step()
    return optimizer, parameter


def test_schema_registry_and_references_name_the_same_optimizers() -> None:
    names = get_args(TrainingConfig.model_fields["optimizer"].annotation)
    assert set(names) == set(OPTIMIZERS) == set(REFERENCES)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_state_is_as_large_as_the_real_one(config: TrainingConfig, name: str) -> None:
    optimizer, parameter = stepped(name, config)
    state = {key: value for key, value in optimizer.state[parameter].items() if key not in TABLES}
    assert OPTIMIZERS[name].state_bytes(NUM_PARAMETERS) == sum(tensor.nbytes for tensor in state.values())


@pytest.mark.gpu
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_update_allocates_as_much_as_the_real_one(config: TrainingConfig, name: str) -> None:
    optimizer, _ = stepped(name, config, "cuda")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    optimizer.step()
    allocated = torch.cuda.max_memory_allocated() - before
    assert allocated == pytest.approx(OPTIMIZERS[name].update_bytes(NUM_PARAMETERS), abs=8192)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizer_takes_its_hyperparameters_from_the_config(config: TrainingConfig, name: str) -> None:
    changed = config.model_copy(update={"betas": (0.5, 0.25), "weight_decay": 0.125})
    (group,) = stepped(name, changed)[0].param_groups
    assert tuple(group["betas"]) == changed.betas
    assert group["weight_decay"] == changed.weight_decay
