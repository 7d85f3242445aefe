"""SDXL's two tokenizers. Apart from its models, so that what reads only captions imports no model library."""

from typing import TYPE_CHECKING

from transformers import CLIPTokenizer

from sdxl_lora.config import ModelConfig
from sdxl_lora.models.weights import open_base

if TYPE_CHECKING:
    from torch import Tensor

Tokenizers = tuple[CLIPTokenizer, CLIPTokenizer]


def load_tokenizers(config: ModelConfig) -> Tokenizers:
    """Load the tokenizers of both text encoders."""
    base = open_base(config)
    first, second = (CLIPTokenizer.from_pretrained(base / name) for name in ("tokenizer", "tokenizer_2"))
    return first, second


def tokenize(tokenizers: Tokenizers, texts: list[str]) -> "Tensor":
    """Return token ids of both tokenizers, padded and truncated to 77, int64, (B, 2, 77)."""
    import torch  # seconds, which counting tokens need not wait for

    # 77 is the length of CLIP's position embeddings; the caption's end is cut off here, and nowhere else.
    options = {"padding": "max_length", "truncation": True, "max_length": 77, "return_tensors": "pt"}
    return torch.stack([tokenizer(texts, **options).input_ids for tokenizer in tokenizers], dim=1)


def count_tokens(tokenizers: Tokenizers, texts: list[str]) -> list[int]:
    """Return the number of CLIP tokens of each text without truncation, start and end included."""
    return [len(ids) for ids in tokenizers[0](texts, truncation=False, verbose=False).input_ids]
