"""The VAE, loaded from safetensors. Knows no text and no adapters."""

import torch
from diffusers import AutoencoderKL

from sdxl_lora.config import ModelConfig, Precision
from sdxl_lora.models.loading import DTYPES, freeze
from sdxl_lora.models.weights import open_base, open_vae


def load_vae(config: ModelConfig, precision: Precision, device: torch.device) -> AutoencoderKL:
    """The VAE that `config` names, frozen."""
    if config.vae is None:
        folder, variant = open_base(config) / "vae", config.variant
    else:
        folder, variant = open_vae(config), None
    options = {"dtype": DTYPES[precision], "variant": variant, "use_safetensors": True}
    return freeze(AutoencoderKL.from_pretrained(folder, **options), device)
