"""SDXL at its full size, without weights: the layout that names must fit."""

from typing import Any

import torch
from diffusers import UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

UNET: dict[str, Any] = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
TEXT_ENCODER = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12}
TEXT_ENCODER_2 = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "projection_dim": 1280,
}


def full_size_sdxl() -> tuple[UNet2DConditionModel, CLIPTextModel, CLIPTextModelWithProjection]:
    """UNet and text encoders of SDXL base 1.0 on the meta device."""
    with torch.device("meta"):
        return (
            UNet2DConditionModel(**UNET),
            CLIPTextModel(CLIPTextConfig(**TEXT_ENCODER)),
            CLIPTextModelWithProjection(CLIPTextConfig(**TEXT_ENCODER_2)),
        )
