from pathlib import Path
from typing import Any

import pytest
import torch
from scipy.stats import bootstrap

from sdxl_lora.adapters.lora import load_lora
from sdxl_lora.config import EvaluationConfig, ModelConfig, Params, load_params
from sdxl_lora.data.encoded_dataset import EncodedDataset
from sdxl_lora.evaluation.held_out_loss import (
    LOSS_COLUMNS,
    HeldOutError,
    held_out_errors,
    held_out_loss,
    held_out_measurements,
    loss_by_timestep,
)
from sdxl_lora.runtime.rng import keyed_generator
from sdxl_lora.training.denoiser import load_denoiser
from tests.support.adapters import write_adapter
from tests.support.encoded import write_encoded_dataset

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def params() -> Params:
    return load_params(Path("recipes/demo.yaml"))


@pytest.fixture(scope="module")
def config(params: Params) -> EvaluationConfig:
    changes = {"timesteps": [50, 600], "noises": 2, "batch_size": 3, "max_examples": 2}
    return params.evaluation.model_copy(update=changes)


@pytest.fixture(scope="module", params=["frozen", "trained"])
def model(params: Params, request: pytest.FixtureRequest) -> ModelConfig:
    return params.model.model_copy(update={"text_encoders": request.param})


@pytest.fixture(scope="module")
def dataset(params: Params, tmp_path_factory: pytest.TempPathFactory) -> EncodedDataset:
    return write_encoded_dataset(tmp_path_factory.mktemp("evaluation") / "encoded", params.model)


@torch.no_grad()
def by_a_loop(
    unet: Any, text_encoders: Any, dataset: EncodedDataset, config: EvaluationConfig
) -> list[float]:
    """Errors of one model, by a loop over single examples."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2  # SDXL's noise schedule
    alphas = torch.cumprod(1 - betas, 0)
    errors = []
    for index in range(config.max_examples or len(dataset)):
        example = dataset[index]
        embeds, pooled = example.prompt_embeds, example.pooled_prompt_embeds
        if text_encoders is not None:
            first = text_encoders[0](example.token_ids[:, 0], output_hidden_states=True)
            second = text_encoders[1](example.token_ids[:, 1], output_hidden_states=True)
            embeds = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], -1)
            pooled = second.text_embeds
        for timestep in config.timesteps:
            for number in range(config.noises):
                key = (config.seed, "evaluation", dataset.examples[index].id, timestep, number)
                noise = torch.randn(1, 4, 16, 16, generator=keyed_generator(*key))
                noisy = alphas[timestep] ** 0.5 * example.latents_mean + (1 - alphas[timestep]) ** 0.5 * noise
                conditions = {"text_embeds": pooled, "time_ids": example.time_ids.float()}
                prediction = unet(noisy, timestep, embeds, added_cond_kwargs=conditions).sample
                errors.append(float(((prediction - noise) ** 2).mean()))
    return errors


def test_held_out_errors_are_those_of_a_loop_over_base_and_adapted_model(
    params: Params, model: ModelConfig, dataset: EncodedDataset, config: EvaluationConfig, tmp_path: Path
) -> None:
    trained = write_adapter(tmp_path, model, params.lora)
    base = load_denoiser(model, "fp32", CPU)
    denoiser = load_denoiser(model, "fp32", CPU)
    load_lora(tmp_path, denoiser.parts)
    errors = [error for batch in held_out_errors(denoiser, dataset, config) for error in batch]
    expected_base = by_a_loop(base.unet, base.text_encoders, dataset, config)
    expected_adapter = by_a_loop(trained.unet, trained.text_encoders, dataset, config)
    assert [error.base for error in errors] == pytest.approx(expected_base, rel=1e-4)
    assert [error.adapter for error in errors] == pytest.approx(expected_adapter, rel=1e-4)
    assert all(abs(e.adapter / e.base - 1) > 1e-3 for e in errors)
    assert [error.timestep for error in errors] == [50, 50, 600, 600] * 2


def test_held_out_errors_do_not_depend_on_the_batch(
    params: Params, dataset: EncodedDataset, config: EvaluationConfig, tmp_path: Path
) -> None:
    denoiser = write_adapter(tmp_path, params.model, params.lora)
    small = [e for batch in held_out_errors(denoiser, dataset, config) for e in batch]
    torch.manual_seed(3)
    larger = config.model_copy(update={"batch_size": 12})
    large = [e for batch in held_out_errors(denoiser, dataset, larger) for e in batch]
    assert [e.base for e in small] == pytest.approx([e.base for e in large], rel=1e-4)
    assert [e.adapter for e in small] == pytest.approx([e.adapter for e in large], rel=1e-4)


@pytest.mark.parametrize(("max_examples", "jobs"), [(None, 8 * 4), (3, 3 * 4), (100, 8 * 4)])
def test_at_most_max_examples_are_measured(
    dataset: EncodedDataset, config: EvaluationConfig, max_examples: int | None, jobs: int
) -> None:
    limited = config.model_copy(update={"max_examples": max_examples})
    assert len(held_out_measurements(dataset, limited)) == jobs


def test_losses_are_means_in_all_and_by_timestep(config: EvaluationConfig) -> None:
    errors = [
        HeldOutError("a", 600, 0.2, 0.1),
        HeldOutError("a", 50, 1.0, 0.5),
        HeldOutError("a", 50, 0.6, 0.6),
    ]
    loss = held_out_loss(errors, config)
    assert (loss["base"], loss["adapter"]) == pytest.approx((0.6, 0.4))
    assert loss["change_percent"] == pytest.approx(-100 / 3)
    rows = loss_by_timestep(errors, config)
    assert [set(row) for row in rows] == [set(LOSS_COLUMNS)] * 2
    assert [row["timestep"] for row in rows] == [50, 600]
    assert [row["base"] for row in rows] == pytest.approx([0.8, 0.2])
    assert [row["adapter"] for row in rows] == pytest.approx([0.55, 0.1])


def test_interval_of_the_change_is_scipys_over_examples(config: EvaluationConfig) -> None:
    """Draws of one example are alike: resampling them one by one would claim twice the certainty."""
    random = keyed_generator("losses")
    base = torch.rand(30, generator=random, dtype=torch.float64) + 0.5
    adapter = base * (0.8 + 0.2 * torch.randn(30, generator=random, dtype=torch.float64))
    rows = enumerate(zip(base.tolist(), adapter.tolist(), strict=True))
    errors = [HeldOutError(str(n), timestep, *row) for n, row in rows for timestep in (50, 300, 600, 900)]
    many = config.model_copy(update={"resamples": 4000})
    loss = held_out_loss(errors, many)
    expected = bootstrap(
        (base.numpy(), adapter.numpy()),
        lambda b, a, axis: 100 * (a.mean(axis) / b.mean(axis) - 1),
        paired=True,
        method="percentile",
        n_resamples=4000,
        rng=0,
    ).confidence_interval
    assert loss["change_percent_low"] == pytest.approx(expected.low, abs=0.5)
    assert loss["change_percent_high"] == pytest.approx(expected.high, abs=0.5)
    assert held_out_loss(errors, many) == loss
