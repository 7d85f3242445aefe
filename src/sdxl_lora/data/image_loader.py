"""From image files to what the VAE is given, in worker processes, so that it never waits for a decoder."""

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from sdxl_lora.config import EncodingConfig
from sdxl_lora.data.aspect_ratio_buckets import bucket_sizes, nearest_size
from sdxl_lora.data.images import BadImageError, TimeIds, decode_image, fingerprint, resize_and_crop, to_bytes
from sdxl_lora.runtime.rng import keyed_generator

_MAX_WORKERS = 8
FEW_IMAGES = 64  # not worth a worker's start


@dataclass(frozen=True)
class CaptionedImage:
    """An image of data/captions.jsonl, which has a line for each of its captions."""

    id: str
    """SHA-256 of the image file."""
    image: str
    """File name of the image."""
    caption: str
    """The first one."""
    more_captions: tuple[str, ...] = ()

    @property
    def captions(self) -> tuple[str, ...]:
        return (self.caption, *self.more_captions)


@dataclass(frozen=True)
class View:
    """What the VAE is given of an image."""

    levels: Tensor
    """uint8, (3, H, W)."""
    time_ids: TimeIds


@dataclass(frozen=True)
class DecodedImage:
    """What is made of an image."""

    views: tuple[View, ...]
    """The image as it is and, with encoding.flip, mirrored: of one size."""
    fingerprint: Tensor
    """Perceptual hash, packed bits, uint8, (24,)."""


_DecodeResult = DecodedImage | BadImageError | OSError | None


class ImageDataset(Dataset[_DecodeResult]):
    """Decodes row by row. What goes wrong is an outcome too: exceptions lose their kind between processes."""

    def __init__(
        self,
        rows: Sequence[CaptionedImage],
        folder: Path,
        config: EncodingConfig,
        needed: Callable[[CaptionedImage], bool],
    ) -> None:
        self._rows, self._folder, self._config, self._needed = rows, folder, config, needed

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> _DecodeResult:
        row = self._rows[index]
        if not self._needed(row):
            return None
        try:
            return self.decode(row)
        except (BadImageError, OSError) as error:
            return error

    def decode(self, row: CaptionedImage) -> DecodedImage:
        content = (self._folder / row.image).read_bytes()
        if hashlib.sha256(content).hexdigest() != row.id:
            raise BadImageError(
                "changed", "not the file that was downloaded: run `dvc repro download_dataset`"
            )
        image = decode_image(content)
        views = [self.view(image, keyed_generator("crop", row.id))]
        if self._config.flip:
            views.append(self.view(ImageOps.mirror(image), keyed_generator("crop", row.id, "flipped")))
        return DecodedImage(tuple(views), fingerprint(image))

    def view(self, image: Image.Image, random: torch.Generator) -> View:
        """The part of an image that the model is shown. A mirrored image is one like any other."""
        sizes = bucket_sizes(self._config.resolution, self._config.aspect_ratios)
        size = nearest_size(image.size, sizes)
        part, time_ids = resize_and_crop(image, size, self._config.crop, random)
        return View(to_bytes(part), time_ids)


def decode_images(
    rows: Sequence[CaptionedImage],
    folder: Path,
    config: EncodingConfig,
    needed: Callable[[CaptionedImage], bool],
) -> Iterator[DecodedImage | BadImageError | None]:
    """The picture of each row in order, or why there is none; None for rows that are not needed.

    Raises:
        OSError: a file cannot be read at all: missing, forbidden, a failing disk.
    """
    if not rows:
        return
    workers = min(_MAX_WORKERS, len(os.sched_getaffinity(0))) if len(rows) >= FEW_IMAGES else 0
    pictures = ImageDataset(rows, folder, config, needed)
    for outcome in DataLoader(pictures, batch_size=None, num_workers=workers, collate_fn=_keep_as_is):
        if isinstance(outcome, OSError):
            raise outcome
        yield outcome


def _keep_as_is(outcome: Any) -> Any:
    """Keeps the loader from looking into what it loads."""
    return outcome
