"""Pictures that no perceptual hash takes for one another, and the rows of a data set made of them."""

import hashlib
from pathlib import Path

import numpy as np
from PIL import Image

from sdxl_lora.data.image_loader import CaptionedImage


def pattern(number: int, size: tuple[int, int] = (128, 128)) -> Image.Image:
    """Blurred squares of random colours, others for every number."""
    colours = np.random.default_rng(number).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    return Image.fromarray(colours).resize(size, Image.Resampling.BICUBIC)


def write_patterns(folder: Path, count: int) -> list[CaptionedImage]:
    """Writes 0.png, 1.png, ...; the caption of the n-th is `picture n`."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        pattern(number).save(folder / f"{number}.png")
    return [row_of(folder / f"{number}.png") for number in range(count)]


def row_of(file: Path, caption: str | None = None) -> CaptionedImage:
    """The row of an image file as it is now."""
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    return CaptionedImage(digest, file.name, caption or f"picture {file.stem}")
