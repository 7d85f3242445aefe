"""Loading both text encoders, and the UNet's text conditioning. Depends neither on images nor on adapters."""

import torch
from torch import Tensor
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from sdxl_lora.config import ModelConfig, Precision
from sdxl_lora.models.loading import DTYPES, freeze
from sdxl_lora.models.weights import open_base

TextEncoders = tuple[CLIPTextModel, CLIPTextModelWithProjection]


def load_text_encoders(config: ModelConfig, precision: Precision, device: torch.device) -> TextEncoders:
    """Load both text encoders, frozen."""
    base = open_base(config)
    options = {"dtype": DTYPES[precision], "variant": config.variant, "use_safetensors": True}
    return (
        freeze(CLIPTextModel.from_pretrained(base / "text_encoder", **options), device),
        freeze(CLIPTextModelWithProjection.from_pretrained(base / "text_encoder_2", **options), device),
    )


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
