"""SDXL in its real shapes with random weights, and random pictures, as files: what a foreign script reads."""

import json
import random
from pathlib import Path

import torch
from diffusers import DDPMScheduler, StableDiffusionXLPipeline
from PIL import Image
from transformers import CLIPTokenizer

from sdxl_lora import shapes

TOKENIZER = Path("demo/base_model/tokenizer")
WORDS = ("red", "small", "old", "round", "quiet", "fox", "tree", "boat", "house", "cloud", "girl", "lamp")


def save_random_sdxl(folder: Path, device: torch.device) -> Path:
    """Writes a whole SDXL pipeline of random fp16 weights, about 7 GB, unless the folder holds one already.

    The tokenizers are the embedded demo's: their 2,007 tokens lie within SDXL's 49,408.
    """
    if (folder / "model_index.json").is_file():  # written last
        return folder
    base = shapes.SDXL_BASE
    unet, vae = base.make_unet("fp16", device), base.make_vae("fp16", device)
    text_encoder, text_encoder_2 = base.make_text_encoders("fp16", device)
    pipeline = StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=text_encoder,
        text_encoder_2=text_encoder_2,
        tokenizer=CLIPTokenizer.from_pretrained(TOKENIZER),
        tokenizer_2=CLIPTokenizer.from_pretrained(TOKENIZER),
        unet=unet,
        scheduler=DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"),
    )
    unfinished = folder.with_name(f"{folder.name}.unfinished")
    pipeline.save_pretrained(unfinished, max_shard_size="20GB")
    unfinished.rename(folder)
    del pipeline, unet, vae, text_encoder, text_encoder_2
    torch.cuda.empty_cache()  # the GPU is the script's
    return folder


def save_random_images(folder: Path, count: int, side: int) -> Path:
    """Writes `count` square JPEGs of `side` pixels, with captions, as `datasets` reads an image folder."""
    if (folder / "metadata.jsonl").is_file():
        return folder
    folder.mkdir(parents=True)
    draws = random.Random(0)
    lines = []
    for number in range(count):
        name = f"{number:03}.jpg"
        blobs = Image.frombytes("RGB", (32, 32), draws.randbytes(32 * 32 * 3))
        blobs.resize((side, side), Image.Resampling.BICUBIC).save(folder / name, quality=95)
        caption = " ".join(draws.choices(WORDS, k=draws.randint(5, 15)))
        lines.append(json.dumps({"file_name": name, "text": caption}) + "\n")
    (folder / "metadata.jsonl").write_text("".join(lines), encoding="utf-8")
    return folder
