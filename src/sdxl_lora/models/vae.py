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


def tile_vae(vae: "AutoencoderKL", side: int | None) -> None:
    """Make the VAE encode and decode images above `side` pixels in tiles that overlap by a quarter.

    `AutoencoderKL.enable_tiling` alone takes the tile from the config's `sample_size`. That is 1024 in SDXL's
    VAE, so an image of 1024 px would be processed as a whole.

    Args:
        side: of a tile, pixels; None: no tiles.
    """
    if side is not None:
        vae.enable_tiling()
        vae.tile_sample_min_size = side
        vae.tile_latent_min_size = side // 2 ** (len(vae.config.block_out_channels) - 1)
