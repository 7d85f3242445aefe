"""SDXL in its real shapes with random weights, and random images, as files for scripts of other projects."""

import json
import random
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image

from benchmarks.random_sdxl import random_pipeline

WORDS = ("red", "small", "old", "round", "quiet", "fox", "tree", "boat", "house", "cloud", "girl", "lamp")


def save_random_sdxl(folder: Path, device: torch.device) -> Path:
    """Write an SDXL pipeline of random fp16 weights, about 7 GB, unless the folder contains one."""
    if (folder / "model_index.json").is_file():  # written last
        return folder
    unfinished = folder.with_name(f"{folder.name}.unfinished")
    random_pipeline("fp16", device).save_pretrained(unfinished, max_shard_size="20GB")
    unfinished.rename(folder)
    torch.cuda.empty_cache()  # the script needs the GPU
    return folder


def save_random_images(folder: Path, count: int, sizes: Sequence[tuple[int, int]]) -> Path:
    """Write `count` JPEGs of these sizes in turn, (width, height), with captions, as an image folder."""
    if (folder / "metadata.jsonl").is_file():
        return folder
    folder.mkdir(parents=True)
    rng = random.Random(0)
    lines = []
    for number in range(count):
        name = f"{number:03}.jpg"
        blobs = Image.frombytes("RGB", (32, 32), rng.randbytes(32 * 32 * 3))
        blobs.resize(sizes[number % len(sizes)], Image.Resampling.BICUBIC).save(folder / name, quality=95)
        caption = " ".join(rng.choices(WORDS, k=rng.randint(5, 15)))
        lines.append(json.dumps({"file_name": name, "text": caption}) + "\n")
    (folder / "metadata.jsonl").write_text("".join(lines), encoding="utf-8")
    return folder
