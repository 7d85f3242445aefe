"""The frozen models that turn pictures and captions into tensors, the same bits whatever stands beside them.

Kernels choose their order of sums by the shape of their input, so every batch has the same number of rows.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from sdxl_lora.config import EncodingConfig, ModelConfig
from sdxl_lora.data.images import to_pixels
from sdxl_lora.models.fused import fuse_vae
from sdxl_lora.models.sdxl import TextEncoders, embed_tokens, load_text_encoders, load_vae
from sdxl_lora.models.tokenizers import Tokenizers, load_tokenizers
from sdxl_lora.runtime.transfers import to_device


@dataclass(frozen=True)
class Encoders:
    """The frozen models that turn images and captions into tensors."""

    vae: AutoencoderKL
    tokenizers: Tokenizers
    text_encoders: TextEncoders | None
    """None if they are trained, and so cannot be applied in advance."""


def load_encoders(model: ModelConfig, config: EncodingConfig, device: torch.device) -> Encoders:
    """VAE and tokenizers, and the text encoders if they are frozen."""
    frozen = model.text_encoders == "frozen"
    vae = load_vae(model, config.vae_precision, device)
    fuse_vae(vae)
    tile_vae(vae, config.vae_tile)
    return Encoders(
        vae=vae,
        tokenizers=load_tokenizers(model),
        text_encoders=load_text_encoders(model, config.text_precision, device) if frozen else None,
    )


def tile_vae(vae: AutoencoderKL, side: int | None) -> None:
    """Has the VAE encode images larger than `side` pixels in tiles that overlap by a quarter; None: whole."""
    if side is not None:
        vae.enable_tiling()
        vae.tile_sample_min_size = side
        vae.tile_latent_min_size = side // 2 ** (len(vae.config.block_out_channels) - 1)


@torch.no_grad()
def encode_images(vae: AutoencoderKL, levels: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the VAE's posterior, scaled as the UNet reads latents.

    On a GPU returns before they are computed, if the levels lie there.

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


@torch.no_grad()
def embed_captions(text_encoders: TextEncoders, token_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Prompt embeddings, (B, 77, 2048), and pooled ones, (B, 1280), as the encoders give them.

    On a GPU returns before they are computed.

    Args:
        token_ids: (B, 2, 77).
    """
    return embed_tokens(text_encoders, to_device(token_ids, text_encoders[0].device))


def pad_rows(rows: Tensor, size: int) -> Tensor:
    """`rows`, (B, ...), B <= size, and copies of the last one behind them, (size, ...)."""
    missing = size - len(rows)
    return torch.cat([rows, rows[-1:].expand(missing, *rows.shape[1:])]) if missing else rows


def weights_digest(model: Any) -> str:
    """A hash of what a model computes with: its configuration, and its weights in their present precision."""
    config: Mapping[str, object] = (
        model.config.to_dict() if hasattr(model.config, "to_dict") else dict(model.config)
    )
    meant = {key: value for key, value in config.items() if not key.startswith("_") and "version" not in key}
    digest = hashlib.sha256(json.dumps(meant, sort_keys=True, default=str).encode())
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
