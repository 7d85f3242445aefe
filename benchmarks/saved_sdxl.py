"""SDXL in its real shapes with random weights, and random pictures, as files: what a foreign script reads."""

import json
import random
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from PIL import Image
from transformers import CLIPTokenizer

from benchmarks.random_sdxl import UNET, random_text_encoders

VAE = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "latent_channels": 4,
    "sample_size": 1024,
    "scaling_factor": 0.13025,
}
TOKENIZER = Path("demo/base_model/tokenizer")
WORDS = ("red", "small", "old", "round", "quiet", "fox", "tree", "boat", "house", "cloud", "girl", "lamp")


def save_random_sdxl(folder: Path, device: torch.device) -> Path:
    """Writes a whole SDXL pipeline of random fp16 weights, about 7 GB, unless the folder holds one already.

    The tokenizers are the embedded demo's: their 2,007 tokens lie within SDXL's 49,408.
    """
    if (folder / "model_index.json").is_file():  # written last
        return folder
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float16)
    try:
        with device:
            unet, vae = UNet2DConditionModel(**UNET), AutoencoderKL(**VAE)
            text_encoder, text_encoder_2 = random_text_encoders()
    finally:
        torch.set_default_dtype(default)
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
