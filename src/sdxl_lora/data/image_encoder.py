"""The VAE's encoder as encode_dataset runs it. Depends neither on text encoders nor on adapters.

The key of cached latents holds the code of this module and of what it imports.
"""

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from sdxl_lora.config import EncodingConfig, ModelConfig
from sdxl_lora.data.images import to_pixels
from sdxl_lora.models.fused_vae import fuse_vae
from sdxl_lora.models.vae import load_vae, tile_vae


def load_image_encoder(model: ModelConfig, config: EncodingConfig, device: torch.device) -> AutoencoderKL:
    """Return the VAE that `model` names, fused, and tiled as `config` says."""
    vae = load_vae(model, config.vae_precision, device)
    fuse_vae(vae)
    tile_vae(vae, config.vae_tile)
    return vae


@torch.no_grad()
def encode_images(vae: AutoencoderKL, levels: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of the VAE's posterior, in the scale of the UNet's latents.

    On a GPU returns before they are computed, if the levels are there.

    Args:
        levels: uint8, (B, 3, H, W).

    Returns:
        Two tensors in the VAE's precision, on its device, (B, 4, H/8, W/8).
    """
    weight = next(vae.parameters())  # diffusers walks over all modules to tell a model's device and type
    pixels = to_pixels(levels.to(weight.device)).to(weight.dtype)
    posterior = vae.encode(pixels).latent_dist
    shift = getattr(vae.config, "shift_factor", None) or 0.0
    mean = (posterior.mean - shift) * vae.config.scaling_factor
    return mean, posterior.std * vae.config.scaling_factor
