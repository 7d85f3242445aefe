"""Loading the VAE, from safetensors. Depends neither on text encoders nor on adapters."""

from typing import TYPE_CHECKING

import torch

from sdxl_lora.config import ModelConfig, Precision
from sdxl_lora.models.loading import DTYPES, freeze
from sdxl_lora.models.weights import open_base, open_vae

if TYPE_CHECKING:
    from diffusers import AutoencoderKL


def load_vae(config: ModelConfig, precision: Precision, device: torch.device) -> "AutoencoderKL":
    """Load the VAE that `config` names, frozen."""
    from diffusers import AutoencoderKL  # loads 44 modules, which training without previews does not need

    if config.vae is None:
        folder, variant = open_base(config) / "vae", config.variant
    else:
        folder, variant = open_vae(config), None
    options = {"dtype": DTYPES[precision], "variant": variant, "use_safetensors": True}
    return freeze(AutoencoderKL.from_pretrained(folder, **options), device)
