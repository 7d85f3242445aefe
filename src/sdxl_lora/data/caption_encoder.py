"""Frozen text encoders as encode_dataset and training run them. Knows no images and no adapters.

The key of cached embeddings holds the code of this module and of what it imports.
"""

import torch
from torch import Tensor

from sdxl_lora.models.text_encoders import TextEncoders, embed_tokens
from sdxl_lora.runtime.transfers import to_device


@torch.no_grad()
def embed_captions(text_encoders: TextEncoders, token_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Prompt embeddings, (B, 77, 2048), and pooled ones, (B, 1280), as the encoders give them.

    On a GPU returns before they are computed.

    Args:
        token_ids: (B, 2, 77).
    """
    return embed_tokens(text_encoders, to_device(token_ids, text_encoders[0].device))
