"""Stable Diffusion XL (Podell et al. 2023, arXiv:2307.01952) in diffusers' format: UNet, pipeline, noise.

All weights are loaded from safetensors.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from torch import Tensor

from sdxl_lora.config import ModelConfig, Precision, PredictionType
from sdxl_lora.models.loading import DTYPES, freeze
from sdxl_lora.models.vae import load_vae
from sdxl_lora.models.weights import open_base

if TYPE_CHECKING:
    from diffusers import StableDiffusionXLPipeline


@dataclass(frozen=True)
class NoiseSchedule:
    """The noise that the base model was trained to remove."""

    alphas_cumprod: Tensor
    """alpha_bar at each timestep, fp32, (T,)."""
    prediction_type: PredictionType


def load_unet(config: ModelConfig, precision: Precision, device: torch.device) -> UNet2DConditionModel:
    """Load the UNet, frozen."""
    options = {"dtype": DTYPES[precision], "variant": config.variant, "use_safetensors": True}
    return freeze(UNet2DConditionModel.from_pretrained(open_base(config) / "unet", **options), device)


def load_pipeline(
    config: ModelConfig, precision: Precision, device: torch.device
) -> "StableDiffusionXLPipeline":
    """Load the whole pipeline, frozen, with the VAE that `config` names; it decodes one image at a time.

    Frozen, because PyTorch uses another matmul path for weights with requires_grad, even under no_grad, and
    that rounds differently: it folds the batch into rows.
    """
    from diffusers import StableDiffusionXLPipeline  # loads modules that training and evaluation do not need

    pipeline = StableDiffusionXLPipeline.from_pretrained(
        open_base(config),
        dtype=DTYPES[precision],
        variant=config.variant,
        vae=load_vae(config, precision, device),
        use_safetensors=True,
        add_watermarker=False,
    )
    for module in (pipeline.unet, pipeline.text_encoder, pipeline.text_encoder_2):
        freeze(module, device)
    pipeline.vae.enable_slicing()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def load_noise_schedule(config: ModelConfig) -> NoiseSchedule:
    """Load the noise schedule from the base model's scheduler folder."""
    scheduler = DDPMScheduler.from_pretrained(open_base(config) / "scheduler")
    return NoiseSchedule(scheduler.alphas_cumprod.float(), scheduler.config.prediction_type)


def predict(
    unet: UNet2DConditionModel,
    noisy_latents: Tensor,
    timesteps: Tensor,
    prompt_embeds: Tensor,
    pooled_prompt_embeds: Tensor,
    time_ids: Tensor,
) -> Tensor:
    """Return the UNet's prediction, (B, 4, H/8, W/8).

    Args:
        unet: the model.
        noisy_latents: (B, 4, H/8, W/8).
        timesteps: int64, (B,).
        prompt_embeds: (B, 77, 2048).
        pooled_prompt_embeds: (B, 1280).
        time_ids: original (h, w), crop (top, left), target (h, w) in pixels, (B, 6). Passed on in fp32: fp16
            would turn 4001 into 4000 and 70000 into infinity.
    """
    conditions = {"text_embeds": pooled_prompt_embeds, "time_ids": time_ids.float()}
    return unet(noisy_latents, timesteps, prompt_embeds, added_cond_kwargs=conditions, return_dict=False)[0]
