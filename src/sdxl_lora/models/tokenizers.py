"""SDXL's two tokenizers, apart from its models: who only counts tokens waits for no torch."""

from typing import TYPE_CHECKING

from transformers import CLIPTokenizer

from sdxl_lora.config import ModelConfig
from sdxl_lora.models.weights import open_base

if TYPE_CHECKING:
    from torch import Tensor

Tokenizers = tuple[CLIPTokenizer, CLIPTokenizer]


def load_tokenizers(config: ModelConfig) -> Tokenizers:
    base = open_base(config)
    first, second = (CLIPTokenizer.from_pretrained(base / name) for name in ("tokenizer", "tokenizer_2"))
    return first, second


def tokenize(tokenizers: Tokenizers, texts: list[str]) -> "Tensor":
    """Token ids of both tokenizers, padded and truncated to 77, int64, (B, 2, 77)."""
    import torch  # seconds, which counting tokens need not wait for

    options = {"padding": "max_length", "truncation": True, "max_length": 77, "return_tensors": "pt"}
    return torch.stack([tokenizer(texts, **options).input_ids for tokenizer in tokenizers], dim=1)


def count_tokens(tokenizers: Tokenizers, texts: list[str]) -> list[int]:
    """CLIP tokens of each text, start and end included, uncut."""
    return [len(ids) for ids in tokenizers[0](texts, truncation=False, verbose=False).input_ids]
