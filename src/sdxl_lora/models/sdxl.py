"""Stable Diffusion XL (Podell et al. 2023, arXiv:2307.01952) in diffusers: UNet, pipeline, conditions.

Everything is loaded from safetensors.
"""

from dataclasses import dataclass

import torch
from diffusers import DDPMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from torch import Tensor

from sdxl_lora.config import ModelConfig, Precision, PredictionType
from sdxl_lora.models.loading import DTYPES, freeze
from sdxl_lora.models.vae import load_vae
from sdxl_lora.models.weights import open_base


@dataclass(frozen=True)
class NoiseSchedule:
    """How the base model was trained to denoise."""

    alphas_cumprod: Tensor
    """alpha_bar at each timestep, fp32, (T,)."""
    prediction_type: PredictionType


def load_unet(config: ModelConfig, precision: Precision, device: torch.device) -> UNet2DConditionModel:
    """The UNet, frozen."""
    options = {"dtype": DTYPES[precision], "variant": config.variant, "use_safetensors": True}
    return freeze(UNet2DConditionModel.from_pretrained(open_base(config) / "unet", **options), device)


def load_pipeline(
    config: ModelConfig, precision: Precision, device: torch.device
) -> StableDiffusionXLPipeline:
    """The whole pipeline, frozen, with the VAE that `config` names; decodes one image at a time.

    Frozen, because torch rounds the product with a weight that asks for gradients otherwise than with one
    that does not, also where no gradient is taken: it folds a batch into rows for the former alone.
    """
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


def layers_per_block(config: ModelConfig) -> int:
    """Resnets in a block of the UNet's way down."""
    number: int = UNet2DConditionModel.load_config(open_base(config) / "unet")["layers_per_block"]
    return number


def load_noise_schedule(config: ModelConfig) -> NoiseSchedule:
    """The noise schedule in the base model's scheduler folder."""
    scheduler = DDPMScheduler.from_pretrained(open_base(config) / "scheduler")
    return NoiseSchedule(scheduler.alphas_cumprod.float(), scheduler.config.prediction_type)


def force_zeros_for_empty_prompt(config: ModelConfig) -> bool:
    """Whether the base model reads zeros where there is no caption, as SDXL does, or an empty caption."""
    zeros: bool = StableDiffusionXLPipeline.load_config(open_base(config)).get(
        "force_zeros_for_empty_prompt", True
    )
    return zeros


def predict(
    unet: UNet2DConditionModel,
    noisy_latents: Tensor,
    timesteps: Tensor,
    prompt_embeds: Tensor,
    pooled_prompt_embeds: Tensor,
    time_ids: Tensor,
) -> Tensor:
    """The UNet's prediction, (B, 4, H/8, W/8).

    Args:
        noisy_latents: (B, 4, H/8, W/8).
        timesteps: int64, (B,).
        prompt_embeds: (B, 77, 2048).
        pooled_prompt_embeds: (B, 1280).
        time_ids: original (h, w), crop (top, left), target (h, w) in pixels, (B, 6). Kept in fp32: fp16 would
            turn 4001 into 4000 and 70000 into infinity.
    """
    conditions = {"text_embeds": pooled_prompt_embeds, "time_ids": time_ids.float()}
    return unet(noisy_latents, timesteps, prompt_embeds, added_cond_kwargs=conditions, return_dict=False)[0]
