"""Loading of image files for the VAE, in worker processes, so that the GPU does not wait for decoding."""

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
FEW_IMAGES = 64  # fewer take less time to decode than worker processes to start


@dataclass(frozen=True)
class CaptionedImage:
    """An image of data/captions.jsonl, which has one line for each caption."""

    id: str
    """SHA-256 of the image file."""
    image: str
    """File name of the image."""
    caption: str
    """The first caption."""
    more_captions: tuple[str, ...] = ()

    @property
    def captions(self) -> tuple[str, ...]:
        return (self.caption, *self.more_captions)


@dataclass(frozen=True)
class View:
    """One crop of an image, the VAE's input."""

    levels: Tensor
    """uint8, (3, H, W)."""
    time_ids: TimeIds


@dataclass(frozen=True)
class DecodedImage:
    """An image's crops and its perceptual hash."""

    views: tuple[View, ...]
    """The crop of the image and, with encoding.flip, that of the mirrored image, of the same size."""
    fingerprint: Tensor
    """Perceptual hash, packed bits, uint8, (24,)."""


_DecodeResult = DecodedImage | BadImageError | OSError | None


class ImageDataset(Dataset[_DecodeResult]):
    """Decodes one image an index. Errors are returned, not raised: DataLoader workers change their type."""

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
        """Return the crop of an image, or of a mirrored image, that the model is trained on."""
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
    """Yield the decoded image of each row in order, or why it cannot be used; None where it is not needed.

    Args:
        needed: asked in the worker right before decoding, when another process may have encoded the image.

    Raises:
        OSError: a file cannot be read: missing, forbidden, or a failing disk.
    """
    if not rows:
        return
    workers = min(_MAX_WORKERS, len(os.sched_getaffinity(0))) if len(rows) >= FEW_IMAGES else 0
    images = ImageDataset(rows, folder, config, needed)
    for result in DataLoader(images, batch_size=None, num_workers=workers, collate_fn=_keep_as_is):
        if isinstance(result, OSError):
            raise result
        yield result


def _keep_as_is(result: Any) -> Any:
    """Return the result unchanged; the loader's default would convert its fields to tensors."""
    return result
