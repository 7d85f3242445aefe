"""The frozen models that turn images and captions into tensors, together."""

from dataclasses import dataclass

import torch
from diffusers import AutoencoderKL

from sdxl_lora.config import EncodingConfig, ModelConfig
from sdxl_lora.data.image_encoder import load_image_encoder
from sdxl_lora.models.text_encoders import TextEncoders, load_text_encoders
from sdxl_lora.models.tokenizers import Tokenizers, load_tokenizers


@dataclass(frozen=True)
class Encoders:
    """The frozen models that turn images and captions into tensors."""

    vae: AutoencoderKL
    tokenizers: Tokenizers
    text_encoders: TextEncoders | None
    """None if they are trained, and so cannot be applied in advance."""


def load_encoders(model: ModelConfig, config: EncodingConfig, device: torch.device) -> Encoders:
    """Return VAE and tokenizers, and the text encoders if they are frozen."""
    frozen = model.text_encoders == "frozen"
    return Encoders(
        vae=load_image_encoder(model, config, device),
        tokenizers=load_tokenizers(model),
        text_encoders=load_text_encoders(model, config.text_precision, device) if frozen else None,
    )
