"""Stable Diffusion XL (Podell et al. 2023, arXiv:2307.01952) in diffusers' format: modules and conditioning.

All weights are loaded from safetensors.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from sdxl_lora.config import ModelConfig, Precision, PredictionType
from sdxl_lora.models.weights import open_base, open_vae

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, StableDiffusionXLPipeline

TextEncoders = tuple[CLIPTextModel, CLIPTextModelWithProjection]

DTYPES: dict[Precision, torch.dtype] = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class NoiseSchedule:
    """The noise that the base model was trained to remove."""

    alphas_cumprod: Tensor
    """alpha_bar at each timestep, fp32, (T,)."""
    prediction_type: PredictionType


def load_text_encoders(config: ModelConfig, precision: Precision, device: torch.device) -> TextEncoders:
    """Load both text encoders, frozen."""
    base = open_base(config)
    options = {"dtype": DTYPES[precision], "variant": config.variant, "use_safetensors": True}
    return (
        freeze(CLIPTextModel.from_pretrained(base / "text_encoder", **options), device),
        freeze(CLIPTextModelWithProjection.from_pretrained(base / "text_encoder_2", **options), device),
    )


def load_vae(config: ModelConfig, precision: Precision, device: torch.device) -> "AutoencoderKL":
    """Load the VAE that `config` names, frozen."""
    from diffusers import AutoencoderKL  # loads 44 modules, which training without previews does not need

    if config.vae is None:
        folder, variant = open_base(config) / "vae", config.variant
    else:
        folder, variant = open_vae(config), None
    options = {"dtype": DTYPES[precision], "variant": variant, "use_safetensors": True}
    return freeze(AutoencoderKL.from_pretrained(folder, **options), device)


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
    from diffusers import StableDiffusionXLPipeline  # likewise, for training and evaluation

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


def embed_tokens(text_encoders: TextEncoders, token_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Return the UNet's text conditioning (Podell et al. 2023, section 2.1).

    The penultimate hidden states of both encoders, concatenated, and the second encoder's pooled projection.

    Args:
        token_ids: (B, 2, 77).

    Returns:
        prompt_embeds, (B, 77, 2048), and pooled_prompt_embeds, (B, 1280); narrower for smaller encoders.
    """
    first = text_encoders[0](token_ids[:, 0], output_hidden_states=True)
    second = text_encoders[1](token_ids[:, 1], output_hidden_states=True)
    return torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1), second.text_embeds


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


def freeze(module: Any, device: torch.device) -> Any:
    """Move `module` to `device`, in evaluation mode, without gradients, and return it."""
    return module.to(device).eval().requires_grad_(False)
