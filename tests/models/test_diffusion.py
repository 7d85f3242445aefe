import pytest
import torch
from diffusers import DDPMScheduler

from sdxl_lora.config import PredictionType
from sdxl_lora.models.diffusion import add_noise, min_snr_weight, prediction_target, squared_error


@pytest.fixture
def scheduler() -> DDPMScheduler:
    return DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")


def test_noisy_latents_are_those_of_diffusers(scheduler: DDPMScheduler) -> None:
    latents, noise = torch.randn(2, 5, 4, 8, 8)
    timesteps = torch.tensor([0, 1, 250, 500, 999])
    expected = scheduler.add_noise(latents, noise, timesteps)
    torch.testing.assert_close(add_noise(latents, noise, scheduler.alphas_cumprod[timesteps]), expected)


def test_velocity_is_that_of_diffusers(scheduler: DDPMScheduler) -> None:
    latents, noise = torch.randn(2, 3, 4, 8, 8)
    timesteps = torch.tensor([10, 500, 990])
    expected = scheduler.get_velocity(latents, noise, timesteps)
    target = prediction_target(latents, noise, scheduler.alphas_cumprod[timesteps], "v_prediction")
    torch.testing.assert_close(target, expected)


def test_epsilon_target_is_the_noise() -> None:
    latents, noise = torch.randn(2, 3, 4, 8, 8)
    assert prediction_target(latents, noise, torch.rand(3), "epsilon") is noise


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_min_snr_weight_is_the_papers(prediction_type: PredictionType) -> None:
    alpha_bar = torch.linspace(0.01, 0.99, 50)
    snr = alpha_bar / (1 - alpha_bar)
    divisor = snr if prediction_type == "epsilon" else snr + 1
    torch.testing.assert_close(min_snr_weight(alpha_bar, 5.0, prediction_type), snr.clamp(max=5.0) / divisor)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_min_snr_weight_is_finite_at_both_ends(prediction_type: PredictionType) -> None:
    weight = min_snr_weight(torch.tensor([0.0, 1.0]), 5.0, prediction_type)
    assert torch.isfinite(weight).all()
    assert (weight >= 0).all()
    assert (weight <= 1).all()


def test_squared_error_is_one_number_an_example_in_full_precision() -> None:
    prediction, target = torch.randn(2, 3, 4, 8, 8, dtype=torch.float16)
    expected = torch.stack(
        [(p.float() - t.float()).square().mean() for p, t in zip(prediction, target, strict=True)]
    )
    errors = squared_error(prediction, target)
    assert errors.dtype == torch.float32
    torch.testing.assert_close(errors, expected)
