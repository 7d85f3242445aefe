"""An encoded data set of random latents and real captions, made in milliseconds."""

from pathlib import Path

import torch

from sdxl_lora.config import ModelConfig
from sdxl_lora.data.encoded_dataset import Batch, EncodedDataset, Example
from sdxl_lora.data.shard_writer import write_index, write_shard
from sdxl_lora.models.text_encoders import embed_tokens, load_text_encoders
from sdxl_lora.models.tokenizers import load_tokenizers, tokenize
from sdxl_lora.runtime.rng import keyed_generator

CAPTIONS = ["red apple", "pizza", "dog face", "rocket", "sunflower", "octopus", "house", "tiger face"]


def write_encoded_dataset(folder: Path, model: ModelConfig) -> EncodedDataset:
    """Writes eight training examples and one held out; opens the training split."""
    folder.mkdir()
    token_ids = tokenize(load_tokenizers(model), CAPTIONS)
    with torch.no_grad():
        embeds = embed_tokens(load_text_encoders(model, "fp32", torch.device("cpu")), token_ids)
    batch = Batch(
        latents_mean=torch.randn(8, 4, 16, 16, generator=keyed_generator("mean")),
        latents_std=torch.full((8, 4, 16, 16), 0.1),
        token_ids=token_ids,
        time_ids=torch.tensor([[128, 128, 0, 0, 128, 128]] * 8, dtype=torch.int32),
        prompt_embeds=embeds[0],
        pooled_prompt_embeds=embeds[1],
    )
    write_shard(folder, "train-00000.safetensors", batch)
    write_shard(folder, "held_out-00000.safetensors", batch)
    examples = [
        Example(f"id-{row}", f"{row}.png", caption, "train", "train-00000.safetensors", row)
        for row, caption in enumerate(CAPTIONS)
    ]
    held_out = Example("id-8", "8.png", CAPTIONS[0], "held_out", "held_out-00000.safetensors", 0)
    write_index(folder, [*examples, held_out])
    return EncodedDataset(folder, "train")
