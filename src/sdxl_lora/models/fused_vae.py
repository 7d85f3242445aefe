"""The VAE in fewer kernels."""

import torch
from diffusers import AutoencoderKL

from sdxl_lora.models.class_swap import swap_classes
from sdxl_lora.models.fused_blocks import FUSED_BLOCKS


def fuse_vae(vae: AutoencoderKL) -> None:
    """Give the VAE's parts their fused classes, and on a GPU the layout channels_last."""
    swap_classes(vae, FUSED_BLOCKS)
    if vae.device.type != "cpu":
        vae.to(memory_format=torch.channels_last)
