"""The output of stage prepare in memory: pixels, captions and splits, in the same order."""

import io
import json
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from emoji import caption
from numpy.typing import NDArray
from PIL import Image
from splits import Split
from torch import Tensor


@dataclass(frozen=True)
class ImageSet:
    """N images; `pixels[i]`, `labels[i]`, `styles[i]` and `splits[i]` belong together."""

    pixels: Tensor
    """uint8, (N, 3, H, W)."""
    labels: list[str]
    styles: list[str]
    splits: list[Split]

    def captions(self) -> list[str]:
        return [caption(label, style) for label, style in zip(self.labels, self.styles, strict=True)]

    def where(self, splits: Collection[Split], shaded: bool | None = None) -> Tensor:
        """Return the indices of images in `splits`, int64; only shaded copies, only originals, or both."""
        return torch.tensor(
            [
                index
                for index, (split, style) in enumerate(zip(self.splits, self.styles, strict=True))
                if split in splits and shaded in (None, style.startswith("shaded "))
            ]
        )


def encoded_images(folder: Path) -> list[tuple[dict[str, Any], bytes]]:
    """Return each image's line of images.jsonl and its WebP file."""
    lines = [json.loads(line) for line in (folder / "images.jsonl").read_text().splitlines()]
    with (folder / "images.bin").open("rb") as blob:
        return [(line, blob.read(line["bytes"])) for line in lines]


def load_image_set(folder: Path) -> ImageSet:
    encoded = encoded_images(folder)
    with ThreadPoolExecutor() as threads:
        decoded = np.stack(list(threads.map(decode_webp, [webp for _, webp in encoded])))
    return ImageSet(
        torch.from_numpy(decoded).permute(0, 3, 1, 2).contiguous(),
        [line["label"] for line, _ in encoded],
        [line["style"] for line, _ in encoded],
        [line["split"] for line, _ in encoded],
    )


def decode_webp(webp: bytes) -> NDArray[np.uint8]:
    """Return the pixels, (H, W, 3)."""
    return np.asarray(Image.open(io.BytesIO(webp)).convert("RGB"))


def to_unit_range(pixels: Tensor) -> Tensor:
    """Convert uint8 to fp32 in [-1, 1]."""
    return pixels.float() / 127.5 - 1


def psnr(images: Tensor, references: Tensor) -> Tensor:
    """Return the peak signal-to-noise ratio of images in [-1, 1], dB, (B,)."""
    return 10 * torch.log10(4 / (images - references).square().flatten(1).mean(1))


def grid(rows: list[Tensor], path: Path) -> None:
    """Save rows of images in [-1, 1], each (B, 3, H, W), below each other."""
    gap = 2
    columns = max(len(row) for row in rows)
    size = rows[0].shape[-1] + gap
    canvas = torch.full((3, len(rows) * size, columns * size), 200, dtype=torch.uint8)
    for top, row in enumerate(rows):
        for left, image in enumerate(row):
            pixels = ((image.float().clamp(-1, 1) + 1) * 127.5).round().byte().cpu()
            canvas[:, top * size : (top + 1) * size - gap, left * size : (left + 1) * size - gap] = pixels
    Image.fromarray(canvas.permute(1, 2, 0).numpy()).save(path)
