"""Pictures as the VAE wants them: RGB on white, a square cut out, size conditions kept. Knows no model."""

import warnings
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

Crop = Literal["center", "random"]


def load_image(path: Path) -> Image.Image:
    """The first frame of an image file, upright, RGB, transparency on white.

    Raises:
        ValueError: the file is no image, is truncated or would unpack to an absurd size; names the file.
        OSError: the file cannot be read at all: missing, forbidden, a failing disk.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                image.seek(0)
                image.load()
                return on_white(ImageOps.exif_transpose(image))
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the system's fault, not the image's: leaving the image out would hide it
        raise ValueError(f"{path.name}: not a readable image ({error})") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ValueError(f"{path.name}: too many pixels ({error})") from error


def on_white(image: Image.Image) -> Image.Image:
    """`image` as 8-bit RGB, its transparent parts white.

    Raises:
        ValueError: 32-bit greys, whose white is not agreed upon.
    """
    if image.mode in ("I", "F"):
        raise ValueError("32 bits a pixel, and nothing says which value is white: save it with 8 or 16")
    if image.mode.startswith("I;16"):  # Pillow's own conversion clips at 255
        image = Image.fromarray((np.asarray(image) / 257).round().astype(np.uint8))
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image).convert("RGB")


def resize_and_crop(
    image: Image.Image, resolution: int, crop: Crop, generator: torch.Generator
) -> tuple[Image.Image, tuple[int, int, int, int, int, int]]:
    """The square that the model is shown, and SDXL's size conditions (Podell et al. 2023, section 2.2).

    The shorter side is resized to `resolution`, the longer one is cropped.

    Args:
        resolution: side of the square, pixels.
        crop: where the square is cut out.
        generator: what a random crop is drawn from.

    Returns:
        The square, and original (height, width), crop (top, left) after resizing, target (height, width).
    """
    width, height = image.size
    scale = resolution / min(width, height)
    resized_width, resized_height = (max(resolution, round(side * scale)) for side in (width, height))
    room_down, room_right = resized_height - resolution, resized_width - resolution
    if crop == "center":
        top, left = room_down // 2, room_right // 2
    else:
        top = int(torch.randint(room_down + 1, (), generator=generator))
        left = int(torch.randint(room_right + 1, (), generator=generator))
    resized = image.resize((resized_width, resized_height), Image.Resampling.LANCZOS)
    square = resized.crop((left, top, left + resolution, top + resolution))
    return square, (height, width, top, left, resolution, resolution)


def to_tensor(image: Image.Image) -> Tensor:
    """An RGB image as the VAE reads it, fp32 in [-1, 1], (3, H, W)."""
    pixels = torch.from_numpy(np.array(image, dtype=np.uint8)).permute(2, 0, 1)
    return pixels.float().div(127.5).sub(1)
